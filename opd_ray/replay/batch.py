"""A stored trajectory, and the batch of one optimizer step that the store hands to the learner."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from opd_ray.errors import StaleBatchError
from opd_ray.replay.staleness import staleness, staleness_bound
from opd_ray.types import SampleInfo, TrajectoryMeta


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """Stage 7: one optimizer step's trajectories, in order of their id.

    `refs` are the payload references, each once. Trajectory i is row ``rows[i][1]`` of payload ``refs[rows[i][0]]``,
    and ``infos[i]`` tells its staleness, number of uses and age.
    """

    refs: tuple[Any, ...]
    rows: tuple[tuple[int, int], ...]
    infos: tuple[SampleInfo, ...]

    @property
    def trajectory_ids(self) -> tuple[int, ...]:
        """Trajectory ids, as `release` takes them."""
        return tuple(info.trajectory_id for info in self.infos)

    def without(self, trajectory_ids: Collection[int]) -> SampledBatch:
        """The batch without `trajectory_ids`, and without all other rows of their payloads."""
        lost = {
            ref for info, (ref, _) in zip(self.infos, self.rows, strict=True) if info.trajectory_id in trajectory_ids
        }
        number = {ref: count for count, ref in enumerate(ref for ref in range(len(self.refs)) if ref not in lost)}
        kept = [place for place, (ref, _) in enumerate(self.rows) if ref not in lost]
        return SampledBatch(
            tuple(self.refs[ref] for ref in number),
            tuple((number[self.rows[place][0]], self.rows[place][1]) for place in kept),
            tuple(self.infos[place] for place in kept),
        )


@dataclass(slots=True)
class StoredTrajectory:
    """A stored trajectory: metadata, payload number, how often it was handed out and given back."""

    meta: TrajectoryMeta
    payload_id: int
    appended_s: float
    num_uses: int = 0
    num_releases: int = 0

    def info(self, learner_version: int, first_bound: int, now_s: float) -> SampleInfo:
        """Facts of the next use, at `learner_version`; raises `StaleBatchError` above the bound."""
        use = self.num_uses + 1
        age = staleness(self.meta.oldest_version, learner_version)
        bound = staleness_bound(first_bound, use)
        if age > bound:
            raise StaleBatchError(
                f"trajectory {self.meta.trajectory_id} is {age} steps old at use {use}, bound {bound} "
                f"({first_bound} at the first): each optimizer step must sample exactly once"
            )
        return SampleInfo(
            trajectory_id=self.meta.trajectory_id,
            staleness=age,
            num_uses=use,
            age_s=now_s - self.appended_s,
            num_prompt_tokens=self.meta.num_prompt_tokens,
            num_response_tokens=self.meta.num_response_tokens,
            prompt_id=self.meta.prompt_id,
        )
