"""Supervised training of the tiny models on worked solutions; needs torch and transformers."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_ray.tiny.task import MAX_STEPS, MIN_STEPS, TinyProblem, draw_problem
from opd_ray.tiny.tokenizer import EOS_ID, PAD_ID

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Context length of the tiny models, in tokens; a problem with its solution needs at most about 300."""

_MUON_SCALE = 3.0  # Muon's updates have unit spectral norm, so its learning rate is larger than AdamW's

IGNORED = -100  # label of the positions without a loss, by the convention of cross_entropy

# Fewest and most steps of a batch's problems. Short ones teach the look-up fast; the task's own band is drawn
# most often.
_LENGTH_BANDS = ((1, 4), (5, 8), (9, 12), (12, 16), (MIN_STEPS, MAX_STEPS), (MIN_STEPS, MAX_STEPS))


@dataclass(frozen=True)
class PretrainPlan:
    """How long and how fast to train."""

    num_steps: int
    """Optimizer steps."""
    learning_rate: float
    """Peak of the schedule: linear warm-up, then cosine decay to a twentieth."""
    warmup_steps: int
    """Optimizer steps of the warm-up."""
    tokens_per_batch: int
    """Padded tokens of a batch; short problems come in larger batches."""


def build_model(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """Build a randomly initialised Qwen3 of about 0.45 M parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    plan: PretrainPlan,
    seed: int,
    after_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place on freshly drawn problems; call `after_step(step, loss)`, with steps from 1."""
    rng = random.Random(f"pretrain-{seed}")
    optimizers = _build_optimizers(model)
    model.train()
    started, num_tokens = time.monotonic(), 0
    for step in range(1, plan.num_steps + 1):
        for optimizer, scale in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(plan, step) * scale
            optimizer.zero_grad()
        input_ids, labels = encode_batch(_draw_batch(rng, plan.tokens_per_batch), tokenizer)
        loss = -response_logprobs(model, input_ids, labels).sum() / (labels[:, 1:] != IGNORED).sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        num_tokens += input_ids.numel()
        if step % 50 == 0:
            speed = num_tokens / (time.monotonic() - started)
            logger.info("step %d/%d loss %.4f %.0f tok/s", step, plan.num_steps, loss.item(), speed)
        after_step(step, loss.item())


def encode_batch(batch: list[TinyProblem], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both [B, T] and padded on the right; only the response carries labels."""
    rows = []
    for item in batch:
        prompt = tokenizer.encode(item.problem + "\n")
        rows.append((prompt, [*tokenizer.encode(item.solution), EOS_ID]))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), PAD_ID)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, :end] = torch.tensor(prompt + response)
        labels[index, len(prompt) : end] = torch.tensor(response)
    return input_ids, labels


def response_logprobs(
    model: Qwen3ForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor, top_p: float = 1.0
) -> torch.Tensor:
    """Return the log-prob of every label under nucleus sampling, [B, T - 1]; 0 where there is no label."""
    # No attention mask is needed: padding lies on the right, where no response position can see it.
    logprobs: torch.Tensor = model(input_ids).logits[:, :-1].float().log_softmax(-1)
    if top_p < 1.0:
        ordered, order = logprobs.sort(descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        outside = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        logprobs = logprobs.masked_fill(outside, -math.inf).log_softmax(-1)
    targets = labels[:, 1:]
    picked = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(targets == IGNORED, 0.0)


@torch.no_grad()
def solution_probability(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: list[TinyProblem], top_p: float
) -> float:
    """Return the mean probability of sampling exactly the worked solution: avg@k without sampling noise."""
    logprobs = response_logprobs(model, *encode_batch(batch, tokenizer), top_p=top_p)
    return float(logprobs.sum(-1).exp().mean())


def _draw_batch(rng: random.Random, tokens_per_batch: int) -> list[TinyProblem]:
    """Draw training problems of similar length, so that little of the batch is padding."""
    shortest, longest = rng.choice(_LENGTH_BANDS)
    # A step takes 3 tokens in the problem and up to 9 in the solution.
    num = max(8, tokens_per_batch // (12 * longest + 8))
    return [draw_problem(rng, rng.randint(shortest, longest), "train") for _ in range(num)]


def _build_optimizers(model: Qwen3ForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return Muon for the matrices, AdamW for embeddings and norms, each with its factor on the rate."""
    # Muon needs about a third of AdamW's steps here: the look-up of a label forms early, without a plateau.
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
    return [(muon, _MUON_SCALE), (adamw, 1.0)]


def _learning_rate(plan: PretrainPlan, step: int) -> float:
    """Return the learning rate of a step, counted from 1."""
    warmup = min(1.0, step / max(1, plan.warmup_steps))
    decay = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / plan.num_steps))
    return plan.learning_rate * warmup * (0.05 + 0.95 * decay)
