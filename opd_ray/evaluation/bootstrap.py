"""Confidence intervals of a figure, or of a difference between two models: the bootstrap over problems."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opd_ray.evaluation.pass_at_k import pass_at_k

DRAWS_PER_CHUNK = 1 << 20
"""Problems drawn at a time (8 MiB of indices): bounds the memory, whatever the number of resamples."""


def paired_bootstrap(  # noqa: PLR0913  (the public surface)
    num_samples: ArrayLike,
    num_correct_a: ArrayLike,
    num_correct_b: ArrayLike,
    k: int,
    *,
    num_resamples: int,
    alpha: float,
    seed: int,
) -> tuple[float, tuple[float, float]]:
    """Return mean pass@k of a minus mean pass@k of b, and a percentile interval for it.

    Each resample draws P of the P problems with replacement, the same ones for both models, and takes the
    mean difference of their unbiased pass@k (`pass_at_k`). The interval runs from the alpha/2 to the 1 -
    alpha/2 quantile of the resamples, interpolated linearly. It tells how far the choice of problems (with
    the samples drawn for them) carries the result, not how far another training seed would. With few problems
    it is somewhat too narrow.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; the paired form.

    Args:
        num_samples: `[P]` integers, samples n of each problem, the same for both models, each at least k.
        num_correct_a: `[P]` integers, correct samples of model a, ``0 <= c <= n``.
        num_correct_b: `[P]` integers, the same for model b, on the same problems in the same order.
        k: samples drawn, at least 1.
        num_resamples: at least 1; 10,000 and more for a stable interval.
        alpha: share of the resamples outside the interval, in (0, 1); 0.05 for a 95 % interval.
        seed: at least 0; the same seed draws the same problems.

    Returns:
        The difference and (low, high), in [-1, 1]. Swapped models with the same seed give the negated numbers.

    Raises:
        ValueError: no problem, an option out of range, or counts that `pass_at_k` refuses, with the model
            that they are of.
    """
    _check_options(num_resamples, alpha, seed)
    first = _pass_at_k_of("a", num_samples, num_correct_a, k)
    difference = first - _pass_at_k_of("b", num_samples, num_correct_b, k)
    if difference.size == 0:
        raise ValueError("there is no problem (P = 0) to compare the models on; give at least one")
    means = _resampled_means(difference, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(np.mean(difference)), (float(low), float(high))


def bootstrap_interval(
    values: ArrayLike, *, num_resamples: int = 10_000, alpha: float = 0.05, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile interval for the mean of `values`, one number a problem, drawn with replacement.

    It tells how far the choice of problems carries a benchmark's figure; with few problems it is somewhat too narrow.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.

    Args:
        values: `[P]` numbers, for example the problems' pass@k; at least one.
        num_resamples: at least 1; 10,000 and more for a stable interval.
        alpha: share of the resamples outside the interval, in (0, 1); 0.05 for a 95 % interval.
        seed: at least 0; the same seed draws the same problems.

    Raises:
        ValueError: no problem, or an option out of range.
    """
    _check_options(num_resamples, alpha, seed)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values has shape {array.shape}: give one number a problem, at least one")
    means = _resampled_means(array, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def _check_options(num_resamples: int, alpha: float, seed: int) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; use a number in (0, 1), 0.05 for a 95 % interval")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; use at least 1, 10000 for a stable interval")
    if seed < 0:
        raise ValueError(f"seed is {seed}; use a whole number of at least 0")


def _pass_at_k_of(model: str, num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64]:
    try:
        return pass_at_k(num_samples, num_correct, k)
    except ValueError as error:
        raise ValueError(f"model {model}: {error}") from error


def _resampled_means(
    values: NDArray[np.float64], num_resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    means = np.empty(num_resamples, dtype=np.float64)
    rows = max(1, DRAWS_PER_CHUNK // values.size)
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        drawn = generator.integers(0, values.size, size=(stop - start, values.size))
        means[start:stop] = values[drawn].mean(axis=1)
    return means
