"""Checks of an objective's tensors: shapes that fit, and one rule for precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 if any tensor is, else float32 (bf16 and fp16 are widened)."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming each tensor and its shape, unless all shapes are equal."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; give tensors of one shape")


def require_rank(name: str, tensor: Tensor, rank: int, letters: str) -> None:
    """Raise ValueError unless `tensor` has `rank` dimensions; `letters` is the shape to name."""
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {letters}; reshape it to {letters}")


def require_ids_within(name: str, ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless all `ids` lie in ``0 .. vocabulary - 1``."""
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name} range from {low} to {high}, but the head has {vocabulary} rows (0 to {vocabulary - 1}); "
            "score with a teacher that shares the student's vocabulary, and replace padding ids"
        )


def require_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError unless `name` is one of `known`."""
    names = [str(entry) for entry in known]
    if name not in names:
        raise ValueError(f"{what} is {name!r}; use one of {', '.join(names)}")
