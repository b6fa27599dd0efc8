"""The tensors of a microbatch as the numpy arrays that `diagnostics` takes.

Imports torch: learner workers only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.learner.diagnostics import ProbeFacts, SegmentFacts, TokenStats
from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.step_gate import TokenWeights


def _numpy(values: Tensor, dtype: type) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = values.detach().cpu().numpy().astype(dtype)
    return array


def _relative_positions(batch: Microbatch) -> npt.NDArray[np.float64]:
    """[N] response position over response length."""
    return np.concatenate([np.arange(length) / length for length in batch.block.lengths])


def token_facts(batch: Microbatch, weighed: TokenWeights, *, is_gated: bool) -> TokenStats:
    """The valid tokens; segments are numbered as in `segment_facts`, and -1 without a gate."""
    valid = batch.valid.cpu().numpy()
    num_segments = weighed.gate.segment_tokens.shape[1]
    row, _ = batch.block.row_index
    segment = batch.to_tokens(weighed.segments) + row * num_segments if is_gated else torch.full_like(row, -1)
    staleness = np.repeat([info.staleness for info in batch.infos], batch.block.lengths)
    return TokenStats(
        position=_relative_positions(batch)[valid],
        weight=_numpy(batch.to_tokens(weighed.gate.token_weights), np.float64)[valid],
        kl=_numpy(batch.engine_logprobs - batch.teacher_logprobs, np.float64)[valid],
        staleness=staleness[valid].astype(np.int64),
        segment=_numpy(segment, np.int64)[valid],
    )


def segment_facts(batch: Microbatch, weighed: TokenWeights) -> SegmentFacts:
    """All segments, row after row."""
    shape = weighed.gate.segment_tokens.shape
    staleness = np.repeat([info.staleness for info in batch.infos], shape[1])
    return SegmentFacts(
        drift=_numpy(weighed.gate.segment_drift, np.float64).reshape(-1),
        gate=_numpy(weighed.gate.segment_gate, np.float64).reshape(-1),
        num_tokens=_numpy(weighed.gate.segment_tokens, np.int64).reshape(-1),
        staleness=staleness.astype(np.int64),
        measured=np.repeat(np.array(weighed.measured, dtype=np.bool_), shape[1]),
    )


def probe_positions(batch: Microbatch, count: int) -> Tensor | None:
    """[M] int64 into the N response tokens: up to `count` valid ones, evenly spread; None without any."""
    valid = batch.valid.nonzero().flatten()
    if not count or not len(valid):
        return None
    steps = torch.linspace(0, len(valid) - 1, min(count, len(valid)), device=valid.device)
    return valid[steps.round().long()]


def probe_facts(batch: Microbatch, at: Tensor, probe: Tensor) -> ProbeFacts:
    """What a forward pass found at the probed positions; `probe` [3, M] as `policy_model` gives it."""
    mass, overlap, entropy = _numpy(probe, np.float64)
    return ProbeFacts(
        position=_relative_positions(batch)[at.cpu().numpy()], support_mass=mass, overlap=overlap, entropy=entropy
    )
