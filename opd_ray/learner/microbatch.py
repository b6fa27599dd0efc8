"""The tensors of one microbatch on a learner rank, and which of its response tokens count.

Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.config.registry import SUPPORTS
from opd_ray.config.schema import ObjectiveConfig
from opd_ray.learner.token_masks import TokenMasks
from opd_ray.models.loading import PaddedRows, pad_rows
from opd_ray.objective import select_by_entropy, with_sampled_token
from opd_ray.trajectory.rows import TrainingRow
from opd_ray.types import SampleInfo


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The gate's segments, which do not depend on what is valid.

    `ids` [B, T] int64; `measured` [B, T] bool are the tokens whose drift is measured, None for all of them.
    """

    ids: Tensor
    measured: Tensor | None


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Tensors of some trajectories; [B, T] are response-aligned, [N] the flattened response tokens.

    K is 0 where nothing reads the support, or its log-probs. `token_staleness` is None without token versions.
    `members` are the trajectories' places in the step's batch. `removed` counts the tokens that left `valid`, by rule.
    `segmentation` is None until `StepGate.segmented`.
    """

    members: tuple[int, ...]
    block: PaddedRows
    infos: tuple[SampleInfo, ...]
    sampled_ids: Tensor  # [N] int64
    support_ids: Tensor  # [N, K] int64
    teacher_topk_logprobs: Tensor  # [N, K] float32
    teacher_logprobs: Tensor  # [N] float32
    engine_logprobs: Tensor  # [N] float32
    token_staleness: Tensor | None  # [N] int64
    valid: Tensor  # [N] bool
    removed: dict[str, int] = field(default_factory=dict)
    segmentation: Segmentation | None = None

    @property
    def segments(self) -> Segmentation:
        """The gate's segments; raises ValueError before there are any."""
        if self.segmentation is None:
            raise ValueError("the microbatch has no segments yet: take it through StepGate.segmented")
        return self.segmentation

    @property
    def fresh(self) -> tuple[bool, ...]:
        """For each trajectory: first use at staleness 0, where drift is zero by definition."""
        return tuple(info.is_fresh for info in self.infos)

    @property
    def fresh_rows(self) -> Tensor:
        """[B, 1] bool: `fresh` as a column."""
        return torch.tensor(self.fresh, device=self.valid.device)[:, None]

    @property
    def lengths(self) -> Tensor:
        """[B] int64 response tokens."""
        return torch.tensor(self.block.lengths, device=self.valid.device)

    def to_rows(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[N] values as [B, T]."""
        rows = values.new_full((len(self.block.lengths), max(self.block.lengths)), fill)
        return rows.index_put(self.block.row_index, values)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """[B, T] values as [N]."""
        return rows[self.block.row_index]

    def without(self, removed: Tensor, rule: str) -> Microbatch:
        """The microbatch with the tokens of `removed` [N] bool taken out of `valid`, counted under `rule`."""
        leaving = self.valid & removed
        return replace(self, valid=self.valid & ~removed, removed=self.removed | {rule: int(leaving.sum())})


def make_microbatch(
    rows: Sequence[TrainingRow],
    infos: Sequence[SampleInfo],
    members: Sequence[int],
    *,
    pad_id: int,
    device: torch.device,
    with_tree: bool = False,
) -> Microbatch:
    """Tensors of the trajectories; tokens with a non-finite log-prob in a column that is read are not valid.

    `with_tree`: a prompt is computed once for all of its trajectories (`pad_rows`).
    """
    num_tokens = sum(len(row.response_token_ids) for row in rows)

    def joined(arrays: Sequence[npt.NDArray[Any] | None], dtype: type) -> Tensor:
        """[N] or [N, K]; [N, 0] of a column that is not there."""
        given = [array for array in arrays if array is not None] or [np.empty((num_tokens, 0), dtype)]
        return torch.from_numpy(np.concatenate(given, dtype=dtype)).to(device)

    teacher = joined([row.teacher_logprobs for row in rows], np.float32)
    engine = joined([row.behavior_logprobs for row in rows], np.float32)
    topk = joined([row.teacher_topk_logprobs for row in rows], np.float32)
    finite = teacher.isfinite() & engine.isfinite() & ~topk.isnan().any(-1)
    batch = Microbatch(
        members=tuple(members),
        block=pad_rows(
            [row.prompt_token_ids for row in rows],
            [row.response_token_ids for row in rows],
            pad_id,
            device,
            with_tree=with_tree,
        ),
        infos=tuple(infos),
        sampled_ids=joined([row.response_token_ids for row in rows], np.int64),
        support_ids=joined([row.teacher_topk_ids for row in rows], np.int64),
        teacher_topk_logprobs=topk,
        teacher_logprobs=teacher,
        engine_logprobs=engine,
        token_staleness=_token_staleness(rows, infos, device),
        valid=torch.ones_like(finite),
    )
    return batch.without(~finite, "not_finite")


def _token_staleness(rows: Sequence[TrainingRow], infos: Sequence[SampleInfo], device: torch.device) -> Tensor | None:
    versions = [row.token_versions for row in rows]
    # A trajectory's staleness is its oldest token's.
    found = [info.staleness + v.min() - v for info, v in zip(infos, versions, strict=True) if v is not None]
    return torch.from_numpy(np.concatenate(found)).to(device) if len(found) == len(rows) else None


def select_support(batch: Microbatch, name: str) -> Microbatch:
    """The microbatch with the support called `name`: what leaves it has a teacher log-prob of -inf."""
    if not batch.teacher_topk_logprobs.shape[1]:
        return batch
    logprobs = SUPPORTS.load(name).select(batch.support_ids, batch.teacher_topk_logprobs)
    return replace(batch, teacher_topk_logprobs=logprobs)


def select_positions(batch: Microbatch, cfg: ObjectiveConfig, masks: TokenMasks) -> Microbatch:
    """The microbatch with the sampled tokens in its support, if set, and without those that the mask rules name."""
    if cfg.include_sampled:
        ids, logprobs = with_sampled_token(
            batch.support_ids, batch.teacher_topk_logprobs, batch.sampled_ids, batch.teacher_logprobs
        )
        batch = replace(batch, support_ids=ids, teacher_topk_logprobs=logprobs)
    token_ids = batch.to_rows(batch.sampled_ids)
    in_response = batch.to_rows(torch.ones_like(batch.valid))
    for rule, removed in masks.removed(token_ids, in_response).items():
        batch = batch.without(batch.to_tokens(removed), rule)
    return batch


def select_high_entropy(batch: Microbatch, entropy: Tensor, top_share: float) -> Microbatch:
    """The microbatch with only each response's positions of highest entropy; `entropy` [N] in nats."""
    kept = select_by_entropy(batch.to_rows(entropy), batch.to_rows(batch.valid), top_share=top_share)
    return batch.without(~batch.to_tokens(kept), "low_entropy")
