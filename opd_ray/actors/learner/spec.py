"""What a learner rank is told: its part of the config, and its part of each step."""

from __future__ import annotations

from dataclasses import dataclass

from opd_ray.config import GateConfig, LearnerConfig, ObjectiveConfig, RunConfig
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
    """One rank's part of a step: microbatches of indices into `rows` and `infos` (an empty one is a placeholder).

    ``rows[i]`` is (payload, row within it), payloads being counted as they are handed to `train_step`. `policy_version`
    is the learner's before the step.
    """

    microbatches: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, int], ...]
    infos: tuple[SampleInfo, ...]
    policy_version: int
