"""What `bench_lm_head.py` measures: each variant computes one loss and its gradients from the same tensors.

`full_logits` is leaner than the code it stands for (revisiting_opd): no entropy, and no zero-weighted policy gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from opd_ray.objective import lsm_loss, support_logits, token_logprobs
from opd_ray.objective.lm_head_tiles import logit_tiles

BLOCK, SAMPLED = 64, 16  # tokens in a gate's block, and how many of them a sampled drift measures
CHUNK = 1024  # positions that a chunked variant computes at once


@dataclass
class Inputs:
    """Tensors of one case; `hidden [T,H]` and `head [V,H]` are leaves that take gradients."""

    hidden: Tensor
    head: Tensor
    support_ids: Tensor  # [T, K]
    teacher_logprobs: Tensor  # [T, K]
    token_ids: Tensor  # [T]
    behavior_logprobs: Tensor  # [T]
    sampled_at: Tensor  # [T * SAMPLED / BLOCK], one position of each stratum


@dataclass
class Result:
    """The loss, and the mean drift of each block where the variant knows it."""

    loss: Tensor
    block_drift: Tensor | None = None


def gated(losses: Tensor, drift: Tensor) -> Result:
    """Weight the losses [T] by exp(-|mean drift|) of their block, mean 1; `drift` [T] or, sampled, shorter."""
    size = BLOCK * drift.shape[0] // losses.shape[0]
    means = drift.double().view(-1, size).mean(dim=1)
    gates = torch.exp(-means.abs()).repeat_interleave(BLOCK)
    return Result((losses * (gates / gates.mean()).to(losses.dtype)).mean(), means)


def policy_gradient(x: Inputs, logprobs: Tensor) -> Result:
    """The sampled-token loss: importance ratio times an advantage that is a constant."""
    advantage = x.teacher_logprobs[:, 0] - x.behavior_logprobs
    return Result(-(torch.exp(logprobs.float() - x.behavior_logprobs) * advantage).mean())


def full_logits(x: Inputs) -> Result:
    """Logits [T,V] in the training dtype; log-probs of the sampled token without gradient; KL on gathered logits."""
    logits = x.hidden @ x.head.T
    with torch.no_grad():
        current = -cross_entropy(logits, x.token_ids, reduction="none")
    losses = lsm_loss(logits.gather(1, x.support_ids), x.teacher_logprobs)
    return gated(losses, current.float() - x.behavior_logprobs)


def full_ungated(x: Inputs) -> Result:
    """As `full_logits`, without log-probs and gate."""
    logits = x.hidden @ x.head.T
    return Result(lsm_loss(logits.gather(1, x.support_ids), x.teacher_logprobs).mean())


def full_sampled_token(x: Inputs) -> Result:
    """Sampled-token loss over a full log-softmax with gradient."""
    logits = x.hidden @ x.head.T
    return policy_gradient(x, -cross_entropy(logits, x.token_ids, reduction="none"))


def chunked_recompute(x: Inputs) -> Result:
    """Chunks of positions, each [CHUNK,V] wide and computed again in backward, as AsyncOPD and TRL do."""

    def part(hidden: Tensor, head: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        logprobs = (hidden @ head.T).log_softmax(dim=-1, dtype=torch.float32)
        current = logprobs.detach().gather(1, x.token_ids[where].unsqueeze(1)).squeeze(1)
        return lsm_loss(logprobs.gather(1, x.support_ids[where]), x.teacher_logprobs[where]), current

    parts = []
    for start in range(0, x.hidden.shape[0], CHUNK):
        where = slice(start, start + CHUNK)
        parts.append(checkpoint(part, x.hidden[where], x.head, where, use_reentrant=False))
    losses, current = (torch.cat(list(pieces)) for pieces in zip(*parts, strict=True))
    return gated(losses, current - x.behavior_logprobs)


def liger(x: Inputs) -> Result:
    """Liger's chunked JSD over the full vocabulary; needs the teacher's head too (here the student's own, frozen).

    Another loss than ours: it is here for its time and memory alone. Its teacher product is included.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=x.hidden.is_cuda)
    states = x.hidden.detach().roll(1, 0)
    return Result(loss(x.hidden, x.head, states, x.head.detach(), x.token_ids))


def ours_ungated(x: Inputs) -> Result:
    """The support's logits alone."""
    return Result(lsm_loss(support_logits(x.hidden, x.head, x.support_ids), x.teacher_logprobs).mean())


