"""Schema of a run's configuration: `RunConfig` and its parts, with the unit and the range of every field.

Hydra composes these dataclasses from `conf/`; `config_checks.check_config` enforces the ranges given here and the rules
that join several fields. The names that a key may take are in `choices`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opd_ray.config.choices import (
    Advantage,
    AnswerFormat,
    BehaviorSource,
    Direction,
    Dtype,
    GateControl,
    GateKind,
    GateNormalize,
    HeadKernel,
    LogprobDtype,
    LrSchedule,
    MaskRule,
    Offload,
    OnNewWeights,
    Overlong,
    PlacementStrategy,
    ReplayOrder,
    StalePolicy,
    Support,
    TauMode,
    TeacherBackend,
    Template,
    WandbMode,
)
from opd_ray.config.registry import LOSSES, STATISTICS, SUPPORTS, Needs, Registry


def ranged(default: Any, doc: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Any:
    """A dataclass field with a one-line doc and a range that `config_checks.check_config` enforces."""
    return field(default=default, metadata={"doc": doc, "ge": ge, "gt": gt, "le": le})


def documented(default: Any, doc: str) -> Any:
    """A dataclass field with a one-line doc and no numeric range."""
    return field(default=default, metadata={"doc": doc})


def named(default: str, registry: Registry, doc: str) -> Any:
    """A dataclass field with a one-line doc that holds one of the registry's names."""
    return field(default=default, metadata={"doc": f"{doc}: a module of {registry.folder}", "names": registry})


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The model that learns."""

    path: str = documented("", "folder or hub id of the student; `tiny:student` is the embedded one")
    dtype: Dtype = documented(Dtype.float32, "dtype of the rollout engines' weights")


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that is learnt from, and the workers that run it."""

    path: str = documented("", "folder or hub id of the teacher; `tiny:teacher` is the embedded one")
    dtype: Dtype = documented(Dtype.float32, "dtype of the teacher's weights")
    template: Template = documented(Template.completion, "template of the prompt that the teacher sees")
    top_k: int = ranged(32, "support ids a position, K", ge=1)
    support: str = named("teacher_topk", SUPPORTS, "ids that the loss looks at")
    num_workers: int = ranged(1, "teacher actors", ge=1)
    num_cpus: float = ranged(0.0, "CPUs of one worker, 0 = an even share; whole CPUs are its threads", ge=0)
    num_gpus: float = ranged(0.0, "GPUs of one worker", ge=0)
    max_batch_tokens: int = ranged(8192, "padded tokens in one forward pass", ge=1)
    backend: TeacherBackend = documented(TeacherBackend.transformers, "what runs the teacher")
    tensor_parallel: int = ranged(1, "`backend=vllm`: processes (GPUs) that one worker's model is split over", ge=1)
    kv_cache_gib: int = ranged(1, "`backend=vllm`: KV cache of a worker on CPU, GiB", ge=1)
    gpu_memory_utilization: float = ranged(0.6, "`backend=vllm`: share of a GPU that a worker may take", gt=0, le=1)

    @property
    def scored(self) -> Support:
        """Whose ids the teacher scores, as the support declares; raises `ConfigError`."""
        return SUPPORTS.declared(self.support, "SCORED", Support)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training prompts."""

    path: str = documented("", "JSONL or parquet file, `hub:OWNER/NAME`, or `tiny:train`")
    fields: dict[str, str] = field(
        default_factory=dict,
        metadata={"doc": "names of the columns for problem, answer, solution, id, if they differ"},
    )
    template: Template = documented(Template.completion, "template of the prompt that the student sees")
    num_prompts: int = ranged(0, "prompts taken from the source, 0 = all", ge=0)
    epochs: int = ranged(0, "passes over the prompts, 0 = endless", ge=0)
    max_prompt_tokens: int = ranged(2048, "longest prompt, tokens, student's and teacher's", ge=1)
    overlong: Overlong = documented(Overlong.error, "what happens to a longer prompt")
    unique: bool = documented(False, "take rows with the same problem text once")


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """vLLM engines, in training and in evaluation by itself."""

    num_engines: int = ranged(1, "rollout actors, one engine each", ge=1)
    num_cpus: float = ranged(0.0, "CPUs of one engine, 0 = an even share; whole CPUs are its threads", ge=0)
    num_gpus: float = ranged(0.0, "GPUs of one engine", ge=0)
    tensor_parallel: int = ranged(1, "processes (GPUs) that one engine's model is split over", ge=1)
    max_num_seqs: int = ranged(128, "sequences that an engine decodes at once", ge=1)
    kv_cache_gib: int = ranged(1, "KV cache of an engine on CPU, GiB", ge=1)
    gpu_memory_utilization: float = ranged(0.85, "share of a GPU that an engine may take", gt=0, le=1)


@dataclass(kw_only=True, slots=True)
class RolloutConfig(EngineConfig):
    """vLLM engines that sample from the student."""

    prompts_per_step: int = ranged(4, "prompts in one optimizer step", ge=1)
    samples_per_prompt: int = ranged(8, "trajectories a prompt", ge=1)
    max_response_tokens: int = ranged(256, "longest response, tokens", ge=1)
    temperature: float = ranged(1.0, "sampling temperature", gt=0)
    top_p: float = ranged(1.0, "nucleus mass", gt=0, le=1)
    on_new_weights: OnNewWeights = documented(OnNewWeights.partial, "what becomes of running requests")
    gpu_memory_utilization: float = ranged(0.6, "share of a GPU that an engine may take", gt=0, le=1)


@dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """The replay store."""

    max_staleness: int = ranged(0, "optimizer steps a trajectory may be old at its first use; 0 = lock-step", ge=0)
    reuse: int = ranged(2, "optimizer steps that each trajectory is used for", ge=1)
    order: ReplayOrder = documented(ReplayOrder.fifo, "which ready trajectories train next")
    stale: StalePolicy = documented(StalePolicy.wait, "whether slow trajectories are waited for, dropped or gated")
    hard_staleness: int = ranged(0, "with stale=gate: drop above this staleness at the first use; else 0", ge=0)
    max_bytes: int = ranged(0, "bytes of stored and expected payloads above which generation waits, 0 = any", ge=0)
    spill_bytes: int = ranged(0, "bytes of payloads in memory above which the rest go to files, 0 = never", ge=0)
    logprob_dtype: LogprobDtype = documented(LogprobDtype.float16, "dtype of stored teacher top-K log-probs")
    sampled_logprob_dtype: LogprobDtype = documented(
        LogprobDtype.float32, "dtype of stored log-probs of the sampled tokens, the student's and the teacher's"
    )


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    """DeepSpeed ranks that train the student."""

    num_ranks: int = ranged(1, "data-parallel ranks", ge=1)
    num_cpus: float = ranged(0.0, "CPUs of one rank, 0 = an even share; whole CPUs are its threads", ge=0)
    num_gpus: float = ranged(0.0, "GPUs of one rank", ge=0)
    zero_stage: int = ranged(1, "DeepSpeed ZeRO stage", ge=1, le=3)
    offload: Offload = documented(Offload.none, "what is kept in host memory instead of the GPU's")
    dtype: Dtype = documented(Dtype.float32, "dtype of the training forward and backward")
    lr: float = ranged(1e-4, "peak learning rate of AdamW", gt=0)
    lr_schedule: LrSchedule = documented(LrSchedule.constant, "schedule after the warm-up")
    warmup_steps: int = ranged(0, "optimizer steps of linear warm-up", ge=0)
    weight_decay: float = ranged(0.01, "AdamW weight decay", ge=0)
    beta2: float = ranged(0.999, "AdamW second-moment decay", gt=0, le=0.99999)
    grad_clip: float = ranged(1.0, "largest global gradient norm", gt=0)
    tokens_per_microbatch: int = ranged(8192, "padded tokens (prompt + response) in one microbatch of a rank", ge=1)
    gradient_checkpointing: bool = documented(False, "recompute activations in the backward pass")
    head_kernel: HeadKernel = documented(HeadKernel.torch, "how the support's rows of the LM head are read")


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """The loss at a position, and the positions that have one."""

    kind: str = named("lsm", LOSSES, "which loss")
    advantage: Advantage = documented(Advantage.frozen, "advantage of `opd`")
    clip_low: float = ranged(0.2, "PPO clip below 1, `opd` with a frozen advantage", gt=0, le=1)
    clip_high: float = ranged(0.2, "PPO clip above 1, `opd` with a frozen advantage", gt=0)
    dual_clip: float = ranged(3.0, "bound of the loss for negative advantages, x|advantage|", gt=1)
    renormalize: bool = documented(False, "`forward_kl`: renormalise both sides over the support")
    direction: Direction = documented(Direction.reverse, "direction of `tail_kl`")
    beta: float = ranged(0.5, "`jsd`: weight of the teacher in the mixture; 0 = forward, 1 = reverse KL", ge=0, le=1)
    include_sampled: bool = documented(False, "the support takes in the sampled token where it is outside")
    mask_rules: list[MaskRule] = field(
        default_factory=list, metadata={"doc": "response tokens that leave the loss, by rule"}
    )
    entropy_top_share: float = ranged(1.0, "share of a response's positions kept, by student entropy", gt=0, le=1)

    @property
    def needs(self) -> Needs:
        """What the loss reads of the student, as it declares; raises `ConfigError`."""
        changes = self.renormalize and LOSSES.declares(self.kind, "NEEDS_RENORMALIZED")
        return LOSSES.declared(self.kind, "NEEDS_RENORMALIZED" if changes else "NEEDS", Needs)


@dataclass(kw_only=True, slots=True)
class GateConfig:
    """The policy-drift gate (arXiv 2606.24084), and what it is compared with."""

    kind: GateKind = documented(GateKind.off, "what weighs the tokens")
    tau: float = ranged(1.0, "sharpness: gate = exp(-tau * drift)", ge=0)
    tau_mode: TauMode = documented(TauMode.fixed, "what tau is multiplied or divided by")
    tau_quantile: float = ranged(0.5, "`tau_mode=quantile`: which quantile of |drift|", gt=0, le=1)
    memory: float = ranged(
        0.9, "decay a step of the running quantile and of the running engine mismatch", ge=0, le=0.999
    )
    statistic: str = named("signed_mean", STATISTICS, "a segment's drift")
    normalize: GateNormalize = documented(GateNormalize.step, "tokens over which the weights have mean one")
    behavior_source: BehaviorSource = documented(BehaviorSource.learner, "whose behaviour log-probs drift is against")
    calibrate: bool = documented(False, "take the running engine mismatch off drift against the engine's log-probs")
    block_size: int = ranged(64, "tokens of a block; also the fallback where a response has no newline", ge=1)
    min_span: int = ranged(16, "newline spans under this many tokens merge", ge=1)
    max_span: int = ranged(128, "newline spans over this many tokens split", ge=1)
    drift_tokens: int = ranged(0, "tokens of a segment whose drift is measured, 0 = all", ge=0)
    max_weight: float = ranged(0.0, "largest weight of a token after normalisation, > 1; 0 = no bound", ge=0)
    control: GateControl = documented(GateControl.none, "replace the gates by a control")
    cap: float = ranged(2.0, "`tis`: largest ratio", ge=1)
    low: float = ranged(0.5, "`icepop`, `geometric_mask`: lowest ratio kept", ge=0, le=1)
    high: float = ranged(2.0, "`icepop`, `geometric_mask`: highest ratio kept", ge=1)
    drop_above: float = ranged(0.1, "`hard_drop`: |drift| over which a block is dropped, nats", ge=0)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out problems with answers."""

    path: str = documented("", "JSONL or parquet file, `hub:OWNER/NAME:split`, or `tiny:test`; empty = no evaluation")
    fields: dict[str, str] = field(
        default_factory=dict,
        metadata={"doc": "names of the columns for problem, answer, solution, id, if they differ"},
    )
    num_problems: int = ranged(64, "problems taken from the source, 0 = all", ge=0)
    samples_per_problem: int = ranged(8, "samples a problem, n", ge=1)
    every: int = ranged(0, "optimizer steps between evaluations, 0 = only before and after", ge=0)
    before: bool = documented(True, "evaluate the student before training; it is the same in all runs of a sweep")
    temperature: float = ranged(1.0, "sampling temperature", gt=0)
    top_p: float = ranged(0.9, "nucleus mass", gt=0, le=1)
    max_response_tokens: int = ranged(256, "longest response, tokens", ge=1)
    answer_format: AnswerFormat = documented(AnswerFormat.tiny, "where the final answer stands")
    teacher: bool = documented(True, "evaluate the teacher too, on the student's prompts")
    num_verifiers: int = ranged(2, "processes that verify answers at a time", ge=1)
    verification_budget_s: float = ranged(5.0, "processor time to verify one answer, seconds", gt=0)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What a run leaves behind to continue from."""

    every: int = ranged(0, "optimizer steps between checkpoints, 0 = none", ge=0)
    keep: int = ranged(1, "newest checkpoints that are kept", ge=1)


@dataclass(kw_only=True, slots=True)
class FaultConfig:
    """How much is put up with before the run ends."""

    max_restarts: int = ranged(3, "dead workers of a group that are replaced in a run; 0 = none", ge=0)
    max_attempts: int = ranged(3, "times that a request is tried before its trajectories count as failed", ge=1)


@dataclass(kw_only=True, slots=True)
class PlacementConfig:
    """How each group's workers lie on the nodes of a cluster; on one node it decides nothing."""

    rollout: PlacementStrategy = documented(PlacementStrategy.spread, "engines")
    teacher: PlacementStrategy = documented(PlacementStrategy.spread, "teachers")
    learner: PlacementStrategy = documented(PlacementStrategy.pack, "ranks, which exchange gradients every step")


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """Where a run can be watched."""

    wandb: WandbMode = documented(WandbMode.auto, "W&B mode")
    wandb_project: str = documented("opd_ray", "W&B project")
    ray_metrics: bool = documented(True, "export metrics to Ray, for its dashboard, Prometheus and Grafana")
    progress: bool = documented(True, "show the progress bar")
    probe_positions: int = ranged(
        64, "positions a rank and step where the full distribution is looked at, 0 = none", ge=0
    )
    min_support_mass: float = ranged(0.5, "alarm where the student's mean mass on the support is below", ge=0, le=1)
    max_loop_lag_s: float = ranged(1.0, "alarm where the controller's event loop runs later than this (p99, s)", ge=0)
    record_trajectories: int = ranged(
        0, "trajectories of a step that are written to the run folder for `opd_ray.inspect`, 0 = none", ge=0
    )


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run."""

    experiment: str = documented("custom", "name of the variant, set by conf/experiment")
    scale: str = documented("", "name of the scale, set by conf/scale")
    seed: int = ranged(0, "seed of sampling, prompt order and evaluation", ge=0)
    num_steps: int = ranged(100, "optimizer steps", ge=1)
    runs_dir: str = documented("runs", "folder in which the run folder is made")
    resume: str = documented("auto", "`auto`: this config's last run if it was cut off; `never`; or a run folder")
    deadline_s: float = ranged(1800.0, "longest wait for one remote call, seconds", gt=0)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def trajectories_per_step(self) -> int:
        """Trajectories that one optimizer step uses."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def longest_response_tokens(self) -> int:
        """Tokens of the longest response that a rollout engine makes, evaluations included."""
        return max(self.rollout.max_response_tokens, self.evaluation.max_response_tokens)

    @property
    def student_top_k(self) -> int:
        """How many of the student's own most probable ids a trajectory carries at each position."""
        return self.teacher.top_k if self.teacher.scored is Support.student_topk else 0

    @property
    def run_name(self) -> str:
        """Start of the run folder's name."""
        return f"{self.experiment}-{self.scale}-s{self.seed}"
