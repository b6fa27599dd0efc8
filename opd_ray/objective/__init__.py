"""Losses, the drift gate and the memory-lean LM head: pure torch, importable without any engine.

Shape letters: B sequences, T response tokens, N flattened positions, K support entries, S segments, V
vocabulary, H hidden. Tensors `[B,T]` are response-aligned: column 0 is the first response token; padding may
hold anything.
"""

from opd_ray.objective.divergences import k1, k2, k3, lsm_loss
from opd_ray.objective.gate import GateResult, Normalize, Statistic, drift_gate
from opd_ray.objective.lm_head import support_logits, token_logprobs
from opd_ray.objective.reduction import effective_sample_size, gated_token_mean
from opd_ray.objective.sampled_token import Advantage, sampled_token_loss
from opd_ray.objective.segments import block_segments, newline_segments

__all__ = [
    "Advantage",
    "GateResult",
    "Normalize",
    "Statistic",
    "block_segments",
    "drift_gate",
    "effective_sample_size",
    "gated_token_mean",
    "k1",
    "k2",
    "k3",
    "lsm_loss",
    "newline_segments",
    "sampled_token_loss",
    "support_logits",
    "token_logprobs",
]
