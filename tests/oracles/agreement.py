"""How two implementations are compared: values and gradients, relative to the largest value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

largest_differences: dict[tuple[str, str, str], tuple[float, float | None]] = {}
"""By (oracle, our function, precision): the largest difference of values and of gradients so far."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, divided by the largest magnitude of `theirs`; NaN and inf count as inf."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    a, b = ours.detach().double(), theirs.detach().double()
    assert b.isfinite().all(), "the oracle's result is not finite: choose other inputs"
    if not a.isfinite().all():
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def agree(
    oracle: str,
    ours: Tensor,
    theirs: Tensor,
    *,
    name: str,
    dtype: torch.dtype,
    gradient: float | None = None,
    tolerance: float | None = None,
) -> None:
    """Assert that values (and gradients, by their difference) agree, and keep the difference for the summary.

    They agree within `tolerance`, by default that of the precision.
    """
    value = difference(ours, theirs)
    key = (oracle, name, str(dtype).removeprefix("torch."))
    old_value, old_gradient = largest_differences.get(key, (0.0, None))
    slopes = [slope for slope in (old_gradient, gradient) if slope is not None]
    largest_differences[key] = (max(old_value, value), max(slopes) if slopes else None)
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    assert value <= allowed, f"{name} differs from {oracle} by {value:.2e}"
    assert gradient is None or gradient <= allowed, f"gradient of {name} differs from {oracle} by {gradient:.2e}"


def agree_with_gradient(
    oracle: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    name: str,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> None:
    """Assert that two functions of `inputs` agree, and their gradients in every input.

    A result of many numbers is weighted with fixed numbers before backward, so that each of them matters.
    `dtype` is the precision to expect where it is not the inputs'.
    """
    results, slopes = [], []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = function(*leaves)
        weights = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).view_as(result)
        found = torch.autograd.grad((result.double() * weights).sum(), leaves)
        results.append(result)
        slopes.append(found)
    gradient = max(difference(a, b) for a, b in zip(*slopes, strict=True))
    agree(oracle, *results, name=name, dtype=dtype or inputs[0].dtype, gradient=gradient, tolerance=tolerance)
