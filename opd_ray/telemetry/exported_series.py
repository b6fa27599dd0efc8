"""The metrics of a run that are exported for Prometheus, and their names there.

Ray puts `ray_` before every name. Units stand at the end of a name, as Prometheus asks for. Label values come from a
closed set each, so that the number of series of a run is bounded: what `metrics.jsonl` has by position or by staleness
stays there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

RUN_LABELS = ("run", "experiment", "seed")
"""Labels of every series: name of the run folder, variant, seed."""

RAY_PREFIX = "ray_"

POLICY_VERSION = "opd_policy_version"
"""The series of the step itself, which is no metric."""


class Kind(Enum):
    """How a value is exported: as it is, added up (a step's share), or as a count that the run itself adds up."""

    gauge = "gauge"
    added = "added"
    count = "count"


@dataclass(frozen=True, slots=True)
class Series:
    """One exported name; `keys` matches the metric keys that feed it, its named groups are the labels."""

    name: str
    keys: str
    help: str
    kind: Kind = Kind.gauge
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", re.compile(self.keys))

    @property
    def labels(self) -> tuple[str, ...]:
        """Its own labels, beside those of the run."""
        return tuple(self.pattern.groupindex)

    @property
    def exported_name(self) -> str:
        """The name in Prometheus."""
        return RAY_PREFIX + self.name

    def labels_of(self, key: str) -> dict[str, str] | None:
        """Label values of a metric key; None if the key does not belong here."""
        match = self.pattern.fullmatch(key)
        return None if match is None else match.groupdict(default="")


_GROUP = "(?P<group>rollout|teacher|learner)"

SERIES = (
    Series(POLICY_VERSION, "", "Optimizer steps done."),
    # Replay: how stale what trains is, and how full the store is.
    Series("opd_staleness_steps", "replay/staleness/(?P<stat>mean|max)", "Staleness of the step's trajectories."),
    Series("opd_trajectory_age_seconds", "replay/age_s/max", "Age of the step's oldest trajectory."),
    Series(
        "opd_store_trajectories",
        "replay/(?P<state>in_flight|ready|in_training)",
        "Trajectories that are being made, are ready, or belong to the batch in training.",
    ),
    Series("opd_store_free_permits", "replay/acquirable", "Trajectories that may be started now."),
    Series(
        "opd_store_bytes", "replay/(?P<place>payload|memory)_bytes", "Bytes of stored payloads, all or those in memory."
    ),
    Series(
        "opd_trajectories_total",
        "replay/ledger/(?P<outcome>trained|(?:evicted|failed)(?=/))(?:/(?P<reason>[a-z_]+))?",
        "Trajectories of the run by what became of them, and why.",
        Kind.count,
    ),
    # Gate and drift; absent in an ungated run.
    Series("opd_gate_value", "gate/value/(?P<stat>min|p05|mean|max)", "Gate of the step's segments, 1 is open."),
    Series("opd_gate_tau", "gate/tau", "Sharpness of the gate."),
    Series("opd_gate_measured_share", "gate/measured_share", "Share of the segments whose drift was measured."),
    Series(
        "opd_drift_nats",
        "gate/drift_abs/(?P<stat>mean|p95|max|measured_p50|measured_p95)",
        "Absolute policy drift of segments, nats a token.",
    ),
    Series(
        "opd_engine_mismatch_nats", "gate/engine_mismatch/rms", "Learner against engine log-probs at staleness 0, RMS."
    ),
    Series(
        "opd_effective_sample_share", "gate/effective_sample_share", "Kish's effective sample size over the tokens."
    ),
    Series("opd_gate_kl_correlation", "gate/kl_correlation/pearson", "Correlation of gate and KL over segments."),
    # Learner.
    Series("opd_loss", "learner/loss/(?P<stat>mean|ungated_mean)", "Loss of the step, mean over its tokens."),
    Series("opd_kl_to_teacher_nats", "learner/kl_to_teacher/mean", "Sampled KL of student to teacher, nats a token."),
    Series("opd_grad_norm", "learner/grad_norm", "Global gradient norm before clipping."),
    Series("opd_learning_rate", "learner/lr", "Learning rate of the step."),
    Series(
        "opd_trained_tokens_total",
        "learner/tokens/loss",
        "Tokens that had a loss, repeated uses included, since the process began.",
        Kind.added,
    ),
    Series(
        "opd_support_mass_share",
        "support/student_mass/(?P<stat>mean|p05|min)",
        "Share of the student's distribution that lies on the support.",
    ),
    Series("opd_support_alarm", "support/alarm", "1 where that share is below telemetry.min_support_mass."),
    # Who is fast, who waits for whom.
    Series("opd_tokens_per_second", f"{_GROUP}/tokens_per_s", "Tokens of a group per second of its calls."),
    Series("opd_pipeline_tokens_per_second", "time/tokens_per_s", "Response tokens of the step over its duration."),
    Series("opd_wait_share", f"pipeline/wait_share/{_GROUP}", "Share of the time in which a group had nothing to do."),
    Series("opd_bottleneck", f"pipeline/bottleneck/{_GROUP}", "1 for the group that waited least in the step."),
    Series("opd_step_seconds", "time/step_s", "Duration of the step."),
    Series("opd_batch_wait_seconds", "time/wait_for_batch_s", "What the learner waited for its batch."),
    Series(
        "opd_learner_seconds",
        "time/learner_(?P<part>pack|forward|gate|loss|backward|optimizer|diagnostics|step)_s",
        "Parts of the learner's step, the slowest rank's.",
    ),
    Series("opd_checkpoint_seconds", "time/checkpoint_s", "What the last checkpoint took."),
    Series("opd_publish_seconds", "time/publish_s", "What the last publication of weights took."),
    Series("opd_publish_standstill_seconds", "publish/standstill_s/max", "How long decoding stood still for it."),
    Series("opd_publish_bytes", "publish/bytes", "Bytes of weights that were published."),
    # A gauge, so that "none" is a 0 and not an absent series: Ray exports no counter that was never raised.
    Series(
        "opd_restarts",
        "faults/restarts/(?P<group>rollout|teacher|learner)",
        "Actors of a group that were replaced since the process began.",
    ),
    Series(
        "opd_controller_loop_lag_seconds",
        "controller/loop_lag_s/p99",
        "How late the controller's event loop ran what was due, p99 of the step.",
    ),
    # Evaluation: n and k are the run's samples a problem and powers of two up to it.
    Series("opd_evaluation_avg_at_n", "evaluation/avg_at_(?P<n>[0-9]+)", "Share of right answers, last evaluation."),
    Series("opd_evaluation_pass_at_k", "evaluation/pass_at_(?P<k>[0-9]+)", "pass@k of the last evaluation, unbiased."),
    Series("opd_evaluation_truncated_share", "evaluation/truncated_share", "Share of answers cut off at the limit."),
)
