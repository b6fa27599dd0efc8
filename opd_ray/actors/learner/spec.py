"""What a learner rank is told: its part of the config, and its part of each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_ray.config import GateConfig, LearnerConfig, ObjectiveConfig, RunConfig
from opd_ray.data.packing import Plan
from opd_ray.replay.cohort import SampledBatch
from opd_ray.types import SampleInfo

ROLE = "learner"


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """A rank's part of the config."""

    name: str
    rank: int
    num_ranks: int
    model_path: str
    learner: LearnerConfig
    objective: ObjectiveConfig
    gate: GateConfig
    reuse: int
    num_steps: int
    publish_dtype: str
    threads: int
    seed: int
    probe_positions: int

    @classmethod
    def of(cls, cfg: RunConfig, rank: int, model_path: str, threads: int) -> LearnerSpec:
        """The part of `cfg` for one rank that trains the student of `model_path`."""
        return cls(
            name=f"{ROLE}-{rank}",
            rank=rank,
            num_ranks=cfg.learner.num_ranks,
            model_path=model_path,
            learner=cfg.learner,
            objective=cfg.objective,
            gate=cfg.gate,
            reuse=cfg.replay.reuse,
            num_steps=cfg.num_steps,
            publish_dtype=cfg.student.dtype.name,
            threads=threads,
            seed=cfg.seed,
            probe_positions=cfg.telemetry.probe_positions,
        )


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One rank's part of a step: its microbatches, as places in the step's batch (an empty one is a placeholder).

    `rows` and `infos` are by place, the rank's own only: ``rows[i]`` is (payload, row within it), payloads being
    counted as they are handed to `train_step`. Of the whole step a rank is told whether it `is_fresh`, all trajectories
    of it, and the slots at their last visit. `policy_version` is the learner's before the step.
    """

    microbatches: tuple[tuple[int, ...], ...]
    rows: Mapping[int, tuple[int, int]]
    infos: Mapping[int, SampleInfo]
    is_fresh: bool
    last_visits: tuple[int, ...]
    policy_version: int


def rank_batches(batch: SampledBatch, plan: Plan, policy_version: int, reuse: int) -> list[tuple[RankBatch, list[Any]]]:
    """Each rank's part of `batch`, as `plan` says, with the references of the payloads that it needs."""
    is_fresh = all(info.is_fresh for info in batch.infos)
    last_visits = tuple(info.slot for info in batch.infos if info.visits >= reuse)
    parts = []
    for microbatches in plan:
        places = [place for members in microbatches for place in members]
        number: dict[int, int] = {}
        rows = {place: (number.setdefault(batch.rows[place][0], len(number)), batch.rows[place][1]) for place in places}
        infos = {place: batch.infos[place] for place in places}
        part = RankBatch(microbatches, rows, infos, is_fresh, last_visits, policy_version)
        parts.append((part, [batch.refs[payload] for payload in number]))
    return parts
