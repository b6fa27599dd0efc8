"""The support is the sampling student's K most probable ids."""

from torch import Tensor

SCORED = "student_topk"


def select(ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Keep all of them."""
    return teacher_logprobs
