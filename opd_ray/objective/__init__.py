"""Losses, the drift gate and the memory-lean LM head: pure torch, importable without any engine.

Shape letters: B sequences, T response tokens, N flattened positions, K support entries, S segments, V
vocabulary, H hidden. Tensors `[B,T]` are response-aligned: column 0 is the first response token; padding may
hold anything.
"""

from opd_ray.config.choices import Advantage, Direction
from opd_ray.config.choices import GateNormalize as Normalize
from opd_ray.objective.corrections import (
    geometric_sequence_mask,
    hard_drop_gate,
    icepop_weights,
    truncated_is_weights,
)
from opd_ray.objective.divergences import forward_kl_topk, jsd_topk, lsm_loss, tail_kl
from opd_ray.objective.drift_sample import drift_standard_error, stratified_sample
from opd_ray.objective.estimators import k1, k2, k3
from opd_ray.objective.gate import GateResult, drift_gate
from opd_ray.objective.lm_head import support_logits, token_logprobs
from opd_ray.objective.lm_head_statistics import HeadStatistics, head_statistics
from opd_ray.objective.reduction import effective_sample_size, gated_token_mean
from opd_ray.objective.sampled_token import sampled_token_loss
from opd_ray.objective.segments import block_segments, newline_segments
from opd_ray.objective.selection import any_occurrence, first_occurrence, select_by_entropy
from opd_ray.objective.step_weights import resampled, segment_weights, shuffled
from opd_ray.objective.supports import overlap_ratio, support_mass, with_sampled_token
from opd_ray.objective.tau import RunningQuantile, quantile_tau, segment_staleness, staleness_tau

Statistic = str  # the name of a module of `statistics`

__all__ = [
    "Advantage",
    "Direction",
    "GateResult",
    "HeadStatistics",
    "Normalize",
    "RunningQuantile",
    "Statistic",
    "any_occurrence",
    "block_segments",
    "drift_gate",
    "drift_standard_error",
    "effective_sample_size",
    "first_occurrence",
    "forward_kl_topk",
    "gated_token_mean",
    "geometric_sequence_mask",
    "hard_drop_gate",
    "head_statistics",
    "icepop_weights",
    "jsd_topk",
    "k1",
    "k2",
    "k3",
    "lsm_loss",
    "newline_segments",
    "overlap_ratio",
    "quantile_tau",
    "resampled",
    "sampled_token_loss",
    "segment_staleness",
    "segment_weights",
    "select_by_entropy",
    "shuffled",
    "staleness_tau",
    "stratified_sample",
    "support_logits",
    "support_mass",
    "tail_kl",
    "token_logprobs",
    "truncated_is_weights",
    "with_sampled_token",
]
