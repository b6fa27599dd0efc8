"""Made-up scored trajectories, and the step of `opd_ray.objective.reference` on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from opd_ray.config.choices import GateKind
from opd_ray.config.schema import RunConfig
from opd_ray.objective import block_segments, newline_segments, reference, sampled_token_loss
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
    for trajectory_id, length in enumerate(lengths):
        first = rows[trajectory_id - trajectory_id % samples_per_prompt] if trajectory_id % samples_per_prompt else None
        rows.append(
            RolloutRow(
                trajectory_id=trajectory_id,
                prompt_id=first.prompt_id if first else f"p{trajectory_id}",
                prompt_token_ids=(
                    first.prompt_token_ids if first else rng.integers(3, VOCAB, 5 + trajectory_id % 3).astype(np.int32)
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
    """All trajectories one step old, at their second use: drift is measured against the engine's log-probs."""
    return tuple(
        SampleInfo(row.trajectory_id, 1, 2, 0.0, len(row.prompt_token_ids), len(row.response_token_ids))
        for row in scored_rows(decode(payload))
    )


def reference_step(model: Any, rows: list[ScoredRow], cfg: RunConfig, newlines: Any) -> tuple[float, float]:
    """Loss and gradient norm of one AdamW step of the reference on the whole batch; `model` is changed.

    Trajectories are one step old and drift is against the engine's log-probs. LSM and the drift gates are the
    reference's own; the other losses and the baselines are written out here.
    """
    learner, lengths = cfg.learner, torch.tensor([len(row.response_token_ids) for row in rows])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learner.lr, betas=(0.9, learner.beta2), weight_decay=learner.weight_decay
    )
    recipe = reference.Recipe(
        int(lengths.max()), 0, block_size=cfg.gate.block_size, tau=cfg.gate.tau, grad_clip=learner.grad_clip
    )
    losses_of, weights_of = reference.lsm_losses, reference.block_weights
    if cfg.objective.kind != "lsm":
        losses_of = partial(_losses, cfg, padded(rows, "teacher_logprobs"))
    if cfg.gate.kind is not GateKind.block:
        weights_of = partial(_weights, cfg, segments_of(cfg, rows, lengths, newlines))
    return reference.step(model, optimizer, reference_batch(rows, lengths), recipe, losses_of, weights_of)


def reference_batch(rows: list[ScoredRow], lengths: Tensor) -> reference.Batch:
    """The trajectories as the reference takes them."""
    starts = torch.tensor([len(row.prompt_token_ids) for row in rows])
    tokens = pad_sequence(
        [torch.from_numpy(np.concatenate([row.prompt_token_ids, row.response_token_ids])) for row in rows],
        batch_first=True,
    ).long()
    tokens = pad(tokens, (0, int(starts.max() + lengths.max()) - tokens.shape[1]))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rollout = reference.Rollout(tokens, starts, mask, padded(rows, "behavior_logprobs"))
    return reference.Batch(rollout, padded(rows, "teacher_topk_ids").long(), padded(rows, "teacher_topk_logprobs", -3))


def padded(rows: list[ScoredRow], name: str, fill: float = 0) -> Tensor:
    """A token column of all rows, [B, T] or [B, T, K]."""
    return pad_sequence([torch.tensor(getattr(row, name)) for row in rows], batch_first=True, padding_value=fill)


def _losses(cfg: RunConfig, teacher: Tensor, logits: Tensor, batch: reference.Batch) -> Tensor:
    """[B, T]; `teacher` [B, T] are the sampled tokens' log-probs."""
    objective, kind = cfg.objective, cfg.objective.kind
    log_pi = logits.log_softmax(-1)
    if kind == "opd":
        current = log_pi.gather(2, batch.rollout.responses[:, :, None])[:, :, 0]
        behavior = batch.rollout.behavior_logprobs
        return sampled_token_loss(current, behavior, teacher, advantage=objective.advantage.value)
    log_p, log_q = log_pi.gather(2, batch.support), batch.teacher_logprobs
    p, q = log_p.exp(), log_q.exp()
    if kind == "tail_kl":
        log_p, log_q = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_p, log_q))
        p, q = log_p.exp(), log_q.exp()
        forward = objective.direction.name == "forward"
        return (q * (log_q - log_p)).sum(-1) if forward else (p * (log_p - log_q)).sum(-1)
    if kind == "forward_kl" and not objective.renormalize:
        return (q * (log_q - log_p)).sum(-1)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    mixture = objective.beta * q + (1 - objective.beta) * p
    by_teacher, by_student = (q * (q / mixture).log()).sum(-1), (p * (p / mixture).log()).sum(-1)
    return objective.beta * by_teacher + (1 - objective.beta) * by_student


def _weights(
    cfg: RunConfig, segments: Tensor, logits: Tensor, batch: reference.Batch, recipe: reference.Recipe
) -> Tensor:
    """[B, T]"""
    gate, mask = cfg.gate, batch.rollout.mask
    drift = reference.token_drift(logits, batch.rollout)
    if gate.kind.is_drift_gate:
        return reference.gate_weights(drift, mask, segments, gate.tau)
    ratio, weights = drift.exp(), torch.ones_like(drift)
    if gate.kind is GateKind.tis:
        weights = ratio.clamp(max=gate.cap)
    elif gate.kind is GateKind.icepop:
        weights = torch.where((ratio >= gate.low) & (ratio <= gate.high), ratio, 0.0)
    elif gate.kind in (GateKind.hard_drop, GateKind.geometric_mask):
        for number in range(int(segments.max()) + 1):
            inside = mask & (segments == number)
            mean = (drift * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
            is_kept = mean.abs() <= gate.drop_above
            if gate.kind is GateKind.geometric_mask:
                is_kept = (mean.exp() >= gate.low) & (mean.exp() <= gate.high)
            weights = torch.where(inside, is_kept.to(weights), weights)
    if gate.kind in (GateKind.tis, GateKind.icepop) and cfg.objective.kind == "opd":
        weights = weights / ratio  # the loss carries the ratio itself
    by_sum = gate.kind is not GateKind.off and gate.normalize.name != "none"
    return weights * mask.sum() / (weights * mask).sum() if by_sum else weights


def segments_of(cfg: RunConfig, rows: list[ScoredRow], lengths: Tensor, newlines: Any) -> Tensor:
    """[B, T] int64, 0 at padding."""
    gate = cfg.gate
    if gate.kind is GateKind.newline:
        found = newlines[padded(rows, "response_token_ids").long()]
        ids = newline_segments(
            found, lengths, min_len=gate.min_span, max_len=gate.max_span, fallback_block=gate.block_size
        )
    else:
        sizes = {GateKind.token: 1, GateKind.sequence: None, GateKind.geometric_mask: None}
        ids = block_segments(lengths, int(lengths.max()), sizes.get(gate.kind, gate.block_size))
    return ids.clamp(min=0)
