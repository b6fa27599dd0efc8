"""Made-up scored trajectories, and the reference step on them: one process, one batch, plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opd_ray.actors.scoring_model import pad_rows
from opd_ray.config import GateConfig, GateKind, LearnerConfig, ObjectiveConfig, ObjectiveKind
from opd_ray.objective import (
    block_segments,
    drift_gate,
    gated_token_mean,
    lsm_loss,
    newline_segments,
    sampled_token_loss,
)
from opd_ray.replay.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.replay.rows import RolloutRow, ScoredRow, scored_rows
from opd_ray.replay.schema import BatchSpec
from opd_ray.types import SampleInfo

VOCAB = 40
TOP_K = 4


def scored_payload(lengths: list[int], seed: int) -> Any:
    """An encoded scored batch with random tokens, behaviour log-probs around -2 and a random teacher."""
    rng = np.random.default_rng(seed)
    rows = []
    for slot, length in enumerate(lengths):
        rows.append(
            RolloutRow(
                slot=slot,
                prompt_id=f"p{slot}",
                prompt_token_ids=rng.integers(3, VOCAB, 5 + slot % 3).astype(np.int32),
                response_token_ids=rng.integers(3, VOCAB, length).astype(np.int32),
                behavior_logprobs=rng.normal(-3, 1, length).astype(np.float32),
                version_starts=np.array([0], dtype=np.int32),
                version_values=np.array([0], dtype=np.int64),
                finish_reason="stop",
                temperature=1.0,
                top_p=1.0,
            )
        )
    batch = decode(encode_rollouts(rows, BatchSpec("f")))
    ids = [np.stack([rng.permutation(VOCAB)[:TOP_K] for _ in range(n)]).astype(np.int32) for n in lengths]
    logprobs = [-np.sort(rng.exponential(2.0, (n, TOP_K)), axis=1).astype(np.float32) for n in lengths]
    sampled = [rng.normal(-3, 1, n).astype(np.float32) for n in lengths]
    return add_teacher_columns(batch, sampled, ids, logprobs, BatchSpec("f", TOP_K, "float32"))


def stale_infos(payload: Any) -> tuple[SampleInfo, ...]:
    """All trajectories one step old, at their second visit: drift is measured against the engine's log-probs."""
    return tuple(
        SampleInfo(row.slot, 1, 2, 0.0, len(row.prompt_token_ids), len(row.response_token_ids))
        for row in scored_rows(decode(payload))
    )


def reference_step(
    model: Any,
    rows: list[ScoredRow],
    objective: ObjectiveConfig,
    gate: GateConfig,
    cfg: LearnerConfig,
    newlines: Any,
) -> tuple[float, float]:
    """Loss and gradient norm of one AdamW step on the whole batch with full logits; `model` is changed."""
    block = pad_rows(
        [row.prompt_token_ids for row in rows],
        [row.response_token_ids for row in rows],
        0,
        torch.device("cpu"),
    )
    at = block.row_index
    shape = (len(rows), max(block.lengths))

    def to_rows(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(shape).index_put(at, values)

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))

    logits = model(block.input_ids).logits.reshape(-1, int(model.config.vocab_size))[block.positions].float()
    sampled = joined("response_token_ids").long()
    current = logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0]
    behavior = joined("behavior_logprobs")
    if objective.kind is ObjectiveKind.lsm:
        losses = lsm_loss(logits.gather(1, joined("teacher_topk_ids").long()), joined("teacher_topk_logprobs").float())
    else:
        losses = sampled_token_loss(current, behavior, joined("teacher_logprobs"), advantage="frozen")
    mask = to_rows(torch.ones_like(behavior))
    weights = mask
    lengths = torch.tensor(block.lengths)
    if gate.kind is not GateKind.off:
        segments = (
            block_segments(lengths, shape[1], gate.block_size)
            if gate.kind is GateKind.block
            else newline_segments(
                to_rows(newlines[sampled].float()) > 0,
                lengths,
                min_len=gate.min_span,
                max_len=gate.max_span,
                fallback_block=gate.block_size,
            )
        )
        weights = drift_gate(
            to_rows(current.detach()),
            to_rows(behavior),
            mask,
            segments,
            tau=gate.tau,
            statistic="signed_mean",
            normalize="step",
        ).token_weights
    loss = gated_token_mean(to_rows(losses), weights, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()
    return float(loss.detach()), float(norm)
