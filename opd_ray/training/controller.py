"""The dataflow of a run; the only module that knows all groups.

::

    rollout loop                                                       learner loop
    ------------                                                       ------------
     1  next prompts                                                    7  store.sample()  <- waits for a batch
     2  store.acquire()   <- waits until the staleness                  8  pack into microbatches, per rank
        bound allows more work                                          9  forward: current log-probs
     3  rollout worker generates    ref ->                             10  drift -> gate -> token weights
     4  teacher worker scores       ref ->                             11  loss, backward, optimizer step
     5  ... and encodes an Arrow record batch                          12  publish weights -> all engines confirm;
     6  store.append()  -> wakes the learner loop                          store.release()  -> wakes the rollout loop

Only references and metadata pass through here; payload bytes go from actor to actor in Ray's object store. The replay
store is an object of this process, and both loops run on one event loop: no ``await`` stands between a check and the
change that it allows. With ``max_staleness=0`` the bound lets the rollout loop continue only when a batch has had all
its uses, so that the two loops take turns: lock-step and overlapped running are the same code.

A rollout or teacher worker that dies is replaced while the others continue (`rollout_loop`). A learner rank that dies
takes the whole run back to the last checkpoint, by the same steps as a resumed run; so does, with the same command, the
death of this process. A node that dies takes its actors with it, and the payloads that it held: such trajectories leave
the store when the learner's ranks find out (`learner_loop`), before any begins the step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.errors import ActorDiedError, LearnerLostError, OpdError
from opd_ray.learner.diagnostics import Metrics
from opd_ray.learner.group import LearnerGroup
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.store import ReplayStore
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import Checkpoint, Checkpoints
from opd_ray.storage.committed_folder import ended_in_thread
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.training.evaluator import SamplesFile, evaluate, evaluation_metrics
from opd_ray.training.learner_loop import LearnerLoop, RunTotals
from opd_ray.training.loop_lag import LoopLag
from opd_ray.training.rollout_loop import RolloutLoop
from opd_ray.training.task_pool import TaskPool, end, first_failure_or
from opd_ray.training.workload import GroupLoad
from opd_ray.types import Histogram, Prompt

logger = logging.getLogger("opd_ray")


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of actors of a run, and its replay store."""

    rollout: RolloutGroup
    teacher: TeacherGroup
    learner: LearnerGroup
    store: ReplayStore


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run's results go.

    `step_done` takes a new policy version, the batch that made it and its metrics, and may block: it runs in a thread.
    After `rolled_back` the steps that follow its checkpoint (None: all) are done again; it returns how many these are.
    Samples of evaluations go to `samples_folder` (None: nowhere).
    """

    step_done: Callable[[int, SampledBatch, Mapping[str, float | Histogram]], None]
    rolled_back: Callable[[Checkpoint | None], int]
    checkpoints: Checkpoints
    samples_folder: Path | None = None


class Controller:
    """Runs the two loops until `num_steps` optimizer steps are done or the prompts have ended."""

    def __init__(
        self, cfg: RunConfig, groups: Groups, source: PromptSource, problems: list[Prompt], outputs: Outputs
    ) -> None:
        self._cfg = cfg
        self._groups = groups
        self._source = source
        self._start_of_data = source.state()
        self._problems = problems
        self._outputs = outputs
        self._loop_lag = LoopLag(cfg.telemetry.max_loop_lag_s)
        self.totals = RunTotals()

    @property
    def rollout(self) -> RolloutGroup:
        """The engines; after `train` they hold the final weights."""
        return self._groups.rollout

    async def train(self, checkpoint: Checkpoint | None = None) -> None:
        """Both loops until the last step, from `checkpoint` on; the first error of either ends both.

        A learner that is lost starts again from the last checkpoint, within `faults.max_restarts`.
        """
        started = time.monotonic()
        lag = asyncio.create_task(self._loop_lag.run())
        try:
            while True:
                try:
                    return await self._run_from(checkpoint)
                except LearnerLostError as error:
                    checkpoint = await self._take_back(error)
        finally:
            await end({lag})
            await self._outputs.checkpoints.stop()
            self.totals.wall_s += time.monotonic() - started

    async def _run_from(self, checkpoint: Checkpoint | None) -> None:
        groups = self._groups
        loads = {
            "rollout": GroupLoad(len(groups.rollout.workers)),
            "teacher": GroupLoad(len(groups.teacher.workers)),
            "learner": GroupLoad(1),
        }
        learning = LearnerLoop(
            self._cfg, (groups.learner, groups.rollout), groups.store, loads, self._outputs.checkpoints, self.totals
        )
        production = RolloutLoop(self._cfg, (groups.rollout, groups.teacher), groups.store, self._source, loads)
        background, learner_loop = TaskPool(), None
        pools = (background, production.requests, production.replacements)
        try:
            await learning.start(checkpoint)
            if checkpoint is not None:
                await groups.store.restore(checkpoint.store)
                production.load_state_dict(checkpoint.rollout_state, groups.store.pending())
            learner_loop = asyncio.create_task(
                learning.run(production.state_dict, lambda batch, metrics: self._step_done(learning, batch, metrics))
            )
            background.start(production.run())
            # The rollout loop ends before the learner loop (end of data) or is ended with it.
            await first_failure_or(learner_loop, *pools)
            # Where the data ended, some trajectories are still on their way; the books close when they are in.
            await production.requests.finish()
        finally:
            tasks = {learner_loop, *(task for pool in pools for task in pool.running)}
            await end({task for task in tasks if task is not None})

    async def _take_back(self, error: LearnerLostError) -> Checkpoint | None:
        """After the loss of the learner: everything but the engines and teachers as it was at the last checkpoint."""
        checkpoints = self._outputs.checkpoints
        if not checkpoints.are_on:
            raise error
        try:
            await checkpoints.settle()
        except OpdError as failed:
            logger.warning("the last checkpoint was not written: %s", failed)
        await self._restart_learner(error)
        checkpoint = checkpoints.latest()
        self._groups.store.reset()
        await self._groups.rollout.abandon()
        self._source.restore(self._start_of_data)
        num_redone = self._outputs.rolled_back(checkpoint)
        self.totals.redone_steps += num_redone
        logger.warning(
            "continuing from %s: %d steps are done again",
            f"step {checkpoint.policy_version}" if checkpoint else "the start, as there is no checkpoint yet",
            num_redone,
        )
        return checkpoint

    async def _restart_learner(self, error: ActorDiedError) -> None:
        while True:
            await self._groups.learner.restart(error)
            try:
                return await self._groups.learner.ready()
            except ActorDiedError as again:
                # The node that it was put on was lost as well, or Ray did not know yet that it was.
                error = again

    async def _step_done(self, learning: LearnerLoop, batch: SampledBatch, metrics: Metrics) -> None:
        groups = self._groups
        for role, counted in (("rollout", groups.rollout), ("teacher", groups.teacher), ("learner", groups.learner)):
            metrics[f"faults/restarts/{role}"] = float(counted.num_restarts)
            metrics[f"faults/unavailable/{role}"] = float(len(counted.unavailable))
        metrics["faults/redone_steps"] = float(self.totals.redone_steps)
        metrics["faults/stale_completions"] = float(groups.store.num_stale_completions)
        metrics |= self._loop_lag.take()
        metrics |= await self._evaluate_in_training(learning)
        await ended_in_thread(self._outputs.step_done, learning.policy_version, batch, metrics)

    async def _evaluate_in_training(self, learning: LearnerLoop) -> dict[str, float]:
        every, version = self._cfg.evaluation.every, learning.policy_version
        if not every or not self._problems or version % every or version == self._cfg.num_steps:
            return {}
        await learning.publish()
        folder = self._outputs.samples_folder
        path = folder / f"step-{version:06d}.parquet" if folder is not None else None
        file = SamplesFile(path, self._cfg.student.path, version) if path is not None else None
        return evaluation_metrics(await evaluate(self._cfg, self._groups.rollout, self._problems, file))

    async def save_student(self, folder: Path) -> None:
        """Write the trained student with `save_pretrained`."""
        await self._groups.learner.save(folder)

    def ledger(self) -> dict[str, int]:
        """Return the store's books; they must balance."""
        return self._groups.store.ledger()