def ours_ungated_triton(x: Inputs) -> Result:
    """As `ours_ungated`, gathered by the Triton kernel."""
    logits = support_logits(x.hidden, x.head, x.support_ids, kernel="triton")
    return Result(lsm_loss(logits, x.teacher_logprobs).mean())


def ours_gated(x: Inputs) -> Result:
    """The support's logits, and the log-sum-exp of every position without gradient."""
    with torch.no_grad():
        current = token_logprobs(x.hidden, x.head, x.token_ids, chunk_size=CHUNK)
    losses = lsm_loss(support_logits(x.hidden, x.head, x.support_ids), x.teacher_logprobs)
    return gated(losses, current - x.behavior_logprobs)


def ours_gated_sampled_drift(x: Inputs) -> Result:
    """As `ours_gated`, the drift measured on SAMPLED of every BLOCK tokens."""
    at = x.sampled_at
    with torch.no_grad():
        current = token_logprobs(x.hidden[at], x.head, x.token_ids[at], chunk_size=CHUNK)
    losses = lsm_loss(support_logits(x.hidden, x.head, x.support_ids), x.teacher_logprobs)
    return gated(losses, current - x.behavior_logprobs[at])


def ours_sampled_token(x: Inputs) -> Result:
    """Sampled-token loss over the tiled log-sum-exp with gradient."""
    return policy_gradient(x, token_logprobs(x.hidden, x.head, x.token_ids, chunk_size=CHUNK))


def bare_product(x: Inputs) -> Result:
    """The product that any log-sum-exp needs, tile by tile in the dtype that ours uses, and nothing else."""
    with torch.no_grad():
        for _ in logit_tiles(x.hidden, x.head, CHUNK):
            pass
    return Result(x.hidden.new_zeros(()))


VARIANTS: dict[str, Callable[[Inputs], Result]] = {
    "full_logits": full_logits,
    "full_ungated": full_ungated,
    "full_sampled_token": full_sampled_token,
    "chunked_recompute": chunked_recompute,
    "liger": liger,
    "ours_gated": ours_gated,
    "ours_gated_sampled_drift": ours_gated_sampled_drift,
    "ours_ungated": ours_ungated,
    "ours_ungated_triton": ours_ungated_triton,
    "ours_sampled_token": ours_sampled_token,
    "bare_product": bare_product,
}
# Pairs whose loss and gradients must agree.
EQUALS = {
    "ours_gated": full_logits,
    "ours_ungated": full_ungated,
    "ours_ungated_triton": full_ungated,
    "ours_sampled_token": full_sampled_token,
    "chunked_recompute": full_logits,
}


def unavailable(variant: str, device: str) -> str | None:
    """Return why a variant cannot run here, or None."""
    if variant == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    if variant.endswith("_triton") and not device.startswith("cuda"):
        return "needs CUDA"
    return None


def bytes_needed(variant: str, length: int, hidden: int, vocab: int, itemsize: int) -> int:
    """Estimate of the most that a step holds beside its inputs, on the safe side."""
    head = hidden * vocab * itemsize
    rows = {"chunked_recompute": CHUNK, "liger": CHUNK}.get(variant, length if variant.startswith("full") else 0)
    size = itemsize if variant.startswith("full") else 4
    return 3 * rows * vocab * size + 2 * head + (1 << 28)


def run(variant: Callable[[Inputs], Result], x: Inputs) -> Result:
    """One forward and backward pass; gradients are left in ``x.hidden.grad`` and ``x.head.grad``."""
    x.hidden.grad = x.head.grad = None
    result = variant(x)
    if result.loss.requires_grad:
        result.loss.backward()  # type: ignore[no-untyped-call]
    return result


def relative_errors(variant: str, x: Inputs) -> dict[str, float]:
    """Largest difference to the full-logits loss and gradients, relative to their largest entry."""
    values: list[list[Any]] = []
    for function in (VARIANTS[variant], EQUALS[variant]):
        result = run(function, x)
        values.append([result.loss.detach(), x.hidden.grad, x.head.grad])
    names = ("loss", "hidden_gradient", "head_gradient")
    return {
        name: float((got - wanted).abs().max() / wanted.abs().max())
        for name, got, wanted in zip(names, *values, strict=True)
    }
