import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.evaluation.significance import (
    MAX_SEEDS,
    VarianceParts,
    holm,
    seeds_needed,
    smallest_difference,
    t_quantile,
    two_sided_p,
)

SEEDS_ONLY = VarianceParts(seed=1.0, crossing=0.0, problems=0.0, problems_freedom=1e9)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # Printed tables of Student's t.
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.995, 9, 3.250), (0.95, 30, 1.697), (0.8, 5, 0.920)],
)
def test_quantiles_of_the_printed_tables(probability: float, freedom: float, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=5e-4)


def test_one_and_two_degrees_of_freedom_have_closed_forms() -> None:
    assert t_quantile(0.9, 1) == pytest.approx(math.tan(math.pi * 0.4), rel=1e-9)
    assert t_quantile(0.9, 2) == pytest.approx(0.8 * math.sqrt(2 / (4 * 0.9 * 0.1)), rel=1e-9)
    assert two_sided_p(1.0, 1) == pytest.approx(0.5, abs=1e-12)


def test_the_normal_takes_over_without_a_step() -> None:
    for t in (0.1, 1.0, 2.0, 4.0):
        assert two_sided_p(t, 200.001) == pytest.approx(two_sided_p(t, 200), abs=1e-6)


def test_many_degrees_of_freedom_are_the_normal() -> None:
    assert t_quantile(0.975, 1e7) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-6)


@settings(deadline=None)
@given(st.floats(0.55, 0.9999), st.integers(100, 100_000))
def test_quantile_and_p_are_inverses(probability: float, hundredths: int) -> None:
    freedom = hundredths / 100
    assert two_sided_p(t_quantile(probability, freedom), freedom) == pytest.approx(2 * (1 - probability), abs=1e-6)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 5), (1.0, 5), (0.9, 0.9), (0.9, math.nan)])
def test_quantile_refuses_nonsense(probability: float, freedom: float) -> None:
    with pytest.raises(ValueError, match="t_quantile needs"):
        t_quantile(probability, freedom)


def test_variance_of_seeds_falls_and_that_of_problems_stays() -> None:
    parts = VarianceParts(seed=8.0, crossing=2.0, problems=1.0, problems_freedom=63)
    assert [parts.at(n)[0] for n in (1, 2, 8)] == [1.0, 5.0, 2.0]
    assert parts.at(1)[1] == 63
    # Seeds alone: one less than their number; and more where problems share the variance.
    assert SEEDS_ONLY.at(5)[1] == pytest.approx(4, rel=1e-6)
    assert 7 < parts.at(8)[1] < 70


def test_no_variance_has_a_freedom_to_ask_for() -> None:
    assert VarianceParts(0.0, 0.0, 0.0, 63).at(5) == (0.0, 4.0)


@pytest.mark.parametrize("num_seeds", [3, 5, 12])
def test_the_smallest_visible_difference_is_found_four_times_in_five(num_seeds: int) -> None:
    # The one-sample t-test, seen 20,000 times: a standard deviation of 0.003.
    rng = np.random.default_rng(num_seeds)
    means = rng.normal(smallest_difference(SEEDS_ONLY, num_seeds), 1, (20_000, num_seeds))
    t = means.mean(1) / (means.std(1, ddof=1) / math.sqrt(num_seeds))
    found = (np.abs(t) > t_quantile(0.975, num_seeds - 1)).mean()
    # Central t quantiles are an approximation; the error is largest with few seeds.
    assert found == pytest.approx(0.8, abs=0.05)


def test_seeds_needed_for_one_and_half_a_standard_deviation() -> None:
    # Tables of the one-sample t-test, 80 % power, two-sided 5 %: 10 and 34 (exact: noncentral t).
    assert seeds_needed(1.0, SEEDS_ONLY) in (10, 11)
    assert seeds_needed(-0.5, SEEDS_ONLY) in (33, 34, 35)


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-3, 2.0), st.floats(1e-4, 1.0), st.floats(0, 0.5), st.floats(0, 0.05), st.integers(5, 200))
def test_seeds_needed_is_the_least_number(
    difference: float, seed: float, crossing: float, problems: float, freedom: int
) -> None:
    parts = VarianceParts(seed, crossing, problems, float(freedom))
    needed = seeds_needed(difference, parts)
    if needed is None:
        assert smallest_difference(parts, MAX_SEEDS) > difference
        return
    assert smallest_difference(parts, needed) <= difference
    assert needed == 2 or smallest_difference(parts, needed - 1) > difference


def test_no_seeds_show_nothing_or_what_the_problems_hide() -> None:
    assert seeds_needed(0.0, SEEDS_ONLY) is None
    assert seeds_needed(0.1, VarianceParts(0.01, 0.0, 0.01, 63)) is None


def test_holm_steps_down_until_the_first_that_fails() -> None:
    # 0.01 <= 0.05 / 4, 0.013 <= 0.05 / 3, 0.03 > 0.05 / 2: the last two fall, though 0.04 <= 0.05 / 1.
    assert holm([0.04, 0.01, 0.03, 0.013]) == [False, True, False, True]
    assert holm([]) == []
    assert holm([0.05]) == [True]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_what_bonferroni_keeps_and_no_more_than_single_tests(p_values: list[float]) -> None:
    for p, kept in zip(p_values, holm(p_values), strict=True):
        assert (p <= 0.05 / len(p_values)) <= kept <= (p <= 0.05)
