"""The fault policy: who is restarted when an actor dies, and how often. `faults.*` of the config sets the bounds.

- A rollout or teacher worker dies: the others take over its requests, and a new actor replaces it meanwhile; at most
  `max_restarts` actors of a group in a run.
- A learner rank dies: all ranks restart and the run returns to its last checkpoint; at most `max_restarts` times.
- A request meets one death after another: it is sent `max_attempts` times, then its trajectories count as failed.
- The driver dies: the same command resumes from the last checkpoint, however often.

`RestartBudget` counts the restarts of one group and `cluster.worker_group` carries them out; attempts are counted where
requests are sent, in `training.rollout_loop`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from opd_ray.errors import ActorDiedError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RestartBudget:
    """The restarts of one group in a run: at most `limit`."""

    role: str
    limit: int
    used: int = 0

    def spend(self, error: ActorDiedError) -> None:
        """Count one restart, because of `error`; raises `ActorDiedError` when none is left."""
        if self.used >= self.limit:
            raise ActorDiedError(
                f"{error}; {self.used} of group {self.role} were replaced before, faults.max_restarts={self.limit}: "
                "mend the cause, then start again with resume=auto"
            ) from error
        self.used += 1
        logger.warning("%s; it is replaced (%d of at most %d)", error, self.used, self.limit)
