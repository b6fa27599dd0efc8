"""SciPy's Student t and its power by the noncentral t."""

import numpy as np
import pytest

from opd_ray.evaluation.significance import VarianceParts, smallest_difference, t_quantile, two_sided_p
from tests.oracles.packages import oracle

stats = oracle("scipy.stats")


@pytest.mark.parametrize("freedom", [1.0, 1.5, 2.0, 4.37, 9.0, 63.0, 199.0, 201.0, 5000.0])
def test_quantiles_and_p(freedom: float) -> None:
    for probability in (0.6, 0.8, 0.95, 0.975, 0.9995):
        assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-5)
    for t in (0.0, 0.01, 0.5, 1.0, 2.0, 5.0, 30.0):
        assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-6)


@pytest.mark.parametrize("num_seeds", [3, 4, 5, 8, 20, 100])
def test_the_smallest_visible_difference_has_about_the_power_that_it_says(num_seeds: int) -> None:
    parts = VarianceParts(seed=1.0, crossing=0.0, problems=0.0, problems_freedom=1e9)
    shift = smallest_difference(parts, num_seeds) * np.sqrt(num_seeds)
    limit = stats.t.ppf(0.975, num_seeds - 1)
    power = stats.nct.sf(limit, num_seeds - 1, shift) + stats.nct.cdf(-limit, num_seeds - 1, shift)
    assert power == pytest.approx(0.8, abs=0.04 if num_seeds < 6 else 0.01)
