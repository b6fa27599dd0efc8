"""Columns of a trajectory batch that a learner reads; the others stay untouched in the object store."""

from __future__ import annotations

from opd_ray.config.choices import TauMode
from opd_ray.config.registry import Needs
from opd_ray.config.schema import GateConfig, ObjectiveConfig

# The model's input, and of the sampled tokens both sides of the KL to the teacher that every step reports.
_ALWAYS = ("prompt_token_ids", "response_token_ids", "behavior_logprobs", "teacher_logprobs")


def learner_columns(objective: ObjectiveConfig, gate: GateConfig, *, probes: bool) -> tuple[str, ...]:
    """Names of the Arrow columns that steps of this configuration read.

    `probes`: whether positions are looked at for how far the student covers the teacher's top K
    (``telemetry.probe_positions``), which takes the support's ids whatever the objective.
    """
    names = list(_ALWAYS)
    uses_support = objective.needs is not Needs.sampled_logprobs
    if uses_support or probes:
        names.append("teacher_topk_ids")
    if uses_support:
        names.append("teacher_topk_logprobs")
    if needs_token_versions(gate):
        names += ["version_starts", "version_values"]
    return tuple(names)


def needs_token_versions(gate: GateConfig) -> bool:
    """Whether a token's own version matters: elsewhere a trajectory's staleness is enough, which comes with it."""
    return gate.kind.is_drift_gate and gate.tau_mode is TauMode.staleness
