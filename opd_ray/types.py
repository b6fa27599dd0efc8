"""One immutable record for each stage of a trajectory (see `controller` for the way it takes), and a histogram metric.

Shape letters: B sequences, T response tokens, K top-K, S segments, V vocabulary, H hidden, D ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """Stage 1: one problem of the prompt source.

    `answer` is what a verifier compares with (evaluation only); `solution` is a worked solution that a teacher may be
    shown. `index` is the prompt's row in its source and `epoch` how often the source was gone through before.
    """

    id: str
    problem: str
    answer: str | None = None
    solution: str | None = None
    index: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Stage 3: what one engine is asked for, `num_samples` trajectories for each prompt.

    `trajectory_ids` holds one trajectory id a trajectory, prompt-major: ``trajectory_ids[i * num_samples + j]`` belongs
    to sample j of prompt i; the last prompt may have fewer. A trajectory's sampling seed is derived from the run's seed
    and its trajectory.
    """

    prompts: tuple[Prompt, ...]
    trajectory_ids: tuple[int, ...]
    num_samples: int

    def prompt_of(self, place: int) -> Prompt:
        """The prompt of ``trajectory_ids[place]``."""
        return self.prompts[place // self.num_samples]


@dataclass(frozen=True, slots=True)
class TrajectoryMeta:
    """What the driver and the store know of a trajectory; its payload stays in the object store.

    `row` is its row in the payload's record batch, `oldest_version` the smallest policy version among its tokens.
    """

    trajectory_id: int
    prompt_id: str
    row: int
    num_prompt_tokens: int
    num_response_tokens: int
    oldest_version: int
    newest_version: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class BatchMeta:
    """Stands for one payload (an Arrow record batch) that is somewhere in Ray's object store.

    `busy_s` is the time that the worker spent on it, `num_bytes` the payload's size.
    """

    trajectories: tuple[TrajectoryMeta, ...]
    worker: str
    busy_s: float
    num_bytes: int

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all trajectories together."""
        return sum(t.num_response_tokens for t in self.trajectories)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle goes through Python for every record: eight times as long as for their values.
        rows = tuple(map(_meta_values, self.trajectories))
        return _batch_meta, (rows, self.worker, self.busy_s, self.num_bytes)


_meta_values = attrgetter(*(field.name for field in fields(TrajectoryMeta)))


def _batch_meta(rows: tuple[tuple[Any, ...], ...], worker: str, busy_s: float, num_bytes: int) -> BatchMeta:
    return BatchMeta(tuple(TrajectoryMeta(*row) for row in rows), worker, busy_s, num_bytes)


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """Stage 7: facts that the store hands out with each sampled trajectory.

    `staleness` is in optimizer steps (`replay.staleness`), `uses` counts this use (1 = first), `age_s` is the time
    since it was appended. By `prompt_id` a learner puts the trajectories of a prompt together; empty, it is not known.
    """

    trajectory_id: int
    staleness: int
    num_uses: int
    age_s: float
    num_prompt_tokens: int
    num_response_tokens: int
    prompt_id: str = ""

    @property
    def is_fresh(self) -> bool:
        """First use at staleness 0, where drift is zero by definition."""
        return self.num_uses == 1 and self.staleness == 0


info_values = attrgetter(*(field.name for field in fields(SampleInfo)))
"""The values of a `SampleInfo`, as it takes them."""


@dataclass(frozen=True, slots=True)
class WeightsMeta:
    """Stage 12: names one published set of weights. `checksum` covers names, shapes, dtypes and bytes."""

    policy_version: int
    checksum: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """An engine's answer to stage 12: `policy_version` and `checksum` are those of the weights that it now has.

    `standstill_s` is how long its decoding stood still for them; `num_aborted_tokens` counts response tokens that were
    thrown away and are sampled again (``rollout.on_new_weights=abort``).
    """

    worker: str
    policy_version: int
    checksum: str
    num_bytes: int
    standstill_s: float
    num_aborted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Histogram:
    """A metric that is no single number: `counts` [N] of the values in the bins between rising `edges` [N + 1]."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
