"""How a teacher's log-probs are rounded for the wire."""

from __future__ import annotations

import numpy as np

from opd_ray.config.choices import LogprobDtype
from opd_ray.teacher.worker import rounded


def test_halves_have_the_bits_that_numpy_gives() -> None:
    rng = np.random.default_rng(0)
    # Zeros, subnormals of float16, ties, the largest finite half and what lies above it.
    special = [0.0, -0.0, -6e-8, -2.9e-8, -1e-6, -1 - 2**-11, -1 - 3 * 2**-11, -65504, -65519, -65520, -1e9, -np.inf]
    arrays = [-50 * rng.random((100, 7), dtype=np.float32), np.array(special, np.float32)]
    for found, array in zip(rounded(arrays, LogprobDtype.float16), arrays, strict=True):
        with np.errstate(over="ignore"):
            expected = array.astype(np.float16)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    assert np.isnan(rounded([np.array([np.nan], np.float32)], LogprobDtype.float16)[0]).all()


def test_float32_is_handed_on_as_it_is() -> None:
    array = np.array([-1.0, -0.1], np.float32)
    (found,) = rounded([array], LogprobDtype.float32)
    assert found.dtype == np.float32
    assert np.shares_memory(found, array)
