"""The trajectories of a step that are recorded: what the forward pass, the gate and the loss found at each token.

It adds constant outputs to the forward pass of the microbatches that have such a trajectory, and changes nothing else.
Imports torch: learner workers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.old_logprobs import Behavior
from opd_ray.learner.policy_model import HeadRequest
from opd_ray.learner.spec import LearnerSpec, RankBatch
from opd_ray.learner.step_gate import TokenWeights
from opd_ray.models.token_text import token_labels, token_pieces
from opd_ray.objective import lsm_loss
from opd_ray.run.trajectory_records import RecordedUse, write_records
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import ScoredRow, scored_rows


@dataclass(frozen=True, slots=True)
class _Watched:
    """A trajectory's part of its microbatch."""

    row: int  # in the microbatch
    tokens: slice  # in its [N]


class TrajectoryRecorder:
    """Gathers the recorded trajectories of a rank's step, and writes them at its end."""

    def __init__(self, spec: LearnerSpec, tokenizer: Any) -> None:
        self._folder = Path(spec.records_folder)
        self._rank = spec.rank
        self._settings = {"objective": _plain(spec.cfg.objective), "gate": _plain(spec.cfg.gate)}
        self._tokenizer = tokenizer
        self._rows: dict[int, ScoredRow] = {}
        self._uses: dict[int, RecordedUse] = {}
        self._step = 0

    def begin(self, batch: RankBatch, payloads: Sequence[Any]) -> None:
        """Start a step: read all columns of the trajectories that are recorded."""
        needed = {batch.rows[place][0] for place in batch.dumped}
        decoded = {payload: scored_rows(decode(payloads[payload])) for payload in needed}
        self._rows = {place: decoded[payload][row] for place in batch.dumped for payload, row in [batch.rows[place]]}
        self._uses = {}
        self._step = batch.policy_version + 1

    def added_to(self, request: HeadRequest, batch: Microbatch) -> HeadRequest:
        """The request, for the positions of the microbatch's recorded trajectories too."""
        found = self._found(batch)
        if not found:
            return request
        device = batch.valid.device
        at = torch.cat([torch.arange(one.tokens.start, one.tokens.stop, device=device) for one in found.values()])
        ids = np.concatenate([self._rows[place].teacher_topk_ids for place in found])
        return dataclasses.replace(request, watch_at=at, watch_support=torch.from_numpy(ids).long().to(device))

    def take(
        self,
        batch: Microbatch,
        watched: tuple[Tensor, Tensor] | None,
        weighed: TokenWeights,
        behavior: Behavior,
        losses: Tensor,
    ) -> None:
        """Take in a microbatch after its loss; `watched` as `HeadValues` has it, `losses` [N]."""
        found = self._found(batch)
        if watched is None or not found:
            return
        lengths = [one.tokens.stop - one.tokens.start for one in found.values()]
        parts = zip(*(torch.split(values, lengths) for values in watched), strict=True)
        for (place, one), part in zip(found.items(), parts, strict=True):
            by_token = {
                "mask": batch.valid,
                "losses": losses,
                "behavior_logprobs": behavior.logprobs,
                "token_weights": batch.to_tokens(weighed.gate.token_weights),
                "segment_ids": batch.to_tokens(weighed.segments),
                "measured": _measured(batch),
            }
            tokens = {name: _numpy(values[one.tokens]) for name, values in by_token.items()}
            facts = tokens | self._watched_columns(self._rows[place], part) | _segment_columns(weighed, one.row, tokens)
            facts["behavior_from_engine"] = behavior.from_engine[one.row]
            self._uses[place] = self._use(batch, place, one.row, facts)

    def write(self, tau: float, weight_scale: float) -> None:
        """Write the step's file, if there is anything; `weight_scale` turns weights into normalised ones."""
        uses = [
            dataclasses.replace(use, tau=tau, token_weights=(use.token_weights * weight_scale).astype(np.float32))
            for _, use in sorted(self._uses.items())
        ]
        self._rows, self._uses = {}, {}
        if uses:
            write_records(self._folder, self._rank, uses, self._settings)

    def _found(self, batch: Microbatch) -> dict[int, _Watched]:
        """The microbatch's recorded trajectories by their place in the step's batch."""
        if not self._rows:
            return {}
        ends = batch.lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return {
            place: _Watched(row, slice(starts[row], ends[row]))
            for row, place in enumerate(batch.members)
            if place in self._rows
        }

    def _watched_columns(self, row: ScoredRow, part: tuple[Tensor, Tensor]) -> dict[str, Any]:
        numbers, own_ids = part
        width = own_ids.shape[1]
        at_support = numbers[:, 1 : 1 + width].float()
        teacher = torch.from_numpy(np.array(row.teacher_topk_logprobs, dtype=np.float32)).to(numbers.device)
        kl = lsm_loss(at_support, teacher) if width > 1 else torch.full_like(numbers[:, 0], torch.nan)
        return {
            "current_logprobs": _numpy(numbers[:, 1 + width]),
            "entropy": _numpy(numbers[:, 0]),
            "kl": _numpy(kl),
            "teacher_topk_ids": row.teacher_topk_ids.astype(np.int64),
            "teacher_topk_logprobs": row.teacher_topk_logprobs.astype(np.float32),
            "student_at_support_logprobs": _numpy(at_support),
            "student_topk_ids": _numpy(own_ids),
            "student_topk_logprobs": _numpy(numbers[:, 2 + width :]),
        }

    def _use(self, batch: Microbatch, place: int, index: int, facts: dict[str, Any]) -> RecordedUse:
        row, info, tokenizer = self._rows[place], batch.infos[index], self._tokenizer
        prompt, response = row.prompt_token_ids.tolist(), row.response_token_ids.tolist()
        named = np.union1d(facts["teacher_topk_ids"], facts["student_topk_ids"])
        labels = token_labels(tokenizer, [int(token_id) for token_id in named])
        drift = np.where(facts.pop("measured"), facts["current_logprobs"] - facts["behavior_logprobs"], np.nan)
        return RecordedUse(
            trajectory_id=info.trajectory_id,
            step=self._step,
            use=info.num_uses,
            staleness=info.staleness,
            is_fresh=info.is_fresh,
            tau=0.0,
            prompt_id=row.prompt_id,
            finish_reason=row.finish_reason,
            temperature=row.temperature,
            top_p=row.top_p,
            prompt_token_ids=row.prompt_token_ids.astype(np.int64),
            prompt_text="".join(token_pieces(tokenizer, [], prompt)),
            response_token_ids=row.response_token_ids.astype(np.int64),
            response_pieces=token_pieces(tokenizer, prompt, response),
            token_versions=row.token_versions,
            drift=np.zeros_like(drift) if info.is_fresh else drift,
            engine_logprobs=row.behavior_logprobs.astype(np.float32),
            teacher_logprobs=row.teacher_logprobs.astype(np.float32),
            text_ids=np.array(list(labels), dtype=np.int64),
            texts=tuple(labels.values()),
            **facts,
        )


def _segment_columns(weighed: TokenWeights, row: int, tokens: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    gate, count = weighed.gate, int(tokens["segment_ids"].max()) + 1
    return {
        "is_measured": weighed.measured[row],
        "segment_drift": _numpy(gate.segment_drift[row, :count].float()),
        "segment_gate": _numpy(gate.segment_gate[row, :count].float()),
        "segment_tokens": _numpy(gate.segment_tokens[row, :count]),
    }


def _measured(batch: Microbatch) -> Tensor:
    """[N] bool: the tokens whose drift the gate measures."""
    measured = batch.segments.measured
    return torch.ones_like(batch.valid) if measured is None else batch.to_tokens(measured)


def _numpy(values: Tensor) -> npt.NDArray[Any]:
    """A copy on the CPU; floats as float32."""
    values = values.detach()
    array: npt.NDArray[Any] = (values.float() if values.is_floating_point() else values).cpu().numpy().copy()
    return array


def _plain(config: Any) -> dict[str, Any]:
    """A config part with the names of its choices."""
    return {name: _name(value) for name, value in dataclasses.asdict(config).items()}


def _name(value: Any) -> Any:
    if isinstance(value, list):
        return [_name(item) for item in value]
    return value.name if isinstance(value, Enum) else value
