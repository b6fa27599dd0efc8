"""The dataflow of a run; the only module that knows all groups.

    rollout loop                                                        learner loop
    ------------                                                        ------------
    slots = store.acquire_slots()   <- waits until the staleness        batch = store.sample()  <- waits for a cohort
    request -> rollout engine          bound allows more work           step on all ranks
        payload ref -> teacher                                          publish weights -> all engines confirm
            scored ref -> store.append()  -> wakes the learner loop     store.release()  -> wakes the rollout loop

Only references and receipts pass through here; payload bytes go from actor to actor. With ``max_staleness=0`` the bound
lets the rollout loop go on only when a cohort has had all its visits, so that the two loops take turns: lock-step and
overlapped running are the same code.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.actors.group import remote_result
from opd_ray.actors.learner.diagnostics import Metrics
from opd_ray.actors.learner.group import LearnerGroup
from opd_ray.actors.learner.step_report import step_metrics
from opd_ray.actors.rollout import RolloutGroup
from opd_ray.actors.teacher import TeacherGroup
from opd_ray.choices import GateKind
from opd_ray.config import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.evaluation.scoring import EvaluationResult, score
from opd_ray.replay.cohort import SampledBatch
from opd_ray.types import BatchReceipt, Histogram, Prompt, RolloutRequest
from opd_ray.workload import GroupLoad, pipeline_metrics

LogMetrics = Callable[[int, Mapping[str, float | Histogram]], None]

logger = logging.getLogger("opd_ray")


@dataclass(slots=True)
class RunTotals:
    """What the summary tells of the training part."""

    steps: int = 0
    trained_tokens: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Groups:
    """The actors of a run; `store` is the handle of the replay store."""

    rollout: RolloutGroup
    teacher: TeacherGroup
    learner: LearnerGroup
    store: Any


class Controller:
    """Runs the two loops until `num_steps` optimizer steps are done or the prompts have ended."""

    def __init__(
        self,
        cfg: RunConfig,
        groups: Groups,
        source: PromptSource,
        problems: list[Prompt],
        log_metrics: LogMetrics,
    ) -> None:
        self._cfg = cfg
        self._groups = groups
        self._source = source
        self._problems = problems
        self._log_metrics = log_metrics
        self._loads = {
            "rollout": GroupLoad(len(groups.rollout.workers)),
            "teacher": GroupLoad(len(groups.teacher.workers)),
            "learner": GroupLoad(1),
        }
        self._policy_version = 0
        self._published_version = 0
        self._producers: set[asyncio.Task[None]] = set()
        self._support_alarm = False
        self.totals = RunTotals()

    async def train(self) -> None:
        """Both loops until the last step; the first error of either ends both."""
        started = time.monotonic()
        rollout_loop = asyncio.create_task(self._rollout_loop())
        learner_loop = asyncio.create_task(self._learner_loop())
        try:
            # The rollout loop ends before the learner loop (end of data) or is ended with it.
            await _first_failure_or(learner_loop, rollout_loop, self._producers)
            # Where the data ended, some trajectories are still on their way; the books close when they are in.
            await asyncio.gather(*self._producers)
        finally:
            await _end({rollout_loop, learner_loop, *self._producers})
            self.totals.wall_s = time.monotonic() - started

    async def _store(self, ref: Any) -> Any:
        return await remote_result(ref, "replay-store", self._cfg.deadline_s)

    async def _rollout_loop(self) -> None:
        """Start a request whenever the store has room for it; woken by `store.release`."""
        engines = self._groups.rollout.workers
        samples = self._cfg.rollout.samples_per_prompt
        for turn in itertools.count():
            count = self._prompts_of_turn(turn, len(engines))
            slots = await self._store(self._groups.store.acquire_slots.remote(count * samples))
            # The store may have room for a part of a group only, after failures.
            prompts = self._next_prompts(-(-len(slots) // samples))
            used, unused = slots[: len(prompts) * samples], slots[len(prompts) * samples :]
            if used:
                self._start_producer(RolloutRequest(tuple(prompts), tuple(used), samples))
            if unused:
                await self._store(self._groups.store.fail.remote(unused, "end_of_data"))
                await self._store(self._groups.store.end_of_data.remote())
                return

    def _prompts_of_turn(self, turn: int, num_engines: int) -> int:
        """A step's prompts are split over the engines as evenly as whole prompts allow."""
        whole, rest = divmod(self._cfg.rollout.prompts_per_step, num_engines)
        return whole + (turn % num_engines < rest)

    def _next_prompts(self, count: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        for prompt in self._source:
            prompts.append(prompt)
            if len(prompts) == count:
                break
        return prompts

    def _start_producer(self, request: RolloutRequest) -> None:
        # Chosen here and not in the task, which starts later: the next request must see this one.
        engine = self._loads["rollout"].least_loaded()
        self._loads["rollout"].begin(engine, len(request.slots))
        self._producers.add(asyncio.create_task(self._produce(request, engine)))

    async def _produce(self, request: RolloutRequest, engine: int) -> None:
        """Hops 3 to 6 of one request: sample, score, store."""
        groups = self._groups
        try:
            payload, receipt_ref = groups.rollout.workers[engine].generate.options(num_returns=2).remote(request)
            receipt: BatchReceipt = await groups.rollout.result(receipt_ref, engine)
        finally:
            self._loads["rollout"].end(engine, len(request.slots))
        self._loads["rollout"].done(receipt.busy_s, receipt.num_response_tokens)
        load = self._loads["teacher"]
        teacher = load.least_loaded()
        with load.call(teacher, receipt.num_response_tokens):
            scored, scored_receipt_ref = (
                groups.teacher.workers[teacher].score.options(num_returns=2).remote(payload, receipt, request.prompts)
            )
            scored_receipt: BatchReceipt = await groups.teacher.result(scored_receipt_ref, teacher)
        load.done(scored_receipt.busy_s, scored_receipt.num_response_tokens)
        # In a list, so that Ray hands the reference on and not the payload.
        await self._store(groups.store.append.remote(scored_receipt, [scored]))

    async def _learner_loop(self) -> None:
        """One optimizer step a turn; woken by `store.append`."""
        while self._policy_version < self._cfg.num_steps:
            begun = time.monotonic()
            batch: SampledBatch | None = await self._store(
                self._groups.store.sample.remote(self._cfg.trajectories_per_step, self._policy_version)
            )
            waited = time.monotonic() - begun
            if batch is None:
                break
            metrics = await self._step(batch)
            metrics["time/wait_for_batch_s"] = waited
            step_s = time.monotonic() - begun
            metrics["time/step_s"] = step_s
            metrics["time/tokens_per_s"] = sum(info.num_response_tokens for info in batch.infos) / step_s
            metrics |= await self._evaluate_in_training()
            self._log_metrics(self._policy_version, metrics)
        await self.publish()

    def _warn_of_support(self, metrics: Metrics) -> None:
        """Say once that the loss looks at too little of the student's distribution."""
        if metrics.get("support/alarm") == 1.0 and not self._support_alarm:
            self._support_alarm = True
            logger.warning(
                "step %d: the student's mean mass on the support is %.3f, below telemetry.min_support_mass=%g: what it "
                "does outside is invisible to the loss; raise teacher.top_k, or choose an objective with a tail",
                self._policy_version,
                metrics["support/student_mass/mean"],
                self._cfg.telemetry.min_support_mass,
            )

    async def _step(self, batch: SampledBatch) -> Metrics:
        begun = time.monotonic()
        with self._loads["learner"].call(0, len(batch.slots)):
            reports = await self._groups.learner.train_step(batch, self._policy_version)
        metrics = step_metrics(
            reports,
            is_gated=self._cfg.gate.kind is not GateKind.off,
            min_support_mass=self._cfg.telemetry.min_support_mass,
        )
        self._warn_of_support(metrics)
        num_tokens = sum(report.num_tokens for report in reports)
        self._loads["learner"].done(time.monotonic() - begun, num_tokens)
        self._policy_version += 1
        self.totals.steps += 1
        self.totals.trained_tokens += num_tokens
        visits = max(info.visits for info in batch.infos)
        begun = time.monotonic()
        if self._cfg.replay.max_staleness > 0 or visits >= self._cfg.replay.reuse:
            # In lock-step no engine samples between two visits of the same batch: nothing would see these weights.
            await self.publish()
        metrics["time/publish_s"] = time.monotonic() - begun
        await self._store(self._groups.store.release.remote(batch.slots, self._policy_version))
        return metrics | pipeline_metrics(self._loads) | await self._batch_metrics(batch)

    async def _batch_metrics(self, batch: SampledBatch) -> Metrics:
        staleness = [info.staleness for info in batch.infos]
        state = await self._store(self._groups.store.state.remote())
        lengths: Metrics = await self._store(self._groups.store.lengths.remote())
        return {
            "replay/staleness/max": float(max(staleness)),
            "replay/staleness/mean": sum(staleness) / len(staleness),
            "replay/visits/max": float(max(info.visits for info in batch.infos)),
            "replay/age_s/max": max(info.age_s for info in batch.infos),
            "rollout/response_tokens/mean": sum(i.num_response_tokens for i in batch.infos) / len(batch.infos),
            **{f"replay/{name}": float(value) for name, value in state.items()},
            # What was trained and what was dropped, by response length: a store that drops the long ones shows here.
            **{f"replay/{name}": value for name, value in lengths.items()},
        }

    async def publish(self) -> None:
        """Hop 12: hand the learner's weights to all engines, and wait until each confirmed version and checksum."""
        if self._published_version == self._policy_version:
            return
        receipt, buckets = await self._groups.learner.export(self._policy_version)
        await self._groups.rollout.all(lambda engine: engine.load_weights.remote(receipt, *buckets))
        self._published_version = self._policy_version

    async def _evaluate_in_training(self) -> dict[str, float]:
        every = self._cfg.evaluation.every
        if (
            not every
            or not self._problems
            or self._policy_version % every
            or self._policy_version == self._cfg.num_steps
        ):
            return {}
        await self.publish()
        return evaluation_metrics(await evaluate(self._cfg, self._groups.rollout, self._problems))

    @property
    def rollout(self) -> RolloutGroup:
        """The engines; after `train` they hold the final weights."""
        return self._groups.rollout

    async def save_student(self, folder: Path) -> None:
        """Write the trained student with `save_pretrained`."""
        await self._groups.learner.save(folder)

    async def ledger(self) -> dict[str, int]:
        """The store's books; they must balance."""
        books: dict[str, int] = await self._store(self._groups.store.ledger.remote())
        return books


async def evaluate(cfg: RunConfig, engines: RolloutGroup, problems: list[Prompt]) -> EvaluationResult:
    """Sample and grade n answers to every problem with the engines' current weights."""
    begun = time.monotonic()
    completions = await engines.complete(problems, cfg.evaluation.samples_per_problem)
    wall_s = time.monotonic() - begun
    return score(problems, completions, cfg.evaluation.answer_format, wall_s=wall_s)


def evaluation_metrics(result: EvaluationResult) -> dict[str, float]:
    """An evaluation's figures as metrics."""
    return {f"evaluation/{name}": float(value) for name, value in result.as_dict().items()}


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended, whatever they make of it; their results and errors are dropped."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _first_failure_or(
    main: asyncio.Task[None], helper: asyncio.Task[None], producers: set[asyncio.Task[None]]
) -> None:
    """Wait for `main`; an error of `helper` or of any producer is raised at once. Ended producers are forgotten."""
    while not main.done():
        waiting = {main, *producers} | (set() if helper.done() else {helper})
        # The timeout takes in producers that were started meanwhile.
        done, _ = await asyncio.wait(waiting, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            producers.discard(task)
            if task is not main:
                task.result()
    main.result()
