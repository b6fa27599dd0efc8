"""TRL's distillation losses. beta (alpha in SDFT) is the teacher's weight in the mixture, as it is here."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ray.objective import forward_kl_topk, jsd_topk, lsm_loss, tail_kl
from tests.oracles.agreement import agree_with_gradient
from tests.oracles.cases import VOCABULARY, draw_pair
from tests.oracles.packages import oracle

gkd = oracle("trl.experimental.gkd.gkd_trainer")
sdft = oracle("trl.experimental.sdft.loss_utils")
server = oracle("trl.experimental.server_distillation.server_distillation_trainer")

GKD = "trl gkd GKDTrainer.generalized_jsd_loss"
SDFT = "trl sdft compute_topk_self_distillation_loss"
SERVER = "trl server_distillation _add_tail_bucket, _jsd_divergence"

# Small losses only in float64: with log-probs of several nats float32 has no six digits left for them, and the
# oracles, which sum terms of both signs, lose more.
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
inputs = pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 2.0), (torch.float64, 0.5), (torch.float64, 2.0), (torch.float64, 5.0)]
)
supports = pytest.mark.parametrize("size", [2, 8, VOCABULARY])


def gkd_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Per position, over whatever tokens the last dimension holds."""
    entries: Tensor = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none")
    return entries.sum(-1)


@inputs
@supports
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_jsd_on_the_teachers_support(dtype: torch.dtype, scale: float, size: int, beta: float) -> None:
    pair = draw_pair(1, dtype, scale)
    ids, teacher = pair.teacher_support(size)
    agree_with_gradient(
        GKD,
        lambda student: jsd_topk(student.gather(-1, ids), teacher, beta=beta),
        lambda student: gkd_jsd(student.gather(-1, ids), teacher, beta),
        (pair.student,),
        name=f"jsd_topk beta={beta}",
    )


@inputs
@supports
def test_lsm_is_the_reverse_kl_and_forward_the_forward_one(dtype: torch.dtype, scale: float, size: int) -> None:
    pair = draw_pair(2, dtype, scale)
    ids, teacher = pair.teacher_support(size)
    agree_with_gradient(
        GKD,
        lambda student: lsm_loss(student.gather(-1, ids), teacher),
        lambda student: gkd_jsd(student.gather(-1, ids), teacher, 1),
        (pair.student,),
        name="lsm_loss",
    )
    agree_with_gradient(
        GKD,
        lambda student: forward_kl_topk(student.gather(-1, ids), teacher, renormalize=True),
        lambda student: gkd_jsd(student.gather(-1, ids), teacher, 0),
        (pair.student,),
        name="forward_kl_topk renormalised",
    )


@precisions
def test_the_raw_forward_kl_of_the_whole_vocabulary(dtype: torch.dtype) -> None:
    pair = draw_pair(3, dtype)
    agree_with_gradient(
        GKD,
        lambda student: forward_kl_topk(student.log_softmax(-1), pair.teacher.log_softmax(-1), renormalize=False),
        lambda student: gkd_jsd(student, pair.teacher, 0),
        (pair.student,),
        name="forward_kl_topk K=V",
    )


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_nearly_equal_models(beta: float) -> None:
    pair = draw_pair(4, torch.float64)
    student = pair.teacher + 0.1 * pair.student
    ids, teacher = pair.teacher_support(8)
    agree_with_gradient(
        GKD,
        lambda x: jsd_topk(x.gather(-1, ids), teacher, beta=beta),
        lambda x: gkd_jsd(x.gather(-1, ids), teacher, beta),
        (student,),
        name=f"jsd_topk beta={beta}",
    )


def sdft_loss(student: Tensor, teacher: Tensor, size: int, alpha: float, tail: bool) -> Tensor:
    options: dict[str, Any] = {"distillation_topk": size, "distillation_alpha": alpha, "distillation_add_tail": tail}
    loss: Tensor = sdft.compute_topk_self_distillation_loss(student, teacher, **options)
    return loss


