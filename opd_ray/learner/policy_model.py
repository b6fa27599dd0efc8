"""The student as the learner trains it: the language model plus the memory-lean head of the objective.

Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from opd_ray.config.choices import HeadKernel
from opd_ray.models.loading import PaddedRows, hidden_states
from opd_ray.models.prefix_tree import takes_prefix_trees
from opd_ray.objective import head_statistics, overlap_ratio, support_logits, token_logprobs

# Positions in one tile of the log-sum-exp.
_CHUNK_SIZE = 1024


class LogprobMode(Enum):
    """Whether log-probs of the sampled tokens are computed, and whether they carry gradient."""

    none = "none"
    constant = "constant"
    differentiable = "differentiable"


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """What a forward pass is to compute at the N response positions.

    `support_ids` int64 [N, K]: logits with gradient. `logprob_at` int64 [M]: the positions whose constant log-prob is
    wanted (None: all; the others are NaN). `entropy`: of the full distribution, constant. `probe_at` int64 [M] with
    `probe_support` int64 [M, K]: positions whose full distribution is looked at. `watch_at` int64 [M] with
    `watch_support` int64 [M, K]: the same of trajectories that are recorded, in more detail.
    """

    support_ids: Tensor | None = None
    logprobs: LogprobMode = LogprobMode.none
    logprob_at: Tensor | None = None
    entropy: bool = False
    probe_at: Tensor | None = None
    probe_support: Tensor | None = None
    watch_at: Tensor | None = None
    watch_support: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadValues:
    """What a forward pass computed; None where it was not asked for.

    `logits` [N, K] and differentiable `logprobs` [N] carry a graph; constant `logprobs`, `entropy` [N] and `probe`
    [3, M] (mass on the support, overlap with it, entropy) do not. `watched` are constant log-probs of the full
    vocabulary and the entropy, [M, 2 + 2 K]: entropy, K of the support, of the sampled token, K of the student's own
    most probable ids; and these ids, int64 [M, K].
    """

    logits: Tensor | None
    logprobs: Tensor | None
    entropy: Tensor | None
    probe: Tensor | None
    watched: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, request: HeadRequest, outputs: HeadOutput) -> HeadValues:
        """What the policy's `forward` returned for `request`."""
        scores, logprobs, entropy, probe, watched = outputs
        logits = scores
        if scores is not None and request.logprobs is LogprobMode.differentiable:
            logits, logprobs = scores[:, :-1], scores[:, -1]
        return cls(None if request.support_ids is None else logits, logprobs, entropy, probe, watched)


# (scores [N, C], constant log-probs [N], entropy [N], probe [3, M], watched). Scores are all that carries gradient,
# logits and then log-probs: under ZeRO 3, DeepSpeed hooks itself onto output tensors, and two of them with a graph let
# ranks lose step with each other.
HeadOutput = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]


class PolicyModel(nn.Module):
    """Wraps a causal language model; the forward pass returns what the losses need and nothing V wide."""

    def __init__(self, language_model: Any, kernel: HeadKernel = HeadKernel.torch) -> None:
        super().__init__()
        self.language_model = language_model
        self._kernel = kernel

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, H]; the embedding where the two are tied."""
        weight: nn.Parameter = self.language_model.get_output_embeddings().weight
        return weight

    @property
    def takes_trees(self) -> bool:
        """Whether the language model can compute what sequences begin with alike once (`prefix_tree`)."""
        return takes_prefix_trees(self.language_model)

    def forward(self, block: PaddedRows, sampled_ids: Tensor, request: HeadRequest) -> HeadOutput:
        """What `request` asks for at the block's N response positions; `sampled_ids` int64 [N]."""
        hidden = hidden_states(self.language_model, block)
        head = self.head_weight
        scores = []
        if request.support_ids is not None:
            scores.append(support_logits(hidden, head, request.support_ids, kernel=self._kernel))
        if request.logprobs is LogprobMode.differentiable:
            scores.append(token_logprobs(hidden, head, sampled_ids, chunk_size=_CHUNK_SIZE)[:, None])
        logprobs = entropy = probe = watched = None
        with torch.no_grad():
            if request.entropy:
                statistics = head_statistics(hidden, head, sampled_ids, chunk_size=_CHUNK_SIZE)
                logprobs, entropy = statistics.logprobs, statistics.entropy
            elif request.logprobs is LogprobMode.constant:
                logprobs = _logprobs_at(hidden, head, sampled_ids, request.logprob_at)
            if request.probe_at is not None and request.probe_support is not None:
                probe = _probe(hidden[request.probe_at], head, request.probe_support)
            if request.watch_at is not None and request.watch_support is not None:
                watched = _watched(hidden, head, sampled_ids, request.watch_at, request.watch_support)
        return torch.cat(scores, dim=1) if scores else None, logprobs, entropy, probe, watched


def _logprobs_at(hidden: Tensor, head: Tensor, ids: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return token_logprobs(hidden, head, ids, chunk_size=_CHUNK_SIZE)
    some = token_logprobs(hidden[at], head, ids[at], chunk_size=_CHUNK_SIZE)
    return some.new_full(ids.shape, math.nan).index_put((at,), some)


def _watched(hidden: Tensor, head: Tensor, ids: Tensor, at: Tensor, support_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `HeadValues.watched`."""
    states, wanted = hidden[at], torch.cat([support_ids, ids[at][:, None]], dim=1)
    found = head_statistics(states, head, None, chunk_size=_CHUNK_SIZE, top_k=support_ids.shape[1])
    logprobs = support_logits(states, head, wanted) - found.logsumexp[:, None]
    return torch.cat([found.entropy[:, None], logprobs, found.topk_logprobs], dim=1), found.topk_ids


def _probe(hidden: Tensor, head: Tensor, support_ids: Tensor) -> Tensor:
    """[3, M]: the student's mass on the support, the overlap of its own top K with it, and its entropy (nats)."""
    statistics = head_statistics(hidden, head, None, chunk_size=_CHUNK_SIZE, top_k=support_ids.shape[1])
    logprobs = support_logits(hidden, head, support_ids) - statistics.logsumexp[:, None]
    overlap = overlap_ratio(statistics.topk_ids, support_ids)
    return torch.stack([logprobs.exp().sum(-1), overlap.to(logprobs.dtype), statistics.entropy])
