import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.evaluation import bootstrap, bootstrap_interval, paired_bootstrap, pass_at_k

Counts = tuple[list[int], list[int], list[int], int]


@st.composite
def comparisons(draw: st.DrawFn) -> Counts:
    k = draw(st.integers(1, 4))
    num_samples = draw(st.lists(st.integers(k, 8), min_size=1, max_size=6))
    return (
        num_samples,
        [draw(st.integers(0, n)) for n in num_samples],
        [draw(st.integers(0, n)) for n in num_samples],
        k,
    )


def every_resample(counts: Counts) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean differences of all P^P ways to draw P problems with replacement, sorted."""
    num_samples, num_correct_a, num_correct_b, k = counts
    gap = pass_at_k(num_samples, num_correct_a, k) - pass_at_k(num_samples, num_correct_b, k)
    draws = itertools.product(range(len(gap)), repeat=len(gap))
    return np.sort([float(np.mean(gap[list(draw)])) for draw in draws])


def test_difference_is_the_mean_of_a_minus_the_mean_of_b() -> None:
    # pass@2 of 4 samples with 0, 1, 2, 4 correct: 0, 1/2, 5/6, 1.
    difference, _ = paired_bootstrap([4, 4, 4], [1, 2, 4], [0, 1, 2], 2, num_resamples=10, alpha=0.1, seed=0)
    assert difference == pytest.approx((1 / 2 + 1 / 3 + 1 / 6) / 3, abs=1e-15)


def test_one_problem_has_no_spread() -> None:
    assert paired_bootstrap([8], [6], [2], 1, num_resamples=100, alpha=0.05, seed=3) == (0.5, (0.5, 0.5))


def test_a_gap_that_all_problems_share_has_no_spread_however_unlike_they_are() -> None:
    # Unpaired, these would spread as widely as the problems do.
    a, b = [2, 3, 8, 5, 4], [1, 2, 7, 4, 3]
    difference, interval = paired_bootstrap([8] * 5, a, b, 1, num_resamples=1000, alpha=0.05, seed=3)
    assert (difference, *interval) == pytest.approx((0.125,) * 3, abs=1e-15)


@pytest.mark.parametrize("alpha", [0.05, 0.317, 0.6])
@pytest.mark.parametrize(
    "counts",
    [
        ([4, 4, 4], [4, 1, 0], [0, 1, 2], 1),
        ([4, 8, 6, 5], [4, 1, 0, 3], [1, 1, 2, 5], 2),
        ([8, 8, 8, 8, 8], [0, 8, 3, 5, 7], [1, 2, 3, 1, 0], 4),
    ],
)
def test_many_resamples_reach_the_limits_of_all_possible_ones(counts: Counts, alpha: float) -> None:
    possible = every_resample(counts)
    at = np.array([alpha / 2, 1 - alpha / 2])
    # Within 0.01 of the level: five standard deviations of a share of 60,000 resamples. Where no step of the
    # distribution lies there, both bounds are the same number.
    below = np.quantile(possible, at - 0.01, method="inverted_cdf")
    above = np.quantile(possible, at + 0.01, method="inverted_cdf")
    _, interval = paired_bootstrap(*counts, num_resamples=60_000, alpha=alpha, seed=11)
    assert np.all((below - 1e-12 <= interval) & (interval <= above + 1e-12))


@given(comparisons())
def test_the_same_counts_give_exactly_zero(counts: Counts) -> None:
    num_samples, num_correct, _, k = counts
    got = paired_bootstrap(num_samples, num_correct, num_correct, k, num_resamples=20, alpha=0.05, seed=1)
    assert got == (0.0, (0.0, 0.0))


@given(comparisons(), st.integers(0, 2**32), st.floats(0.01, 0.99))
def test_swapped_models_give_the_negated_interval(counts: Counts, seed: int, alpha: float) -> None:
    num_samples, a, b, k = counts
    forward, (low, high) = paired_bootstrap(num_samples, a, b, k, num_resamples=50, alpha=alpha, seed=seed)
    backward, (low_b, high_b) = paired_bootstrap(num_samples, b, a, k, num_resamples=50, alpha=alpha, seed=seed)
    assert backward == -forward
    assert (low_b, high_b) == pytest.approx((-high, -low), abs=1e-14)


@given(comparisons(), st.floats(0.01, 0.49))
def test_a_higher_level_gives_an_interval_around_the_lower_one(counts: Counts, alpha: float) -> None:
    _, wide = paired_bootstrap(*counts, num_resamples=50, alpha=alpha, seed=5)
    _, narrow = paired_bootstrap(*counts, num_resamples=50, alpha=2 * alpha, seed=5)
    assert -1 - 1e-12 <= wide[0] <= narrow[0] <= narrow[1] <= wide[1] <= 1 + 1e-12


def test_a_seed_decides_the_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 50), rng.integers(0, 9, 50)
    runs = [paired_bootstrap([8] * 50, a, b, 2, num_resamples=200, alpha=0.05, seed=seed) for seed in (4, 4, 5)]
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[2][0]
    assert runs[0][1] != runs[2][1]


@settings(deadline=None)
@given(st.integers(1, 200))
def test_resampling_in_pieces_changes_nothing(draws: int) -> None:
    options: dict[str, Any] = {"num_resamples": 23, "alpha": 0.2, "seed": 8}
    counts = ([8] * 5, [1, 8, 3, 4, 0], [2, 2, 2, 5, 1], 2)
    whole = paired_bootstrap(*counts, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS_PER_CHUNK", draws)
        assert paired_bootstrap(*counts, **options) == whole


def test_covers_the_true_difference_about_as_often_as_it_says() -> None:
    # Problems of random difficulty, a better than b by 0.06 on average; 8 samples, 60 problems, 400 times.
    rng = np.random.default_rng(2026)
    covered = 0
    for trial in range(400):
        chance_b = rng.uniform(0.1, 0.8, 60)
        chance_a = chance_b + rng.uniform(-0.08, 0.2, 60)
        a, b = rng.binomial(8, chance_a), rng.binomial(8, chance_b)
        _, (low, high) = paired_bootstrap([8] * 60, a, b, 1, num_resamples=500, alpha=0.1, seed=trial)
        covered += low <= 0.06 <= high
    # 90 % of 400 is 360, with a standard deviation of 6.
    assert 340 <= covered <= 380


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": [], "num_correct_a": [], "num_correct_b": []}, r"no problem \(P = 0\)"),
        ({"alpha": 0.0}, r"alpha is 0.0; use a number in \(0, 1\)"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"num_resamples": 0}, "num_resamples is 0; use at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"num_correct_b": [1]}, "model b: .* same length, got 2 and 1"),
        ({"num_correct_a": [9, 0]}, "model a: .* problem 0 has 9 of 8"),
        ({"num_correct_a": [[1, 2]]}, r"model a: .* shape \(1, 2\)"),
        ({"k": 9}, "needs at least 9 samples of every problem, problem 0 has 8"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {
        "num_samples": [8, 8], "num_correct_a": [1, 2], "num_correct_b": [3, 4],
        "k": 1, "num_resamples": 10, "alpha": 0.05, "seed": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{**given_, **changes})


def test_interval_of_a_mean_worked_by_hand() -> None:
    # Two problems, 0 and 1: a resample's mean is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], alpha=0.6) == (0.5, 0.5)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "options"),
    [([], {}), ([[1.0]], {}), ([1.0], {"alpha": 0.0}), ([1.0], {"num_resamples": 0}), ([1.0], {"seed": -1})],
)
def test_interval_of_a_mean_refuses_nonsense(values: list[float], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        bootstrap_interval(values, **options)
