"""Made-up scored trajectories, and the reference step on them: one process, one batch, plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opd_ray.config.choices import GateKind, ObjectiveKind
from opd_ray.config.schema import RunConfig
from opd_ray.models.loading import pad_rows
from opd_ray.objective import block_segments, newline_segments, sampled_token_loss
from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow, ScoredRow, scored_rows
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.types import SampleInfo

VOCAB = 40
TOP_K = 4


def scored_payload(
    lengths: list[int], seed: int, without_teacher: tuple[int, ...] = (), samples_per_prompt: int = 1
) -> Any:
    """An encoded scored batch with random tokens and a random teacher; NaN for the rows `without_teacher`."""
    rng = np.random.default_rng(seed)
    rows: list[RolloutRow] = []
    for slot, length in enumerate(lengths):
        first = rows[slot - slot % samples_per_prompt] if slot % samples_per_prompt else None
        rows.append(
            RolloutRow(
                slot=slot,
                prompt_id=first.prompt_id if first else f"p{slot}",
                prompt_token_ids=(
                    first.prompt_token_ids if first else rng.integers(3, VOCAB, 5 + slot % 3).astype(np.int32)
                ),
                response_token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
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
    # A list whose mass is below one, as a teacher's top K has.
    logprobs = [
        (values - 1 - np.logaddexp.reduce(values, axis=1, keepdims=True)).astype(np.float32) for values in logprobs
    ]
    sampled = [rng.normal(-3, 1, n).astype(np.float32) for n in lengths]
    for row in without_teacher:
        sampled[row] = np.full_like(sampled[row], np.nan)
    return add_teacher_columns(batch, sampled, ids, logprobs, BatchSpec("f", TOP_K, "float32"))


def with_only(payload: Any, columns: tuple[str, ...]) -> Any:
    """The payload with all other columns ruined: NaN, or numbers that `decode` refuses where it looks at them."""
    with pa.ipc.open_stream(payload) as reader:
        batch = reader.read_next_batch()
    arrays = [
        column if name in columns else _ruined(column)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=batch.schema))
    return sink.getvalue()


def _ruined(array: Any) -> Any:
    kind: Any = array.type
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(array.offsets, _ruined(array.values), type=kind)
    if pa.types.is_fixed_size_list(kind):
        fixed: Any = pa.FixedSizeListArray
        return fixed.from_arrays(_ruined(array.values), type=kind)
    if pa.types.is_floating(kind):
        return pa.array(np.full(len(array), np.nan), type=kind)
    return pa.array(np.full(len(array), -1), type=kind) if pa.types.is_integer(kind) else array


def stale_infos(payload: Any) -> tuple[SampleInfo, ...]:
    """All trajectories one step old, at their second visit: drift is measured against the engine's log-probs."""
    return tuple(
        SampleInfo(row.slot, 1, 2, 0.0, len(row.prompt_token_ids), len(row.response_token_ids))
        for row in scored_rows(decode(payload))
    )


def reference_step(model: Any, rows: list[ScoredRow], cfg: RunConfig, newlines: Any) -> tuple[float, float]:
    """Loss and gradient norm of one AdamW step on the whole batch with full logits; `model` is changed.

    Trajectories are one step old and drift is against the engine's log-probs. Losses and weights are written out here
    once more, in plain torch and without the package's own; only segments and the PPO clip are the package's.
    """
    block = pad_rows(
        [row.prompt_token_ids for row in rows],
        [row.response_token_ids for row in rows],
        0,
        torch.device("cpu"),
    )
    logits = model(block.input_ids).logits.reshape(-1, int(model.config.vocab_size))[block.positions].double()
    at = joined(rows, "response_token_ids").long()
    current = logits.log_softmax(-1).gather(1, at[:, None])[:, 0]
    losses = reference_losses(cfg, rows, logits, current)
    weights = reference_weights(cfg, rows, current.detach(), newlines)
    by_sum = cfg.gate.kind is not GateKind.off and cfg.gate.normalize.name != "none"
    loss = (weights * losses).sum() / (weights.sum() if by_sum else len(weights))
    learner = cfg.learner
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learner.lr, betas=(0.9, learner.beta2), weight_decay=learner.weight_decay
    )
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), learner.grad_clip)
    optimizer.step()
    return float(loss.detach()), float(norm)


