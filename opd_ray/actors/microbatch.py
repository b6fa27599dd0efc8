"""One microbatch on a learner rank: its tensors, its behaviour log-probs, its gate and its loss.

Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.actors.scoring_model import PaddedRows, pad_rows
from opd_ray.actors.step_report import RankReport, SegmentStats
from opd_ray.config import GateConfig, GateKind, ObjectiveConfig, ObjectiveKind
from opd_ray.objective import (
    GateResult,
    block_segments,
    drift_gate,
    gated_token_mean,
    lsm_loss,
    newline_segments,
    sampled_token_loss,
)
from opd_ray.replay.rows import ScoredRow
from opd_ray.types import SampleInfo


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Tensors of some trajectories; [B, T] are response-aligned, [N] the flattened response tokens."""

    block: PaddedRows
    infos: tuple[SampleInfo, ...]
    sampled_ids: Tensor  # [N] int64
    support_ids: Tensor  # [N, K] int64
    teacher_topk_logprobs: Tensor  # [N, K] float32
    teacher_logprobs: Tensor  # [N] float32
    engine_logprobs: Tensor  # [N] float32
    valid: Tensor  # [N] bool

    @property
    def is_fresh(self) -> Tensor:
        """[B] bool: first visit at staleness 0, where drift is zero by definition."""
        fresh = [info.visits == 1 and info.staleness == 0 for info in self.infos]
        return torch.tensor(fresh, device=self.valid.device)

    def to_rows(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[N] values as [B, T]."""
        width = max(self.block.lengths)
        rows = values.new_full((len(self.block.lengths), width), fill)
        return rows.index_put(self.block.row_index, values)


def make_microbatch(
    rows: Sequence[ScoredRow], infos: Sequence[SampleInfo], pad_id: int, device: torch.device
) -> Microbatch:
    """Tensors of the rows; tokens with a non-finite behaviour or teacher log-prob are not valid."""

    def joined(arrays: Sequence[npt.NDArray[np.generic]], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    teacher = joined([row.teacher_logprobs for row in rows], np.float32)
    engine = joined([row.behavior_logprobs for row in rows], np.float32)
    topk = joined([row.teacher_topk_logprobs for row in rows], np.float32)
    valid = teacher.isfinite() & engine.isfinite() & ~topk.isnan().any(-1)
    return Microbatch(
        block=pad_rows(
            [row.prompt_token_ids for row in rows], [row.response_token_ids for row in rows], pad_id, device
        ),
        infos=tuple(infos),
        sampled_ids=joined([row.response_token_ids for row in rows], np.int64),
        support_ids=joined([row.teacher_topk_ids for row in rows], np.int64),
        teacher_topk_logprobs=topk,
        teacher_logprobs=teacher,
        engine_logprobs=engine,
        valid=valid,
    )


def segment_ids(batch: Microbatch, cfg: GateConfig, newline_tokens: Tensor) -> Tensor:
    """[B, T] int64 segment of every response token; `newline_tokens` [V] bool."""
    lengths = torch.tensor(batch.block.lengths, device=batch.valid.device)
    if cfg.kind is GateKind.newline:
        newlines = batch.to_rows(newline_tokens[batch.sampled_ids].float()) > 0
        return newline_segments(
            newlines, lengths, min_len=cfg.min_span, max_len=cfg.max_span, fallback_block=cfg.block_size
        )
    return block_segments(lengths, max(batch.block.lengths), cfg.block_size)


def token_losses(
    batch: Microbatch, cfg: ObjectiveConfig, logits: Tensor | None, current: Tensor | None, behavior: Tensor
) -> Tensor:
    """Loss of every response token, [N] float32."""
    if cfg.kind is ObjectiveKind.lsm and logits is not None:
        return lsm_loss(logits, batch.teacher_topk_logprobs)
    if current is None:
        raise ValueError("sampled-token OPD needs the current log-probs: compute them in the forward pass")
    return sampled_token_loss(
        current,
        behavior,
        batch.teacher_logprobs,
        advantage=cfg.advantage.name,  # type: ignore[arg-type]
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
    )


def gate_weights(batch: Microbatch, cfg: GateConfig, current: Tensor, behavior: Tensor, segments: Tensor) -> GateResult:
    """The gate of the microbatch, raw unless normalised by sequence; fresh trajectories have drift exactly zero."""
    current_rows, behavior_rows = batch.to_rows(current), batch.to_rows(behavior)
    behavior_rows = torch.where(batch.is_fresh[:, None], current_rows, behavior_rows)
    return drift_gate(
        current_rows,
        behavior_rows,
        batch.to_rows(batch.valid.float()),
        segments,
        tau=cfg.tau,
        statistic=cfg.statistic.name,  # type: ignore[arg-type]
        # The step's normaliser is known after the last microbatch of all ranks: the learner divides by it then.
        normalize="sequence" if cfg.normalize.name == "sequence" else "none",
    )


def reduce_loss(batch: Microbatch, losses: Tensor, weights: Tensor, report: RankReport) -> Tensor:
    """sum(m * g * loss) of the microbatch, with a graph; adds its sums to `report`. `weights` [B, T]."""
    mask = batch.to_rows(batch.valid.float())
    rows = batch.to_rows(losses)
    loss = gated_token_mean(rows, weights, mask, num_loss_tokens=1)
    kept = batch.valid
    report.loss_sum += float(loss.detach())
    report.ungated_loss_sum += float(losses.detach()[kept].double().sum())
    report.weight_sum += float(weights.sum(dtype=torch.float64))
    report.weight_square_sum += float(weights.double().square().sum())
    report.num_tokens += int(kept.sum())
    report.num_masked += int((~kept).sum())
    report.kl_sum += float((batch.engine_logprobs - batch.teacher_logprobs)[kept].double().sum())
    report.padded_tokens += batch.block.input_ids.numel()
    report.model_tokens += sum(info.num_prompt_tokens + info.num_response_tokens for info in batch.infos)
    return loss


def segment_stats(batch: Microbatch, gate: GateResult) -> SegmentStats:
    """The gate's segments that have valid tokens."""
    used = (gate.segment_tokens > 0).cpu()
    staleness = torch.tensor([info.staleness for info in batch.infos])[:, None].expand_as(used)
    return SegmentStats(
        drift=gate.segment_drift.cpu()[used].double().numpy(),
        gate=gate.segment_gate.cpu()[used].double().numpy(),
        num_tokens=gate.segment_tokens.cpu()[used].numpy(),
        staleness=staleness[used].numpy(),
    )
