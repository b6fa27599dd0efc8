"""Liger-Kernel's fused linear JSD, its chunked PyTorch form, which runs on the CPU: head and loss in one.

It works on a whole vocabulary. Given only the head's rows of a support it is the divergence renormalised
there, so position by position it is an oracle for `support_logits` with any of the top-K losses.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_ray.objective import gated_token_mean, jsd_topk, lsm_loss, support_logits
from tests.oracles.agreement import agree_with_gradient
from tests.oracles.packages import oracle

liger = oracle("liger_kernel.chunked_loss.jsd_loss")

NAME = "liger chunked_loss LigerFusedLinearJSDLoss"
POSITIONS, HIDDEN, VOCABULARY = 12, 16, 300
IGNORED = -100


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fused_jsd(beta: float, chunk_size: int) -> Callable[..., Tensor]:
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=chunk_size
    )

    def call(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        # Its teacher's inputs must not ask for a gradient, and its sum is float32 whatever its inputs are.
        result: Tensor = loss(hidden, head, teacher_hidden, teacher_head, labels)
        return result

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_masked_mean_over_a_whole_vocabulary(dtype: torch.dtype, beta: float) -> None:
    hidden, head = draw(POSITIONS, HIDDEN, seed=1).to(dtype), (0.5 * draw(VOCABULARY, HIDDEN, seed=2)).to(dtype)
    other, other_head = draw(POSITIONS, 8, seed=3).to(dtype), (0.5 * draw(VOCABULARY, 8, seed=4)).to(dtype)
    mask = torch.arange(POSITIONS) % 4 != 1
    labels = torch.where(mask, 0, IGNORED)
    every_id = torch.arange(VOCABULARY).expand(POSITIONS, VOCABULARY)
    teacher = (other @ other_head.T).log_softmax(-1)

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        logits = support_logits(hidden, head, every_id)
        loss = lsm_loss(logits, teacher) if beta == 1 else jsd_topk(logits, teacher, beta=beta)
        return gated_token_mean(loss, torch.ones_like(loss), mask)

    agree_with_gradient(
        NAME,
        ours,
        lambda hidden, head: fused_jsd(beta, 4)(hidden, head, other, other_head, labels),
        (hidden, head),
        name="lsm_loss K=V" if beta == 1 else f"jsd_topk K=V beta={beta}",
        dtype=torch.float32,
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_each_position_on_its_own_support(beta: float) -> None:
    hidden, head = draw(POSITIONS, HIDDEN, seed=5), 0.5 * draw(VOCABULARY, HIDDEN, seed=6)
    other, other_head = draw(POSITIONS, 8, seed=7), 0.5 * draw(VOCABULARY, 8, seed=8)
    teacher, ids = (other @ other_head.T).log_softmax(-1).topk(6, dim=-1)
    label = torch.zeros(1, dtype=torch.int64)

    def theirs(hidden: Tensor, head: Tensor) -> Tensor:
        fused = fused_jsd(beta, 1)
        rows = range(POSITIONS)
        return torch.stack(
            [fused(hidden[n : n + 1], head[ids[n]], other[n : n + 1], other_head[ids[n]], label) for n in rows]
        )

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        logits = support_logits(hidden, head, ids)
        return lsm_loss(logits, teacher) if beta == 1 else jsd_topk(logits, teacher, beta=beta)

    agree_with_gradient(
        NAME,
        ours,
        theirs,
        (hidden, head),
        name="support_logits, lsm_loss" if beta == 1 else f"support_logits, jsd {beta}",
        dtype=torch.float32,
    )
