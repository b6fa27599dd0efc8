"""Cache of old log-probs: the engine's, or the learner's own of a first use at staleness 0.

Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.config.choices import BehaviorSource
from opd_ray.learner.microbatch import Microbatch


@dataclass(frozen=True, slots=True)
class Behavior:
    """Behaviour log-probs of a microbatch: `logprobs` [N]; `from_engine` tells for each trajectory whose they are."""

    logprobs: Tensor
    from_engine: tuple[bool, ...]


class OldLogprobsCache:
    """The learner's own log-probs of trajectories that it saw fresh, kept for their later uses.

    Attributes:
        entries: [T] float32 by trajectory.
    """

    def __init__(self, source: BehaviorSource, reuse: int) -> None:
        self._uses_own = source is BehaviorSource.learner
        self._reuse = reuse
        self.entries: dict[int, Tensor] = {}

    @property
    def remembers(self) -> bool:
        """Whether log-probs of fresh trajectories are needed for a later use."""
        return self._uses_own and self._reuse > 1

    def behavior(self, batch: Microbatch, current: Tensor | None) -> Behavior:
        """Behaviour log-probs by the configured source; remembers those of fresh trajectories.

        `current` [N] are the learner's own now (None: not computed; then the engine's stand in, and nothing is
        remembered).
        """
        lengths = list(batch.block.lengths)
        engine = torch.split(batch.engine_logprobs, lengths)
        own = [None] * len(engine) if current is None else list(torch.split(current.detach().float(), lengths))
        parts, from_engine = [], []
        for info, fresh, mine, theirs in zip(batch.infos, batch.fresh, own, engine, strict=True):
            known = mine if fresh and self._uses_own else self.entries.get(info.trajectory_id) if not fresh else None
            if known is not None and fresh and self.remembers:
                self.entries[info.trajectory_id] = known.clone()
            parts.append(theirs if known is None else known)
            from_engine.append(known is None)
        return Behavior(torch.cat(parts), tuple(from_engine))

    def forget(self, trajectory_ids: Sequence[int]) -> None:
        """Drop trajectories that had their last use, this rank's or another's."""
        for trajectory_id in trajectory_ids:
            self.entries.pop(trajectory_id, None)
