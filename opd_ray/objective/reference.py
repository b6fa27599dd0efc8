"""On-policy distillation with the blockwise policy-drift gate on one page: plain torch, full logits, one CPU process.

The gate of arXiv 2606.24084 on the local support matching (LSM) of arXiv 2603.25562, to read and to test against. It
imports nothing else of opd_ray. pi is the student, q the teacher, pi_old the student that sampled; a model's output has
``.logits``. Shape letters: B sequences, L prompt and response tokens, T response tokens, K support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Prompts = Sequence[Tensor]  # int64 [P] each


@dataclass(frozen=True)
class Recipe:
    """Settings; the defaults are the paper's."""

    max_response_tokens: int
    eos_id: int
    lr: float = 2e-6
    top_k: int = 32  # K, entries of the support
    reuse: int = 2  # optimizer steps per batch; the gate acts from the second on
    block_size: int = 64  # response tokens per block
    tau: float = 1.0  # sharpness of the gate, 1/nats
    grad_clip: float = 1.0  # largest global gradient norm


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. The response of row b starts at ``tokens[b, starts[b]]``; padding is on the right."""

    tokens: Tensor  # [B, L] int64
    starts: Tensor  # [B] int64, prompt lengths
    mask: Tensor  # [B, T] bool, true up to and including the end-of-sequence token
    behavior_logprobs: Tensor  # [B, T] log pi_old(y_t | c_t), nats

    @property
    def responses(self) -> Tensor:
        """The response tokens [B, T]."""
        return self.tokens.gather(1, self.starts[:, None] + torch.arange(self.mask.shape[1]))


@dataclass(frozen=True)
class Batch:
    """A rollout with the teacher's K most probable ids at each response position."""

    rollout: Rollout
    support: Tensor  # [B, T, K] int64
    teacher_logprobs: Tensor  # [B, T, K] log q(v | c_t), nats


@torch.no_grad()
def sample(student: nn.Module, prompts: Prompts, recipe: Recipe) -> Rollout:
    """Sample y ~ pi_old(. | x) at temperature 1, one token per forward pass."""
    rows, starts = torch.arange(len(prompts)), torch.tensor([len(prompt) for prompt in prompts])
    longest, shape = int(starts.max()), (len(prompts), recipe.max_response_tokens)
    tokens = nn.functional.pad(nn.utils.rnn.pad_sequence(list(prompts), batch_first=True), (0, shape[1]))
    logprobs, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    is_running = torch.ones(shape[0], dtype=torch.bool)
    for t in range(shape[1]):
        log_pi = student(tokens[:, : longest + t]).logits[rows, starts + t - 1].float().log_softmax(-1)
        chosen = log_pi.exp().multinomial(1).squeeze(1)
        tokens[rows, starts + t], logprobs[:, t], mask[:, t] = chosen, log_pi[rows, chosen], is_running
        is_running = is_running & (chosen != recipe.eos_id)
    return Rollout(tokens, starts, mask, logprobs)


@torch.no_grad()
def score(teacher: nn.Module, rollout: Rollout, recipe: Recipe) -> Batch:
    """Score the sampled prefixes: S(c_t) = TopK_q(c_t) (arXiv 2603.25562, equation 6)."""
    top = response_logits(teacher, rollout).log_softmax(-1).topk(recipe.top_k, dim=-1)
    return Batch(rollout, top.indices, top.values)


def response_logits(model: nn.Module, rollout: Rollout) -> Tensor:
    """Logits that predict each response token, [B, T, V] float32: those at the token before it."""
    before = rollout.starts[:, None] - 1 + torch.arange(rollout.mask.shape[1])
    logits: Tensor = model(rollout.tokens).logits.float()
    return logits[torch.arange(len(before))[:, None], before]


def token_drift(logits: Tensor, rollout: Rollout) -> Tensor:
    """Drift d_t = log pi(y_t | c_t) - log pi_old(y_t | c_t), [B, T], detached; 0 outside the mask."""
    current = logits.detach().log_softmax(-1).gather(2, rollout.responses[:, :, None]).squeeze(2)
    return torch.where(rollout.mask, current - rollout.behavior_logprobs, 0.0)


def gate_weights(drift: Tensor, mask: Tensor, segments: Tensor, tau: float) -> Tensor:
    """Weight of every token [B, T] (arXiv 2606.24084, equation 1); `segments` [B, T] int64 counts from 0.

    s_b = signed mean of d_t over the valid tokens of segment b; g_b = exp(-tau |s_b|), scaled to mean 1 over the step.
    """
    shape = (len(drift), int(segments.max()) + 1)
    totals = drift.new_zeros(shape).scatter_add(1, segments, drift)
    counts = drift.new_zeros(shape).scatter_add(1, segments, mask.to(drift))
    gate = torch.exp(-tau * (totals / counts.clamp(min=1)).abs()).gather(1, segments) * mask
    return gate * mask.sum() / gate.sum()


def block_weights(logits: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """Gate weights [B, T] of fixed blocks, counted from the first response token."""
    mask = batch.rollout.mask
    blocks = torch.arange(mask.shape[1]).expand(mask.shape) // recipe.block_size
    return gate_weights(token_drift(logits, batch.rollout), mask, blocks, recipe.tau)


def lsm_losses(logits: Tensor, batch: Batch) -> Tensor:
    """LSM, [B, T] nats: sum over v in S of p'_v (log p'_v - log q'_v); p' and q' are pi and q renormalised on S.

    arXiv 2603.25562, equations 7 and 8 (its inner sum).
    """
    log_p = logits.gather(2, batch.support).log_softmax(-1)
    log_q = batch.teacher_logprobs.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def step(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    losses_of: Callable[[Tensor, Batch], Tensor] = lsm_losses,
    weights_of: Callable[[Tensor, Batch, Recipe], Tensor] = block_weights,
) -> tuple[float, float]:
    """Take one optimizer step on L = sum m_t w_t l_t / sum m_t; return L and its gradient's norm before clipping.

    L is the gated loss of arXiv 2606.24084, section 3. Both functions get the logits [B, T, V] and return [B, T].
    """
    logits, mask = response_logits(student, batch.rollout), batch.rollout.mask
    weights = weights_of(logits, batch, recipe).detach()
    loss = torch.where(mask, weights * losses_of(logits, batch), 0.0).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(student.parameters(), recipe.grad_clip)
    optimizer.step()
    return float(loss.detach()), float(norm)


def train(student: nn.Module, teacher: nn.Module, batches: Iterable[Prompts], recipe: Recipe) -> Iterator[float]:
    """Distil `teacher` into `student` on its own samples, batch by batch of prompts; yield the loss of every step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.lr)
    for prompts in batches:
        batch = score(teacher, sample(student, prompts, recipe), recipe)
        for _ in range(recipe.reuse):
            yield step(student, optimizer, batch, recipe)[0]
