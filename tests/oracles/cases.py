"""Inputs for the comparisons: random student and teacher logits, sharp and flat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY = 97
POSITIONS = 24


@dataclass(frozen=True)
class Pair:
    """Logits `[N,V]` of a student and a teacher."""

    student: Tensor
    teacher: Tensor

    def teacher_support(self, size: int) -> tuple[Tensor, Tensor]:
        """The ids `[N,K]` of the teacher's top-K tokens and its log-probs there."""
        top = self.teacher.log_softmax(-1).topk(size, dim=-1)
        return top.indices, top.values


def draw_pair(seed: int, dtype: torch.dtype, scale: float = 2.0, vocabulary: int = VOCABULARY) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(POSITIONS, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    # As in distillation, the two are more alike than not.
    return Pair((0.5 * student + teacher).to(dtype), teacher.to(dtype))


@dataclass(frozen=True)
class Rollout:
    """Log-probs `[B,T]` of sampled tokens and the mask of a batch with rows of unlike length."""

    current: Tensor
    behavior: Tensor
    teacher: Tensor
    mask: Tensor


def draw_rollout(seed: int, dtype: torch.dtype, drift: float = 0.4) -> Rollout:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(5, 16, generator=generator, dtype=torch.float64)

    behavior = -normal().abs() - 0.1
    lengths = torch.tensor([16, 9, 1, 12, 16])
    mask = torch.arange(16) < lengths.unsqueeze(1)
    mask[0, 3:6] = False
    return Rollout(
        (behavior + drift * normal()).to(dtype),
        behavior.to(dtype),
        (behavior + normal()).to(dtype),
        mask,
    )
