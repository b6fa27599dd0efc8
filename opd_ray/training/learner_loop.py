"""The learner loop: take one optimizer step per iteration, publish the weights, release the batch.

The learner's version is ahead of the published one only between two uses of a batch in lock-step: no engine samples
then, and nothing would see the weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from opd_ray.config.choices import GateKind
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ActorDiedError, LearnerLostError
from opd_ray.learner.diagnostics import Metrics
from opd_ray.learner.group import LearnerGroup
from opd_ray.learner.spec import LostTrajectories
from opd_ray.learner.step_report import RankReport, step_metrics
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.checkpoint import StoreImage
from opd_ray.replay.store import ReplayStore
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import LEARNER, STORE, STUDENT, Checkpoint, CheckpointDraft, Checkpoints
from opd_ray.training.workload import GroupLoad, pipeline_metrics
from opd_ray.types import LoadResult

RolloutState = Callable[[], dict[str, Any]]
StepDone = Callable[[SampledBatch, Metrics], Awaitable[None]]

_T = TypeVar("_T")

logger = logging.getLogger("opd_ray")


@dataclass(slots=True)
class RunTotals:
    """Totals of the training part, for the summary."""

    steps: int = 0
    trained_tokens: int = 0
    lost_trajectories: int = 0
    redone_steps: int = 0
    wall_s: float = 0.0


class LearnerLoop:
    """Trains on what the store has, until `num_steps` are done or no batch can be had any more."""

    def __init__(  # noqa: PLR0913  (what a loop joins)
        self,
        cfg: RunConfig,
        groups: tuple[LearnerGroup, RolloutGroup],
        store: ReplayStore,
        loads: Mapping[str, GroupLoad],
        checkpoints: Checkpoints,
        totals: RunTotals,
    ) -> None:
        self._cfg = cfg
        self._learner, self._engines = groups
        self._store = store
        self._loads = loads
        self._checkpoints = checkpoints
        self._support_alarm = False
        self._published_version = -1
        self._totals = totals
        self.policy_version = 0

    async def run(self, rollout_state: RolloutState, step_done: StepDone) -> None:
        """Train until the end; woken by `store.append`.

        `rollout_state` is the rollout loop's `state_dict`, for checkpoints; `step_done` takes each step's batch and
        metrics.
        """
        while self.policy_version < self._cfg.num_steps and await self._iterate(rollout_state, step_done):
            self._checkpoints.raise_failure()
        await self.publish()
        await self._checkpoints.settle()

    async def _iterate(self, rollout_state: RolloutState, step_done: StepDone) -> bool:
        """One optimizer step; False when there is no batch for it any more."""
        begun = time.monotonic()
        batch = await self._store.sample(self._cfg.trajectories_per_step, self.policy_version)
        if batch is None:
            return False
        waited = time.monotonic() - begun
        trained, metrics = await self._train(batch)
        if trained is None:
            await self._skip(batch)
            return True
        draft, image = None, None
        try:
            if self._checkpoints.is_due(self.policy_version):
                draft = await self._checkpoints.begin(self.policy_version)
            metrics |= await self._publish(batch, draft)
            # No await from here until the image is taken: store, prompts and learner of one instant.
            self._store.release(batch.trajectory_ids, self.policy_version)
            if draft is not None:
                image, draft.rollout_state = self._store.freeze(), rollout_state()
            metrics |= pipeline_metrics(self._loads) | _batch_metrics(trained, self._store)
            step_s = time.monotonic() - begun
            metrics["time/wait_for_batch_s"] = waited
            metrics["time/step_s"] = step_s
            metrics["time/tokens_per_s"] = sum(info.num_response_tokens for info in trained.infos) / step_s
            await step_done(trained, metrics)
        except BaseException:
            if draft is not None:
                await self._checkpoints.discard(draft)
            raise
        if draft is not None and image is not None:
            self._commit(draft, image)
        return True

    def _commit(self, draft: CheckpointDraft, image: StoreImage) -> None:
        """Write the payloads and commit while training continues."""
        self._checkpoints.commit(draft, lambda: self._store.write(image, draft.part(STORE)))

    async def start(self, checkpoint: Checkpoint | None) -> None:
        """Load a checkpoint's learner (None: the model as it is), and give its weights to all engines.

        Raises `CheckpointError` when the learner's state is missing, damaged or of another model.
        """
        if checkpoint is not None:
            await self._ask(self._learner.load_checkpoint(checkpoint.learner))
            self.policy_version = self._totals.steps = checkpoint.policy_version
        await self.publish()

    async def _publish(self, batch: SampledBatch, draft: CheckpointDraft | None) -> Metrics:
        """Publish after a step on what was left of `batch`, where something needs the weights; save the learner."""
        metrics: Metrics = {}
        uses = max(info.num_uses for info in batch.infos)
        # A checkpoint may find that the rest of a batch is lost, and then rollout starts at once.
        if self._cfg.replay.max_staleness > 0 or uses >= self._cfg.replay.reuse or draft is not None:
            metrics |= await self.publish()
        if draft is not None:
            begun = time.monotonic()
            await self._ask(self._learner.save_checkpoint(draft.part(LEARNER)))
            await self._ask(self._learner.save(draft.folder / STUDENT))
            metrics["time/checkpoint_s"] = time.monotonic() - begun
        return metrics

    async def _train(self, batch: SampledBatch) -> tuple[SampledBatch | None, Metrics]:
        """One optimizer step on what of `batch` is there; what was trained on (None: all of it is lost)."""
        begun = time.monotonic()
        with self._loads["learner"].call(0, len(batch.trajectory_ids)):
            while isinstance(answer := await self._try_to_train(batch), LostTrajectories):
                left = batch.without(answer.trajectory_ids)
                self._totals.lost_trajectories += len(batch.trajectory_ids) - len(left.trajectory_ids)
                logger.warning(
                    "step %d: %d of %d trajectories were lost with a node; the step uses the others",
                    self.policy_version + 1,
                    len(batch.trajectory_ids) - len(left.trajectory_ids),
                    len(batch.trajectory_ids),
                )
                self._store.drop_lost(answer.trajectory_ids)
                batch = left
                if not batch.trajectory_ids:
                    return None, {}
        return batch, self._counted(answer, begun)

    async def _try_to_train(self, batch: SampledBatch) -> list[RankReport] | LostTrajectories:
        answer = await self._ask(self._learner.train_step(batch, self.policy_version))
        if not isinstance(answer, LostTrajectories):
            self.policy_version += 1
        return answer

    async def _skip(self, batch: SampledBatch) -> None:
        """Release a batch of which nothing is left, without a step.

        In lock-step the engines may be uses behind: what they sample for the next batch would be too old.
        """
        await self.publish()
        self._store.release(batch.trajectory_ids, self.policy_version)

    def _counted(self, reports: list[RankReport], begun: float) -> Metrics:
        metrics = step_metrics(
            reports,
            is_gated=self._cfg.gate.kind is not GateKind.off,
            min_support_mass=self._cfg.telemetry.min_support_mass,
        )
        self._warn_of_support(metrics)
        num_tokens = sum(report.num_tokens for report in reports)
        self._loads["learner"].done(time.monotonic() - begun, num_tokens)
        self._totals.steps = self.policy_version
        self._totals.trained_tokens += num_tokens
        metrics["faults/lost_trajectories"] = float(self._totals.lost_trajectories)
        return metrics

    async def publish(self) -> Metrics:
        """Stage 12: hand the learner's weights to all engines, and wait until each confirmed version and checksum."""
        if self._published_version == self.policy_version:
            return {}
        begun = time.monotonic()
        meta, buckets = await self._ask(self._learner.export(self.policy_version))
        loaded: list[LoadResult] = await self._engines.publish(meta, buckets)
        self._published_version = self.policy_version
        return {
            "time/publish_s": time.monotonic() - begun,
            "publish/bytes": float(meta.num_bytes),
            "publish/standstill_s/max": max((engine.standstill_s for engine in loaded), default=0.0),
            "publish/aborted_tokens": float(sum(engine.num_aborted_tokens for engine in loaded)),
        }

    async def _ask(self, answer: Awaitable[_T]) -> _T:
        """What the learner gives back; raises `LearnerLostError` if one of its ranks died."""
        try:
            return await answer
        except ActorDiedError as error:
            raise LearnerLostError(str(error)) from error

    def _warn_of_support(self, metrics: Metrics) -> None:
        """Say once that the loss looks at too little of the student's distribution."""
        if metrics.get("support/alarm") == 1.0 and not self._support_alarm:
            self._support_alarm = True
            logger.warning(
                "step %d: the student's mean mass on the support is %.3f, below telemetry.min_support_mass=%g: what it "
                "does outside is invisible to the loss; raise teacher.top_k, or choose an objective with a tail",
                self.policy_version,
                metrics["support/student_mass/mean"],
                self._cfg.telemetry.min_support_mass,
            )


def _batch_metrics(batch: SampledBatch, store: ReplayStore) -> Metrics:
    staleness = [info.staleness for info in batch.infos]
    return {
        "replay/staleness/max": float(max(staleness)),
        "replay/staleness/mean": sum(staleness) / len(staleness),
        "replay/uses/max": float(max(info.num_uses for info in batch.infos)),
        "replay/age_s/max": max(info.age_s for info in batch.infos),
        "rollout/response_tokens/mean": sum(i.num_response_tokens for i in batch.infos) / len(batch.infos),
        **{f"replay/{name}": float(value) for name, value in store.counts().items()},
        # What was trained and what was dropped, by response length: a store that drops the long ones shows here.
        **{f"replay/{name}": value for name, value in store.lengths().items()},
    }
