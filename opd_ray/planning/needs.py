"""All groups' needs of a run: its config and the two models' shapes become the inputs of the estimators."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opd_ray.config.choices import Dtype, Offload, TeacherBackend
from opd_ray.config.schema import RunConfig
from opd_ray.planning.amounts import GIB, WorkerNeed
from opd_ray.planning.learner_need import LearnerInput, learner_need
from opd_ray.planning.model_shape import ModelShape
from opd_ray.planning.payload import StoreNeed, store_need
from opd_ray.planning.placement import ResourcePlan
from opd_ray.planning.serving_need import RolloutInput, TeacherInput, rollout_need, teacher_need

_ITEM_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Needs:
    """What every group takes, in the order in which a run creates them, with the inputs that say so.

    `teacher_engine` is the engine that evaluates the teacher before training (None: nothing is evaluated).
    """

    learner: WorkerNeed
    rollout: WorkerNeed
    teacher: WorkerNeed
    teacher_engine: WorkerNeed | None
    store: StoreNeed
    learner_input: LearnerInput
    rollout_input: RolloutInput
    student: ModelShape
    teacher_shape: ModelShape

    @property
    def workers(self) -> tuple[WorkerNeed, ...]:
        """The three groups."""
        return self.learner, self.rollout, self.teacher

    @property
    def workers_and_engine(self) -> tuple[WorkerNeed, ...]:
        """The three groups, and the engine of the teacher's evaluation where there is one."""
        return self.workers if self.teacher_engine is None else (*self.workers, self.teacher_engine)

    @property
    def weight_bytes(self) -> float:
        """One published version of the weights."""
        return float(self.student.num_parameters * self.learner_input.publish_bytes)

    @property
    def gradient_bytes(self) -> float:
        """The gradients of one rank."""
        return float(self.student.num_parameters * self.learner_input.item_bytes)


def run_needs(
    cfg: RunConfig, student: ModelShape, teacher: ModelShape, shares: ResourcePlan, gpu_bytes: float | None
) -> Needs:
    """The needs of `cfg`; `gpu_bytes` is the memory of the smallest GPU (None: unknown, or there is none)."""
    learner = learner_input(cfg, student, shares)
    rollout = _rollout_input(cfg, student, shares, gpu_bytes)
    return Needs(
        learner=learner_need(learner),
        rollout=rollout_need(rollout),
        teacher=_teacher_need(cfg, teacher, shares, gpu_bytes),
        teacher_engine=_teacher_engine_need(cfg, teacher, rollout),
        store=store_need(cfg, float(student.num_parameters * learner.publish_bytes)),
        learner_input=learner,
        rollout_input=rollout,
        student=student,
        teacher_shape=teacher,
    )


def full_length(cfg: RunConfig) -> int:
    """Tokens of the longest trajectory."""
    return cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens


def learner_input(cfg: RunConfig, student: ModelShape, shares: ResourcePlan) -> LearnerInput:
    """The learner's part."""
    longest = full_length(cfg)
    rows = math.ceil(cfg.trajectories_per_step / cfg.learner.num_ranks)
    # A microbatch is filled up to its budget, a longer trajectory has one of its own (`data.packing`).
    tokens = min(max(cfg.learner.tokens_per_microbatch, longest), rows * longest)
    return LearnerInput(
        shape=student,
        num_ranks=cfg.learner.num_ranks,
        gpus=cfg.learner.num_gpus,
        cpus=shares.learner.ray_cpus,
        zero_stage=cfg.learner.zero_stage,
        item_bytes=_ITEM_BYTES[cfg.learner.dtype],
        publish_bytes=_ITEM_BYTES[cfg.student.dtype],
        microbatch_tokens=tokens,
        top_k=cfg.teacher.top_k,
        gradient_checkpointing=cfg.learner.gradient_checkpointing,
        offload_optimizer=cfg.learner.offload is not Offload.none,
        offload_parameters=cfg.learner.offload is Offload.parameters,
    )


def _rollout_input(cfg: RunConfig, student: ModelShape, shares: ResourcePlan, gpu_bytes: float | None) -> RolloutInput:
    part = cfg.rollout
    longest = cfg.longest_response_tokens
    queued = (cfg.replay.max_staleness // cfg.replay.reuse + 1) * cfg.trajectories_per_step
    evaluated = cfg.evaluation.num_problems * cfg.evaluation.samples_per_problem if cfg.evaluation.path else 0
    if cfg.evaluation.path and not cfg.evaluation.num_problems:
        evaluated = part.max_num_seqs * part.num_engines
    return RolloutInput(
        shape=student,
        num_engines=part.num_engines,
        gpus=part.num_gpus,
        cpus=shares.rollout.ray_cpus,
        item_bytes=_ITEM_BYTES[cfg.student.dtype],
        max_model_tokens=cfg.data.max_prompt_tokens + longest,
        sequences=min(part.max_num_seqs, math.ceil(max(queued, evaluated) / part.num_engines)),
        kv_cache_bytes=float(part.kv_cache_gib * GIB),
        gpu_memory_utilization=part.gpu_memory_utilization,
        gpu_bytes=gpu_bytes,
        tensor_parallel=part.tensor_parallel,
    )


def _teacher_engine_need(cfg: RunConfig, shape: ModelShape, rollout: RolloutInput) -> WorkerNeed | None:
    """A rollout engine with the teacher's weights, which asks Ray for no CPUs (`session`)."""
    if not (cfg.evaluation.path and cfg.evaluation.teacher):
        return None
    given = replace(rollout, shape=shape, num_engines=1, cpus=0.0, item_bytes=_ITEM_BYTES[cfg.teacher.dtype])
    actions = "raise rollout.gpu_memory_utilization, or set evaluation.teacher=false"
    return replace(rollout_need(given), role="teacher-engine", actions=actions)


def _teacher_need(cfg: RunConfig, shape: ModelShape, shares: ResourcePlan, gpu_bytes: float | None) -> WorkerNeed:
    part, longest = cfg.teacher, full_length(cfg)
    # A call brings the trajectories of one request (`rollout_loop`).
    prompts = math.ceil(cfg.rollout.prompts_per_step / cfg.rollout.num_engines)
    tokens = min(max(part.max_batch_tokens, longest), prompts * cfg.rollout.samples_per_prompt * longest)
    return teacher_need(
        TeacherInput(
            shape=shape,
            num_workers=part.num_workers,
            gpus=part.num_gpus,
            cpus=shares.teacher.ray_cpus,
            item_bytes=_ITEM_BYTES[part.dtype],
            batch_tokens=tokens,
            top_k=part.top_k,
            tensor_parallel=part.tensor_parallel,
            engine_share=part.gpu_memory_utilization if part.backend is TeacherBackend.vllm else 0.0,
            kv_cache_bytes=float(part.kv_cache_gib * GIB),
            max_model_tokens=longest + 1,
            gpu_bytes=gpu_bytes,
        )
    )