def joined(rows: list[ScoredRow], name: str) -> torch.Tensor:
    """A token column of all rows, [N] or [N, K]."""
    return torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))


def reference_losses(
    cfg: RunConfig, rows: list[ScoredRow], logits: torch.Tensor, current: torch.Tensor
) -> torch.Tensor:
    """[N] float64."""
    objective, kind = cfg.objective, cfg.objective.kind
    behavior, teacher = joined(rows, "behavior_logprobs").double(), joined(rows, "teacher_logprobs").double()
    if kind is ObjectiveKind.opd:
        return sampled_token_loss(current, behavior, teacher, advantage=objective.advantage.value)
    ids = joined(rows, "teacher_topk_ids").long()
    log_q = joined(rows, "teacher_topk_logprobs").double()
    log_p = logits.log_softmax(-1).gather(1, ids)
    p, q = log_p.exp(), log_q.exp()
    if kind is ObjectiveKind.tail_kl:
        log_p, log_q = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], 1) for x in (log_p, log_q))
        p, q = log_p.exp(), log_q.exp()
        forward = objective.direction.name == "forward"
        return (q * (log_q - log_p)).sum(-1) if forward else (p * (log_p - log_q)).sum(-1)
    if kind is ObjectiveKind.forward_kl and not objective.renormalize:
        return (q * (log_q - log_p)).sum(-1)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    if kind is ObjectiveKind.lsm:
        return (p * (p / q).log()).sum(-1)
    if kind is ObjectiveKind.forward_kl:
        return (q * (q / p).log()).sum(-1)
    mixture = objective.beta * q + (1 - objective.beta) * p
    by_teacher, by_student = (q * (q / mixture).log()).sum(-1), (p * (p / mixture).log()).sum(-1)
    return objective.beta * by_teacher + (1 - objective.beta) * by_student


def reference_weights(cfg: RunConfig, rows: list[ScoredRow], current: torch.Tensor, newlines: Any) -> torch.Tensor:
    """[N] float64, one segment after the other."""
    gate = cfg.gate
    lengths = [len(row.response_token_ids) for row in rows]
    drifts = torch.split(current - joined(rows, "behavior_logprobs").double(), lengths)
    weights = [torch.ones(length, dtype=torch.float64) for length in lengths]
    for row, drift in enumerate(drifts):
        ratio = drift.exp()
        if gate.kind is GateKind.tis:
            weights[row] = ratio.clamp(max=gate.cap)
        elif gate.kind is GateKind.icepop:
            weights[row] = torch.where((ratio >= gate.low) & (ratio <= gate.high), ratio, 0.0)
        elif gate.kind is GateKind.geometric_mask:
            weights[row] *= gate.low <= float(drift.mean().exp()) <= gate.high
        elif gate.kind is not GateKind.off:
            for segment in segments_of(cfg, rows[row], newlines):
                score = drift[segment].mean().abs()
                is_kept = score <= gate.drop_above
                weights[row][segment] = float(is_kept) if gate.kind is GateKind.hard_drop else (-gate.tau * score).exp()
        if gate.kind in (GateKind.tis, GateKind.icepop) and cfg.objective.kind is ObjectiveKind.opd:
            weights[row] = weights[row] / ratio  # the loss carries the ratio itself
    return torch.cat(weights)


def segments_of(cfg: RunConfig, row: ScoredRow, newlines: Any) -> list[torch.Tensor]:
    """Response positions of each segment."""
    gate, length = cfg.gate, torch.tensor([len(row.response_token_ids)])
    if gate.kind is GateKind.newline:
        found = newlines[torch.from_numpy(row.response_token_ids.astype(np.int64))][None]
        ids = newline_segments(
            found, length, min_len=gate.min_span, max_len=gate.max_span, fallback_block=gate.block_size
        )
    else:
        size = {GateKind.token: 1, GateKind.sequence: None}.get(gate.kind, gate.block_size)
        ids = block_segments(length, int(length), size)
    return [(ids[0] == number).nonzero().flatten() for number in range(int(ids.max()) + 1)]
