"""A learner rank's part of the run and of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.config.schema import RunConfig
from opd_ray.data.packing import Plan
from opd_ray.replay.batch import SampledBatch
from opd_ray.types import SampleInfo, info_values

ROLE = "learner"


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """The config of the run and what it does not say: the rank, where the student is, and its threads.

    `records_folder`, which all ranks share, takes in the trajectories that are recorded; empty = nowhere.
    """

    cfg: RunConfig
    rank: int
    model_path: str
    threads: int
    records_folder: str = ""

    @property
    def name(self) -> str:
        """The rank's name in errors and in the dashboard."""
        return f"{ROLE}-{self.rank}"

    @property
    def num_recorded(self) -> int:
        """Trajectories of a step that are recorded."""
        return self.cfg.telemetry.record_trajectories if self.records_folder else 0


@dataclass(frozen=True, slots=True)
class LostTrajectories:
    """The answer of a step that was not made: the payloads of these trajectories were lost with a node."""

    trajectory_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One rank's part of a step: its microbatches, as places in the step's batch (an empty one is a placeholder).

    `rows` and `infos` are by place, the rank's own only: ``rows[i]`` is (payload, row within it), payloads being
    counted as they are handed to `train_step`. Of the whole step a rank is told whether it `is_fresh`, all trajectories
    of it, and the trajectories at their last use, or lost before it. `policy_version` is the learner's before the step.
    `dumped` are the rank's own places whose trajectories are recorded.
    """

    microbatches: tuple[tuple[int, ...], ...]
    rows: Mapping[int, tuple[int, int]]
    infos: Mapping[int, SampleInfo]
    is_fresh: bool
    last_uses: tuple[int, ...]
    policy_version: int
    dumped: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # As of a `BatchMeta`.
        infos = {place: info_values(info) for place, info in self.infos.items()}
        rest = (self.is_fresh, self.last_uses, self.policy_version, self.dumped)
        return _rank_batch, (self.microbatches, self.rows, infos, *rest)


def _rank_batch(microbatches: Any, rows: Any, infos: Mapping[int, tuple[Any, ...]], *rest: Any) -> RankBatch:
    return RankBatch(microbatches, rows, {place: SampleInfo(*values) for place, values in infos.items()}, *rest)


def rank_batches(  # noqa: PLR0913  (the public surface)
    batch: SampledBatch, plan: Plan, policy_version: int, reuse: int, num_recorded: int = 0, lost: Sequence[int] = ()
) -> list[tuple[RankBatch, list[Any]]]:
    """Each rank's part of `batch`, as `plan` says, with the references of the payloads that it needs.

    `lost` are trajectories of earlier batches that do not come again.
    """
    dumped = recorded_places(len(batch.infos), num_recorded)
    is_fresh = all(info.is_fresh for info in batch.infos)
    last_uses = (*(info.trajectory_id for info in batch.infos if info.num_uses >= reuse), *lost)
    parts = []
    for microbatches in plan:
        places = [place for members in microbatches for place in members]
        number: dict[int, int] = {}
        rows = {place: (number.setdefault(batch.rows[place][0], len(number)), batch.rows[place][1]) for place in places}
        infos = {place: batch.infos[place] for place in places}
        own = tuple(place for place in dumped if place in rows)
        part = RankBatch(microbatches, rows, infos, is_fresh, last_uses, policy_version, own)
        parts.append((part, [batch.refs[payload] for payload in number]))
    return parts


def recorded_places(num_trajectories: int, num_recorded: int) -> tuple[int, ...]:
    """The places of a step's batch that are recorded: evenly spread over it, which is in order of trajectory id.

    They depend on nothing that is random or measured, so a run's second use shows the trajectories of its first, and
    so does the same run with another seed, gate or objective; neighbours, samples of one prompt, are avoided.
    """
    count = min(num_recorded, num_trajectories)
    return tuple(number * num_trajectories // count for number in range(count))
