"""Estimators over samples of the same problem: unbiased pass@k and avg@n. P is the number of problems."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return each problem's unbiased pass@k, the chance that at least one of k samples is correct.

    With n samples of which c are correct it is ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv
    2107.03374, equation 1), evaluated as a product of k factors in [0, 1]: no binomial coefficient can
    overflow, and the absolute error stays within a few ``k * 1e-16``.

    Args:
        num_samples: `[P]` integers, samples n of each problem, each at least k.
        num_correct: `[P]` integers, correct samples c, ``0 <= c <= n``.
        k: samples drawn, at least 1.

    Returns:
        `[P]` float64 in [0, 1]; take the mean for the benchmark's pass@k.

    Raises:
        ValueError: a problem has fewer than k samples, counts are not whole numbers or contradict each other,
            or the shapes differ.
    """
    n, c = _counts(num_samples, num_correct)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    short = np.flatnonzero(n < k)
    if short.size:
        p = int(short[0])
        raise ValueError(
            f"pass@{k} needs at least {k} samples of every problem, problem {p} has {n[p]} "
            f"({short.size} of {n.size} problems have too few): draw more samples or lower k"
        )
    all_wrong = np.ones(n.shape, dtype=np.float64)
    for drawn in range(k):
        # The chance that the next draw is wrong too; 0 once the wrong ones are used up.
        all_wrong *= np.maximum(n - c - drawn, 0) / (n - drawn)
    return 1.0 - all_wrong


def avg_at_n(num_samples: ArrayLike, num_correct: ArrayLike) -> float:
    """Return the mean over problems of the share of correct samples (avg@n), in [0, 1].

    Args:
        num_samples: `[P]` integers, samples n of each problem, at least 1; P at least 1.
        num_correct: `[P]` integers, correct samples c, ``0 <= c <= n``.

    Raises:
        ValueError: there is no problem, or one without samples, or the counts are wrong as in `pass_at_k`.
    """
    n, c = _counts(num_samples, num_correct)
    if n.size == 0:
        raise ValueError("avg@n needs at least one problem, got none")
    empty = np.flatnonzero(n < 1)
    if empty.size:
        raise ValueError(f"avg@n needs at least one sample of every problem, problem {int(empty[0])} has none")
    return float(np.mean(c / n))


def _counts(num_samples: ArrayLike, num_correct: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n, c = _whole_numbers("num_samples", num_samples), _whole_numbers("num_correct", num_correct)
    if n.shape != c.shape:
        raise ValueError(f"num_samples and num_correct must have the same length, got {n.shape[0]} and {c.shape[0]}")
    bad = np.flatnonzero((c < 0) | (c > n))
    if bad.size:
        p = int(bad[0])
        raise ValueError(f"num_correct must be 0 to num_samples, problem {p} has {c[p]} of {n[p]}")
    return n, c


def _whole_numbers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array: NDArray[Any] = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a list of one number a problem, got shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold whole numbers, got dtype {array.dtype}")
    if array.dtype.kind == "f" and not np.all(np.isfinite(array) & (array == np.floor(array))):
        raise ValueError(f"{name} must hold whole numbers, got {array[:8].tolist()}")
    return array.astype(np.int64)
