"""One run from its checked config to its summary: Ray, the groups, evaluation, training, output, clean-up."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from opd_ray.cluster.payload_tasks import RayPayloads
from opd_ray.cluster.placement import cluster_nodes
from opd_ray.cluster.probe import ray_cluster
from opd_ray.cluster.remote_calls import remote_result
from opd_ray.cluster.worker_group import WorkerGroup, worker_env
from opd_ray.config.checks import announcements
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.errors import ActorError, CheckpointError, OpdError
from opd_ray.learner.group import LearnerGroup
from opd_ray.planning.cluster import Cluster
from opd_ray.planning.placement import ResourcePlan, Share, plan_resources
from opd_ray.planning.whole_plan import make_plan
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import Checkpoint, Checkpoints, latest_checkpoint
from opd_ray.run.folder import CONFIG_FILE, RunFolder
from opd_ray.run.resume import checkpoint_to_resume
from opd_ray.run.trajectory_records import RECORDS_FOLDER
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.telemetry.progress import Progress
from opd_ray.training.controller import Controller, Groups, Outputs
from opd_ray.training.evaluator import FOLDER, SamplesFile, evaluate, evaluation_metrics
from opd_ray.training.interrupts import end_on_sigterm, run_interruptible
from opd_ray.training.outputs import RunOutputs
from opd_ray.training.preflight import PreflightReport, preflight
from opd_ray.training.sources import evaluation_problems, model_path, training_prompts
from opd_ray.training.summary import Evaluations, closing_words, shown, summary
from opd_ray.types import Prompt

TEACHER_ENGINE_ROLE = "teacher-engine"
STOP_S = 5.0
SPILL_FOLDER = "spill"
"""Where payloads go that memory has no room for; empty between runs."""

logger = logging.getLogger("opd_ray")


def run_session(cfg: RunConfig, config_yaml: str, config_values: Mapping[str, Any]) -> dict[str, Any]:
    """Run `cfg` to its end; returns the summary that was written, raises `OpdError`.

    An error before training removes the run folder again; from then on the folder stays and tells how far it came.
    """
    prompts = training_prompts(cfg.data, cfg.seed)
    problems = evaluation_problems(cfg)
    checkpoint = checkpoint_to_resume(cfg, config_values)
    if checkpoint is None:
        folder = RunFolder.create(cfg.runs_dir, cfg.run_name)
    else:
        folder = RunFolder.reopen(checkpoint.folder.parents[1])
        sys.stderr.write(
            f"opd_ray: note: resuming {shown(folder.path)} from step {checkpoint.policy_version} "
            "(resume=never starts a new run)\n"
        )
    for text in announcements(cfg):
        sys.stderr.write(f"opd_ray: note: {text}\n")
    log_file = logging.FileHandler(folder.path / "run.log")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(log_file)
    owns_ray = not ray.is_initialized()
    session = Session(cfg, folder, config_values, checkpoint)
    try:
        folder.write_text(CONFIG_FILE, config_yaml)
        return run_interruptible(session.run(prompts, problems))
    except BaseException as error:
        session.note_failure(error)
        raise
    finally:
        logger.removeHandler(log_file)
        log_file.close()
        folder.close()
        if owns_ray and ray.is_initialized():
            ray.shutdown()


@dataclass(slots=True)
class Session:
    """One run's actors, sinks and results."""

    cfg: RunConfig
    folder: RunFolder
    config_values: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    started: float = field(default_factory=time.monotonic)
    evaluations: Evaluations = field(default_factory=Evaluations)
    is_training: bool = False
    _groups: list[WorkerGroup] = field(default_factory=list)
    _outputs: RunOutputs | None = None
    _start_notes: dict[str, int] = field(default_factory=dict)
    _num_redone: int = 0
    _progress: Progress | None = None
    _dashboard: str = ""

    async def run(self, prompts: list[Prompt], problems: list[Prompt]) -> dict[str, Any]:
        """All phases; returns the summary."""
        if self.checkpoint is not None:
            self.evaluations = Evaluations(**self.checkpoint.notes["evaluations"])
        with Progress(self.cfg.num_steps, sys.stderr, self.cfg.telemetry.progress) as self._progress:
            try:
                self._progress.phase("starting Ray")
                plan = self._start_ray()
                self._progress.phase("checking models and prompts")
                cluster, report = await asyncio.gather(ray_cluster(), self._preflight(prompts, problems))
                self._check_memory(cluster, report)
                source = PromptSource([prompts[i] for i in report.kept], self.cfg.seed, self.cfg.data.epochs or None)
                controller = await self._start(plan, report, source, problems)
                await self._train(controller, problems)
                wall_s = time.monotonic() - self.started
                report_of_run = summary(self.cfg, controller.totals, self.evaluations, controller.ledger(), wall_s)
            finally:
                await self._stop()
        self.folder.finish(report_of_run)
        sys.stdout.write(closing_words(self.folder.path, self.evaluations))
        return report_of_run

    def _start_ray(self) -> ResourcePlan:
        if not ray.is_initialized():
            context = ray.init(logging_level=logging.ERROR, log_to_driver=False)
            self._dashboard = f" (Ray dashboard: http://{context.dashboard_url})" if context.dashboard_url else ""
        end_on_sigterm()
        nodes = cluster_nodes()
        return plan_resources(self.cfg, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), nodes)

    def _check_memory(self, cluster: Cluster, report: PreflightReport) -> None:
        """Raise `ResourceError` where a run takes more memory than there is in any case; note what may not fit."""
        student, teacher = report.shapes
        if student is None or teacher is None:
            logger.info("memory is not checked: the number of parameters is unknown")
            return
        found = make_plan(self.cfg, student, teacher, cluster)
        for warning in found.warnings:
            logger.warning(warning)
        found.require_fit()

    async def _preflight(self, prompts: list[Prompt], problems: list[Prompt]) -> PreflightReport:
        paths = model_path(self.cfg.student.path), model_path(self.cfg.teacher.path)
        remote: Any = ray.remote(preflight)
        env = {"env_vars": worker_env(Share(ray_cpus=1, gpus=0, threads=1))}
        ref = remote.options(num_cpus=1, max_retries=0, runtime_env=env).remote(self.cfg, *paths, prompts, problems)
        found: PreflightReport = await remote_result(ref, "preflight", self.cfg.deadline_s)
        return found

    async def _start(
        self, plan: ResourcePlan, report: PreflightReport, source: PromptSource, problems: list[Prompt]
    ) -> Controller:
        """Start all actors, and evaluate teacher and student."""
        cfg = self.cfg
        wants_teacher = problems and cfg.evaluation.teacher and self.evaluations.teacher is None
        engine = self._create_teacher_engine(plan) if wants_teacher else None
        if engine is not None and plan.rollout.gpus:
            # The groups will need its GPU; on CPU it starts beside them, which is faster.
            await self._evaluate_teacher(engine, problems)
        self._phase(f"starting engines, teacher and learner{self._dashboard}")
        groups = self._create_groups(plan, report)
        await asyncio.gather(*(group.ready() for group in self._groups))
        if engine is not None and not plan.rollout.gpus:
            await self._evaluate_teacher(engine, problems)
        outputs = self._open_outputs()
        if problems and cfg.evaluation.before and self.evaluations.before is None:
            self._phase("evaluating the student before training")
            before = await evaluate(cfg, groups.rollout, problems, self._samples_file("before", 0))
            self.evaluations.before = before.as_dict()
            outputs.log(0, evaluation_metrics(before))
        self._start_notes = outputs.notes()
        checkpoints = Checkpoints(
            self.folder.path, cfg.checkpoint.every, cfg.checkpoint.keep, self.config_values, self._notes
        )
        written = Outputs(outputs.step_done, self._go_back_to, checkpoints, self.folder.path / FOLDER)
        controller = Controller(cfg, groups, source, problems, written)
        controller.totals.redone_steps = self._num_redone
        return controller

    def _samples_file(self, moment: str, policy_version: int | None) -> SamplesFile:
        model = self.cfg.teacher if policy_version is None else self.cfg.student
        return SamplesFile(self.folder.path / FOLDER / f"{moment}.parquet", model.path, policy_version)

    def _open_outputs(self) -> RunOutputs:
        if self._progress is None:
            raise RuntimeError("the session is not running: call run")
        self._outputs = RunOutputs(self.cfg.telemetry, self.folder, self.config_values, self._progress)
        if self.checkpoint is not None and (num_redone := self._go_back_to(self.checkpoint)):
            self._num_redone = num_redone
            sys.stderr.write(
                f"opd_ray: note: {num_redone} steps after step {self.checkpoint.policy_version} had no checkpoint yet "
                "and are done again\n"
            )
        return self._outputs

    def _notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of the session."""
        files = {} if self._outputs is None else self._outputs.notes()
        return files | {"evaluations": asdict(self.evaluations)}

    def _go_back_to(self, checkpoint: Checkpoint | None) -> int:
        """Drop what was written since a checkpoint (None: since the start of training); returns how many steps."""
        if self._outputs is None:
            return 0
        notes = self._start_notes if checkpoint is None else checkpoint.notes
        return self._outputs.roll_back_to(notes, 0 if checkpoint is None else checkpoint.policy_version)

    async def _evaluate_teacher(self, engine: RolloutGroup, problems: list[Prompt]) -> None:
        self._phase("evaluating the teacher")
        await engine.ready()
        result = await evaluate(self.cfg, engine, problems, self._samples_file("teacher", None))
        self.evaluations.teacher = result.as_dict()
        engine.shutdown()
        self._groups.remove(engine)

    def _create_groups(self, plan: ResourcePlan, report: PreflightReport) -> Groups:
        cfg = self.cfg
        student, teacher = model_path(cfg.student.path), model_path(cfg.teacher.path)
        spill_folder = self.folder.path / SPILL_FOLDER
        shutil.rmtree(spill_folder, ignore_errors=True)
        spill = SpillSpace(cfg.replay.spill_bytes, spill_folder) if cfg.replay.spill_bytes else None
        store = ReplayStore(StoreConfig.of(cfg), RayPayloads(cfg.deadline_s), spill=spill)
        learner = LearnerGroup.create(cfg, plan.learner, student, str(self.folder.path / RECORDS_FOLDER))
        rollout = RolloutGroup.create(cfg, plan.rollout, [student] * cfg.rollout.num_engines)
        scoring = TeacherGroup.create(cfg, plan.teacher, report.vocab_size, report.tokenizer_fingerprint, teacher)
        self._groups += [learner, rollout, scoring]
        return Groups(rollout=rollout, teacher=scoring, learner=learner, store=store)

    def _create_teacher_engine(self, plan: ResourcePlan) -> RolloutGroup:
        """An engine with the teacher's weights; on CPU it asks Ray for no share, as it only works while others wait."""
        share = Share(ray_cpus=0, gpus=plan.rollout.gpus, threads=plan.rollout.threads)
        engine = RolloutGroup.create(self.cfg, share, [model_path(self.cfg.teacher.path)], TEACHER_ENGINE_ROLE)
        self._groups.append(engine)
        return engine

    async def _train(self, controller: Controller, problems: list[Prompt]) -> None:
        self.is_training = True
        self._phase("training")
        try:
            await controller.train(self.checkpoint)
        finally:
            self._write_ledger(controller)
        if problems:
            self._phase("evaluating the student after training")
            file = self._samples_file("after", controller.totals.steps)
            after = await evaluate(self.cfg, controller.rollout, problems, file)
            self.evaluations.after = after.as_dict()
            if self._outputs is not None:
                self._outputs.log(controller.totals.steps, evaluation_metrics(after))
        self._phase("saving the student")
        await controller.save_student(self.folder.path / "student")

    def _write_ledger(self, controller: Controller) -> None:
        try:
            self.folder.write_json("ledger.json", controller.ledger())
        except OpdError as error:
            # What ended the training is the error to show.
            logger.warning("the ledger could not be written: %s", error)

    def _phase(self, text: str) -> None:
        logger.info(text)
        if self._progress is not None:
            self._progress.phase(text)

    async def _stop(self) -> None:
        """End every actor; engines are asked first, as their interpreter can hang at its exit."""
        stopping = [group.stop() for group in self._groups]
        try:
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*stopping, return_exceptions=True)
        except TimeoutError:
            logger.warning("some actors did not stop within %g s and are killed", STOP_S)
        for group in self._groups:
            group.shutdown()
        if self._outputs is not None:
            self._outputs.close()
        shutil.rmtree(self.folder.path / SPILL_FOLDER, ignore_errors=True)

    def note_failure(self, error: BaseException) -> None:
        """Leave a consistent run folder; none if training had not begun, unless its log holds an actor's traceback."""
        if not self.is_training and self.checkpoint is None and not isinstance(error, ActorError):
            shutil.rmtree(self.folder.path, ignore_errors=True)
            return
        if (latest := self._latest_checkpoint()) is not None:
            sys.stderr.write(f"opd_ray: note: the same command resumes from step {latest.policy_version}\n")
        interrupted = isinstance(error, (KeyboardInterrupt, asyncio.CancelledError))
        logger.error("the run ended early: %s", "interrupted" if interrupted else error)
        self.folder.mark("interrupted" if interrupted else "failed", None if interrupted else str(error))

    def _latest_checkpoint(self) -> Checkpoint | None:
        try:
            return latest_checkpoint(self.folder.path)
        except CheckpointError:
            return None
