"""Refuses a config that cannot run, in one line that names the key, the value and the allowed range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from opd_ray.config.choices import (
    Advantage,
    BehaviorSource,
    GateControl,
    GateKind,
    GateNormalize,
    Offload,
    ReplayOrder,
    StalePolicy,
    Support,
    TauMode,
    TeacherBackend,
    Template,
)
from opd_ray.config.registry import LOSSES, Needs
from opd_ray.config.schema import RolloutConfig, RunConfig, TeacherConfig
from opd_ray.errors import ConfigError


def check_config(cfg: RunConfig) -> None:
    """Raise `ConfigError` unless every field is in its range and the fields fit each other."""
    check_ranges(cfg)
    _check_paths(cfg)
    _check_groups(cfg)
    _check_split_models(cfg)
    _check_objective(cfg)
    _check_gate(cfg)
    _check_replay(cfg)


def check_ranges(part: Any, prefix: str = "") -> None:
    """Raise `ConfigError` unless every field of a dataclass of settings, and of its parts, has an allowed value."""
    for key, value, meta in _leaves(part, prefix):
        _check_range(key, value, meta)


def _leaves(part: Any, prefix: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value, dict(item.metadata)


def _check_range(key: str, value: Any, meta: dict[str, Any]) -> None:
    if "names" in meta and value not in meta["names"].names:
        raise ConfigError(f"{key}={value} is unknown: give one of {', '.join(meta['names'].names)}")
    low, above, high = meta.get("ge"), meta.get("gt"), meta.get("le")
    if low is None and above is None and high is None:
        return
    inside = math.isfinite(value)
    inside = inside and (low is None or value >= low) and (above is None or value > above)
    inside = inside and (high is None or value <= high)
    if not inside:
        raise ConfigError(f"{key}={value} is out of range: give a value {_range_text(low, above, high)}")


def _range_text(low: float | None, above: float | None, high: float | None) -> str:
    lower = f">= {low}" if low is not None else f"> {above}"
    return lower if high is None else f"{lower} and <= {high}"


def _check_paths(cfg: RunConfig) -> None:
    required = {
        "student.path": cfg.student.path,
        "teacher.path": cfg.teacher.path,
        "data.path": cfg.data.path,
    }
    for key, value in required.items():
        if not value:
            raise ConfigError(f"{key} is empty: choose a scale with scale=tiny|smollm2|qwen3_1p7b, or set {key}=PATH")
    if cfg.data.template in (Template.chat_with_solution, Template.completion_with_solution):
        raise ConfigError(
            f"data.template={cfg.data.template.name} would show the student the solution: "
            "use it for teacher.template, and completion, chat or boxed_chat for data.template"
        )


def _check_groups(cfg: RunConfig) -> None:
    if cfg.rollout.num_engines > cfg.rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.num_engines={cfg.rollout.num_engines} exceeds rollout.prompts_per_step="
            f"{cfg.rollout.prompts_per_step}: an engine would idle; give a value <= {cfg.rollout.prompts_per_step}"
        )
    if cfg.trajectories_per_step < cfg.learner.num_ranks:
        raise ConfigError(
            f"learner.num_ranks={cfg.learner.num_ranks} exceeds the {cfg.trajectories_per_step} trajectories of a "
            f"step: give learner.num_ranks <= {cfg.trajectories_per_step}"
        )
    if cfg.learner.warmup_steps >= cfg.num_steps and cfg.learner.warmup_steps > 0:
        raise ConfigError(
            f"learner.warmup_steps={cfg.learner.warmup_steps} does not fit num_steps={cfg.num_steps}: "
            f"give a value < {cfg.num_steps}"
        )


def _check_split_models(cfg: RunConfig) -> None:
    """Models that are split over processes, or kept in host memory."""
    parts: dict[str, RolloutConfig | TeacherConfig] = {"rollout": cfg.rollout, "teacher": cfg.teacher}
    for name, part in parts.items():
        if part.num_gpus and part.tensor_parallel > 1 and part.num_gpus != part.tensor_parallel:
            raise ConfigError(
                f"{name}.tensor_parallel={part.tensor_parallel} with {name}.num_gpus={part.num_gpus:g}: each of its "
                f"processes needs a GPU; give {name}.num_gpus={part.tensor_parallel}"
            )
    teacher = cfg.teacher
    if teacher.backend is TeacherBackend.transformers and teacher.tensor_parallel > 1:
        raise ConfigError(
            f"teacher.tensor_parallel={teacher.tensor_parallel} with teacher.backend=transformers, which runs in one "
            "process: set teacher.backend=vllm, or teacher.tensor_parallel=1"
        )
    if teacher.backend is TeacherBackend.vllm and teacher.scored is Support.student_topk:
        raise ConfigError(
            f"teacher.support={teacher.support} with teacher.backend=vllm, which scores its own top K only: set "
            "teacher.backend=transformers"
        )
    if cfg.learner.offload is Offload.parameters and cfg.learner.zero_stage != 3:
        raise ConfigError(
            f"learner.offload=parameters with learner.zero_stage={cfg.learner.zero_stage}, which keeps parameters "
            "whole on every rank: set learner.zero_stage=3, or learner.offload=optimizer"
        )


def _check_objective(cfg: RunConfig) -> None:
    objective, kind = cfg.objective, cfg.objective.kind
    # Without the log-sum-exp a loss can only compare what is renormalised.
    if objective.needs is Needs.support_logits and cfg.teacher.top_k < 2:
        raise ConfigError(
            f"teacher.top_k={cfg.teacher.top_k} with objective.kind={kind}: the renormalised loss over one id is "
            "always zero; give a value >= 2"
        )
    if objective.needs is Needs.sampled_logprobs:
        for key, value, unset in (
            ("objective.include_sampled", str(objective.include_sampled).lower(), "false"),
            ("teacher.support", cfg.teacher.support, "teacher_topk"),
        ):
            if value != unset:
                others = [name for name in LOSSES.names if LOSSES.declared(name, "NEEDS", Needs) is not objective.needs]
                raise ConfigError(
                    f"{key}={value} with objective.kind={kind}, which looks at no support: choose one of "
                    f"{', '.join(others)}"
                )
    names = [rule.name for rule in objective.mask_rules]
    if len(set(names)) < len(names):
        raise ConfigError(f"objective.mask_rules={names} names a rule twice: name each once")


# Gate options that only a drift gate has, with the value that turns each off.
_DRIFT_GATE_ONLY = {
    "tau_mode": TauMode.fixed,
    "control": GateControl.none,
    "max_weight": 0.0,
    "calibrate": False,
    "drift_tokens": 0,
}


def _check_gate(cfg: RunConfig) -> None:
    gate = cfg.gate
    if not gate.kind.is_drift_gate:
        for name, unset in _DRIFT_GATE_ONLY.items():
            value = getattr(gate, name)
            if value != unset:
                raise ConfigError(
                    f"gate.{name}={getattr(value, 'name', value)} with gate.kind={gate.kind.name}: it needs gate.kind="
                    "token, block, sequence or newline"
                )
        if gate.kind is not GateKind.off and gate.normalize is GateNormalize.sequence:
            raise ConfigError(f"gate.normalize=sequence with gate.kind={gate.kind.name}: choose step or none")
    if gate.kind is GateKind.newline and gate.max_span < gate.min_span:
        raise ConfigError(
            f"gate.max_span={gate.max_span} is below gate.min_span={gate.min_span}: "
            f"give gate.max_span >= {gate.min_span}"
        )
    if gate.max_weight and gate.max_weight <= 1:
        raise ConfigError(
            f"gate.max_weight={gate.max_weight} cannot hold with a mean of 1: give a value > 1, or 0 for none"
        )
    if gate.max_weight and gate.normalize is GateNormalize.none:
        raise ConfigError("gate.max_weight with gate.normalize=none: raw gates are at most 1; choose step or sequence")
    if gate.calibrate and gate.behavior_source is BehaviorSource.learner and cfg.replay.max_staleness == 0:
        raise ConfigError(
            "gate.calibrate=true with gate.behavior_source=learner and replay.max_staleness=0: no drift is measured "
            "against the engine; set gate.behavior_source=rollout, or leave it out"
        )
    if gate.drift_tokens and cfg.objective.needs is Needs.sampled_logprobs:
        raise ConfigError(
            f"gate.drift_tokens={gate.drift_tokens} with objective.kind={cfg.objective.kind}, which computes every "
            "token's log-prob anyway: give gate.drift_tokens=0"
        )


def _check_replay(cfg: RunConfig) -> None:
    replay = cfg.replay
    if replay.stale is StalePolicy.wait and replay.order is not ReplayOrder.fifo:
        raise ConfigError(
            f"replay.order={replay.order.name} with replay.stale=wait, which lets nothing be overtaken: choose "
            "replay.stale=drop or gate, or replay.order=fifo"
        )
    if replay.stale is not StalePolicy.gate and replay.hard_staleness:
        raise ConfigError(
            f"replay.hard_staleness={replay.hard_staleness} with replay.stale={replay.stale.name}, which has no wider "
            "bound: choose replay.stale=gate, or give 0"
        )
    if replay.stale is StalePolicy.gate and replay.hard_staleness <= replay.max_staleness:
        raise ConfigError(
            f"replay.hard_staleness={replay.hard_staleness} with replay.stale=gate leaves the gate nothing between it "
            f"and replay.max_staleness={replay.max_staleness}: give a value > {replay.max_staleness}"
        )


def announcements(cfg: RunConfig) -> list[str]:
    """What is allowed and biases the result: one line each, to be said once at start-up."""
    said = []
    rollout = cfg.rollout
    ratio_based = cfg.objective.needs is Needs.sampled_logprobs
    if rollout.temperature != 1.0:
        said.append(
            f"rollout.temperature={rollout.temperature:g}: log-probs are taken at temperature 1, so samples are not "
            "of the student's own distribution"
        )
    if rollout.top_p < 1.0 and ratio_based:
        said.append(
            f"rollout.top_p={rollout.top_p:g} with objective.kind={cfg.objective.kind}: ratios are of the full "
            "distribution, samples of its nucleus; the truncation is not corrected"
        )
    engine_drift = cfg.gate.behavior_source is BehaviorSource.rollout or cfg.replay.max_staleness > 0
    if cfg.gate.kind is not GateKind.off and cfg.replay.reuse == 1 and cfg.replay.max_staleness == 0:
        said.append(
            f"gate.kind={cfg.gate.kind.name} with replay.reuse=1 and replay.max_staleness=0: every trajectory is "
            "fresh, so the weights are always one"
        )
    if cfg.replay.stale is not StalePolicy.wait and cfg.replay.max_staleness == 0:
        said.append(
            f"replay.stale={cfg.replay.stale.name} with replay.max_staleness=0: in lock-step nothing is overtaken, so "
            "replay.stale and replay.order change nothing"
        )
    if cfg.replay.stale is StalePolicy.gate and cfg.gate.kind is GateKind.off:
        said.append(
            f"replay.stale=gate with gate.kind=off: trajectories up to {cfg.replay.hard_staleness} steps old are "
            "trained on at full weight"
        )
    if cfg.gate.control is not GateControl.none:
        said.append(
            f"gate.control={cfg.gate.control.name}: a control, whose weights have nothing to do with their own drift"
        )
    if cfg.gate.kind is not GateKind.off and engine_drift:
        said.append(
            "drift is measured against the engine's log-probs where the learner has none of its own: compare "
            "gate/drift_abs with gate/engine_mismatch"
        )
    if ratio_based and cfg.objective.advantage is Advantage.recompute:
        said.append("objective.advantage=recompute: the ratio is not clipped (AsyncOPD), objective.clip_* are not used")
    return said
