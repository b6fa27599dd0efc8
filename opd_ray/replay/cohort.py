"""What the store knows of a stored trajectory, and the batch that it hands to the learner."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from opd_ray.errors import StaleBatchError
from opd_ray.replay.payloads import PayloadShelf
from opd_ray.replay.staleness import staleness, staleness_bound
from opd_ray.types import SampleInfo, TrajectoryReceipt, info_values


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """Hop 7: one optimizer step's trajectories, in order of slot number.

    `refs` are the payload references, each once. Trajectory i lies in row ``rows[i][1]`` of payload
    ``refs[rows[i][0]]``, and ``infos[i]`` tells its staleness, visit number and age.
    """

    refs: tuple[Any, ...]
    rows: tuple[tuple[int, int], ...]
    infos: tuple[SampleInfo, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """Slot numbers, as `release` takes them."""
        return tuple(info.slot for info in self.infos)

    def without(self, slots: Collection[int]) -> SampledBatch:
        """The same without `slots`, and without whatever lies in the same payloads."""
        lost = {ref for info, (ref, _) in zip(self.infos, self.rows, strict=True) if info.slot in slots}
        number = {ref: count for count, ref in enumerate(ref for ref in range(len(self.refs)) if ref not in lost)}
        kept = [place for place, (ref, _) in enumerate(self.rows) if ref not in lost]
        return SampledBatch(
            tuple(self.refs[ref] for ref in number),
            tuple((number[self.rows[place][0]], self.rows[place][1]) for place in kept),
            tuple(self.infos[place] for place in kept),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # As of a `BatchReceipt`.
        return _sampled_batch, (self.refs, self.rows, tuple(map(info_values, self.infos)))


def _sampled_batch(
    refs: tuple[Any, ...], rows: tuple[tuple[int, int], ...], infos: tuple[tuple[Any, ...], ...]
) -> SampledBatch:
    return SampledBatch(refs, rows, tuple(SampleInfo(*info) for info in infos))


@dataclass(slots=True)
class StoredTrajectory:
    """A stored trajectory: receipt, payload number, how often it was handed out and given back."""

    receipt: TrajectoryReceipt
    payload_id: int
    appended_s: float
    num_visits: int = 0
    num_releases: int = 0

    def info(self, learner_version: int, first_bound: int, now_s: float) -> SampleInfo:
        """The facts of the next visit, at `learner_version`; raises `StaleBatchError` above the bound."""
        visit = self.num_visits + 1
        age = staleness(self.receipt.oldest_version, learner_version)
        bound = staleness_bound(first_bound, visit)
        if age > bound:
            raise StaleBatchError(
                f"trajectory {self.receipt.slot} is {age} steps old at visit {visit}, bound {bound} "
                f"({first_bound} at the first): each optimizer step must sample exactly once"
            )
        return SampleInfo(
            slot=self.receipt.slot,
            staleness=age,
            visits=visit,
            age_s=now_s - self.appended_s,
            num_prompt_tokens=self.receipt.num_prompt_tokens,
            num_response_tokens=self.receipt.num_response_tokens,
            prompt_id=self.receipt.prompt_id,
        )


def collect(members: Iterable[StoredTrajectory], shelf: PayloadShelf, infos: tuple[SampleInfo, ...]) -> SampledBatch:
    """Group the members' rows by payload; `infos` are in the same order."""
    position: dict[int, int] = {}
    rows = []
    for member in members:
        ref_index = position.setdefault(member.payload_id, len(position))
        rows.append((ref_index, member.receipt.row))
    return SampledBatch(tuple(shelf.ref(payload_id) for payload_id in position), tuple(rows), infos)