@inputs
@supports
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_losses_on_the_students_own_support(dtype: torch.dtype, scale: float, size: int, alpha: float) -> None:
    pair = draw_pair(5, dtype, scale)
    ids = pair.student.topk(size, dim=-1).indices
    teacher = pair.teacher.log_softmax(-1).gather(-1, ids)

    def ours(student: Tensor) -> Tensor:
        logits = student.gather(-1, ids)
        if alpha == 0:
            return forward_kl_topk(logits, teacher, renormalize=True)
        return lsm_loss(logits, teacher) if alpha == 1 else jsd_topk(logits, teacher, beta=alpha)

    name = {0.0: "forward_kl_topk renormalised", 1.0: "lsm_loss"}.get(alpha, f"jsd_topk beta={alpha}")
    agree_with_gradient(
        SDFT, ours, lambda student: sdft_loss(student, pair.teacher, size, alpha, False), (pair.student,), name=name
    )


@inputs
@pytest.mark.parametrize("size", [1, 8, 20])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_tail_on_the_students_own_support(dtype: torch.dtype, scale: float, size: int, direction: Any) -> None:
    pair = draw_pair(6, dtype, scale)
    ids = pair.student.topk(size, dim=-1).indices
    teacher = pair.teacher.log_softmax(-1).gather(-1, ids)
    agree_with_gradient(
        SDFT + " with tail",
        lambda student: tail_kl(student.log_softmax(-1).gather(-1, ids), teacher, direction=direction),
        lambda student: sdft_loss(student, pair.teacher, size, float(direction == "reverse"), True),
        (pair.student,),
        name=f"tail_kl {direction}",
    )


def server_tail_kl(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """As the trainer calls it: entries that the teacher did not send are -inf on both sides, and masked."""
    sent = teacher > -math.inf
    student, inside = server._add_tail_bucket(student.masked_fill(~sent, -math.inf), sent)
    teacher, _ = server._add_tail_bucket(teacher, sent)
    entries: Tensor = server._jsd_divergence(student, teacher, int(direction == "reverse"), inside)
    return entries.sum(-1)


@precisions
@pytest.mark.parametrize("size", [1, 8, 20])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_tail_on_the_teachers_support(dtype: torch.dtype, size: int, direction: Any) -> None:
    pair = draw_pair(7, dtype)
    ids, teacher = pair.teacher_support(size)
    agree_with_gradient(
        SERVER,
        lambda student: tail_kl(student.log_softmax(-1).gather(-1, ids), teacher, direction=direction),
        lambda student: server_tail_kl(student.log_softmax(-1).gather(-1, ids), teacher, direction),
        (pair.student,),
        name=f"tail_kl {direction}",
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_entries_that_the_teacher_did_not_send_join_the_tail(direction: Any) -> None:
    pair = draw_pair(8, torch.float64)
    ids, teacher = pair.teacher_support(8)
    teacher = teacher.clone()
    teacher[::2, 5:] = -math.inf
    # In log-probs: the oracle's -inf entries have no gradient of their own to come back through a softmax.
    student = pair.student.log_softmax(-1).gather(-1, ids)
    agree_with_gradient(
        SERVER,
        lambda x: tail_kl(x, teacher, direction=direction),
        lambda x: server_tail_kl(x, teacher, direction),
        (student,),
        name=f"tail_kl {direction}, -inf",
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_tail_of_a_whole_vocabulary_changes_nothing(direction: Any) -> None:
    pair = draw_pair(9, torch.float64)
    agree_with_gradient(
        GKD,
        lambda student: tail_kl(student.log_softmax(-1), pair.teacher.log_softmax(-1), direction=direction),
        lambda student: gkd_jsd(student, pair.teacher, int(direction == "reverse")),
        (pair.student,),
        name=f"tail_kl {direction} K=V",
    )
