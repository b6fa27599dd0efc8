import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.evaluation import avg_at_n, pass_at_k


def by_enumeration(n: int, c: int, k: int) -> Fraction:
    """The share of all k-subsets of n samples, c of them correct, that hold a correct one."""
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    k = draw(st.integers(1, 9))
    num_samples = draw(st.lists(st.integers(k, 10), min_size=1, max_size=5))
    return num_samples, [draw(st.integers(0, n)) for n in num_samples], k


@given(problems())
def test_equals_the_share_of_subsets_with_a_correct_sample(case: tuple[list[int], list[int], int]) -> None:
    num_samples, num_correct, k = case
    want = [float(by_enumeration(n, c, k)) for n, c in zip(num_samples, num_correct, strict=True)]
    np.testing.assert_allclose(pass_at_k(num_samples, num_correct, k), want, rtol=0, atol=1e-14)


def test_values_worked_by_hand() -> None:
    got = pass_at_k([4, 4, 4, 4], [0, 1, 2, 4], 2)
    # 1 - C(4,2)/6, 1 - C(3,2)/6, 1 - C(2,2)/6, all correct
    np.testing.assert_allclose(got, [0.0, 0.5, 5 / 6, 1.0], rtol=0, atol=1e-15)
    assert got.dtype == np.float64


def test_pass_at_1_is_the_share_of_correct_samples_and_pass_at_n_asks_for_one() -> None:
    num_correct = list(range(9))
    np.testing.assert_array_equal(pass_at_k([8] * 9, num_correct, 1), np.arange(9) / 8)
    np.testing.assert_array_equal(pass_at_k([8] * 9, num_correct, 8), [0.0] + [1.0] * 8)


@pytest.mark.parametrize(("n", "c", "k"), [(10_000, 1, 100), (5_000, 2_500, 1_000), (2_000, 1_990, 11)])
def test_large_counts_agree_with_exact_arithmetic(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k([n], [c], k)[0] == pytest.approx(float(exact), abs=1e-12)


@given(problems())
def test_never_leaves_the_unit_interval_and_never_falls_with_k(
    case: tuple[list[int], list[int], int],
) -> None:
    num_samples, num_correct, k = case
    small, large = pass_at_k(num_samples, num_correct, 1), pass_at_k(num_samples, num_correct, k)
    assert np.all((large >= 0) & (large <= 1))
    assert np.all(large >= small - 1e-15)


def test_no_problem_gives_no_value() -> None:
    assert pass_at_k([], [], 1).shape == (0,)


def test_takes_numpy_counts_of_any_integer_type() -> None:
    got = pass_at_k(np.array([4], dtype=np.uint8), np.array([3], dtype=np.uint8), 2)
    assert got.tolist() == [1.0]  # 4 - 3 - 1 must not wrap around


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "message"),
    [
        ([8, 3, 8, 2], [0, 0, 0, 0], 8, r"problem 1 has 3 \(2 of 4 problems have too few\)"),
        ([7], [7], 8, r"needs at least 8 samples of every problem, problem 0 has 7"),
        ([8], [9], 1, "problem 0 has 9 of 8"),
        ([8, 8], [1, -1], 1, "problem 1 has -1 of 8"),
        ([8], [1, 2], 1, "same length, got 1 and 2"),
        ([8], [1], 0, "k must be at least 1, got 0"),
        ([8.5], [1], 1, r"num_samples must hold whole numbers, got \[8.5\]"),
        ([8], [float("nan")], 1, r"num_correct must hold whole numbers, got \[nan\]"),
        ([[8]], [[1]], 1, r"shape \(1, 1\)"),
        (["8"], [1], 1, "whole numbers"),
    ],
)
def test_nonsense_is_refused_by_name(num_samples: list[Any], num_correct: list[Any], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(num_samples, num_correct, k)


def test_avg_at_n_weighs_problems_not_samples() -> None:
    assert avg_at_n([8, 8], [8, 2]) == 0.625
    assert avg_at_n([2, 8], [2, 0]) == 0.5  # not 2 of 10


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "message"),
    [([], [], "at least one problem"), ([8, 0], [1, 0], "problem 1 has none"), ([4], [5], "5 of 4")],
)
def test_avg_at_n_refuses_what_has_no_mean(num_samples: list[Any], num_correct: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        avg_at_n(num_samples, num_correct)
