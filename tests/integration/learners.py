"""Learner ranks that outlive a run, because DeepSpeed takes seconds to import: the next run trains in them, too."""

from __future__ import annotations

from dataclasses import replace

from opd_ray.cluster.worker_group import MALLOC_ENV
from opd_ray.config.schema import RunConfig
from opd_ray.learner.group import LearnerGroup, LearnerWorker
from opd_ray.learner.spec import ROLE, LearnerSpec
from opd_ray.planning.placement import Share

NO_SHARE = Share(0.0, 0.0, 1)


class ReusedWorker(LearnerWorker):
    """A rank that trains one run after the other; the ranks meet once."""

    def renew(self, spec: LearnerSpec) -> None:
        """Forget the run before; `setup` follows."""
        self._spec, self._trainer = spec, None

    def setup(self, host: str, port: int) -> int:
        import torch

        # As in a new process, the same in every run.
        torch.manual_seed(self._spec.rank)
        return super().setup(host, port)

    def stop(self) -> None:
        """Stay in the process group."""


class ReusedGroup(LearnerGroup):
    """All ranks of one size of the group."""

    def begin(self, cfg: RunConfig, path: str) -> None:
        """What `LearnerGroup.create` does, with the processes that are there."""
        self.deadline_s, self.num_restarts, self._max_restarts = cfg.deadline_s, 0, cfg.faults.max_restarts
        self.tokens_per_microbatch, self.reuse = cfg.learner.tokens_per_microbatch, cfg.replay.reuse
        self._lost = []
        specs = [(LearnerSpec(cfg, rank, path, NO_SHARE.threads, ""),) for rank in range(cfg.learner.num_ranks)]
        if self._recipe is None:
            self.start(ReusedWorker, NO_SHARE, specs, MALLOC_ENV, cfg.placement.learner)
            return
        # Ranks that replace these in the run begin with its part of the config, too.
        self._recipe = replace(self._recipe, args=tuple(specs))
        for worker, (spec,) in zip(self.workers, specs, strict=True):
            worker.renew.remote(spec)

    def end(self) -> None:
        super().shutdown()

    def shutdown(self) -> None:
        """The run is over, and the processes wait for the next one."""


class Learners:
    """A group of each size, started when it is first asked for."""

    def __init__(self) -> None:
        self._groups: dict[int, ReusedGroup] = {}

    def create(self, cfg: RunConfig, path: str) -> LearnerGroup:
        """Like `LearnerGroup.create`; one run at a time."""
        size = cfg.learner.num_ranks
        group = self._groups.setdefault(size, ReusedGroup(ROLE, cfg.deadline_s))
        group.begin(cfg, path)
        return group

    def end(self) -> None:
        """End the processes."""
        for group in self._groups.values():
            group.end()
