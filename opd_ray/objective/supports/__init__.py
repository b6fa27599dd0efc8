"""The K tokens that student and teacher are compared on: supports by name, the sampled token, and coverage.

The ids of a support are distinct; a repeated one would count twice everywhere.

A module of this folder is a support by the name of `teacher.support`. It declares as `SCORED` whose K most probable ids
the teacher scores, ``"teacher_topk"`` or ``"student_topk"``, and defines ``select(ids, teacher_logprobs)``, which gets
these ids `[N,K]` and the teacher's log-probs there `[N,K]`, in nats, and returns the log-probs with -inf where an id is
not in the support.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype, require_rank, require_same_shape


def with_sampled_token(
    support_ids: Tensor, teacher_topk_logprobs: Tensor, token_ids: Tensor, teacher_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """Append the sampled token to each position's support, as its last entry.

    Where the token is in the support already, the appended entry's teacher log-prob is -inf, which takes that
    entry out of the support (`lsm_loss`), so that no token counts twice. An entry of the list whose own
    log-prob is -inf is not in the support.

    Source: arXiv 2603.25562, table 4, variants V2 and V3.

    Args:
        support_ids: `[N,K]` integers.
        teacher_topk_logprobs: `[N,K]`, the teacher's log-probs there, in nats.
        token_ids: `[N]` integers, the sampled tokens.
        teacher_logprobs: `[N]`, the teacher's log-probs of them.

    Returns:
        Ids `[N,K+1]`, dtype of `support_ids`, and teacher log-probs `[N,K+1]`, the wider of the two dtypes.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_rank("support_ids", support_ids, 2, "[N,K]")
    require_same_shape(support_ids=support_ids, teacher_topk_logprobs=teacher_topk_logprobs)
    positions = support_ids.new_empty(support_ids.shape[0])
    require_same_shape(token_ids=token_ids, teacher_logprobs=teacher_logprobs, positions=positions)
    sampled = token_ids.unsqueeze(1)
    inside = ((support_ids == sampled) & (teacher_topk_logprobs != -math.inf)).any(dim=1)
    added = torch.where(inside, -math.inf, teacher_logprobs).unsqueeze(1)
    dtype = torch.promote_types(teacher_topk_logprobs.dtype, teacher_logprobs.dtype)
    ids = torch.cat([support_ids, sampled.to(support_ids.dtype)], dim=1)
    return ids, torch.cat([teacher_topk_logprobs.to(dtype), added.to(dtype)], dim=1)


def overlap_ratio(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """Return the share of the student's top-K ids that are among the teacher's: |S_p and S_q| / K.

    Source: the overlap ratio of arXiv 2604.13016.

    Args:
        student_topk_ids: `[N,K]` integers, distinct in each row.
        teacher_topk_ids: `[N,K]` integers, distinct in each row.

    Returns:
        `[N]` float32 in [0, 1].

    Raises:
        ValueError: shapes differ or are not `[N,K]`, or K < 1.
    """
    require_rank("student_topk_ids", student_topk_ids, 2, "[N,K]")
    require_same_shape(student_topk_ids=student_topk_ids, teacher_topk_ids=teacher_topk_ids)
    size = teacher_topk_ids.shape[1]
    if size < 1:
        raise ValueError("the lists have K = 0 ids; use K >= 1")
    ordered = teacher_topk_ids.long().sort(dim=1).values
    student = student_topk_ids.long()
    place = torch.searchsorted(ordered, student.contiguous()).clamp(max=size - 1)
    return (ordered.gather(1, place) == student).float().mean(dim=1)


def support_mass(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor) -> Tensor:
    """Return the student's probability on the support: what lies outside it, a loss on the support cannot see.

    The sum of the student's probabilities over the entries whose teacher log-prob is not -inf. Repeated ids
    are added up as often as they stand there: callers give distinct ones (`with_sampled_token` does).

    Args:
        student_topk_logprobs: `[N,K]` (`[...,K]`), over the whole vocabulary, in nats.
        teacher_topk_logprobs: same shape.

    Returns:
        `[N]`, detached, float32 (float64 if an input is float64); NaN where an input is NaN.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(student_topk_logprobs=student_topk_logprobs, teacher_topk_logprobs=teacher_topk_logprobs)
    dtype = compute_dtype(student_topk_logprobs, teacher_topk_logprobs)
    inside = teacher_topk_logprobs != -math.inf
    mass = torch.where(inside, student_topk_logprobs.detach().double().exp(), 0.0).sum(dim=-1)
    broken = student_topk_logprobs.isnan().any(dim=-1) | teacher_topk_logprobs.isnan().any(dim=-1)
    return torch.where(broken, math.nan, mass).to(dtype)
