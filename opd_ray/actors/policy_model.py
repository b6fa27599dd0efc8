"""The student as the learner trains it: the language model plus the memory-lean head of the objective.

Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from opd_ray.actors.scoring_model import hidden_states
from opd_ray.objective import support_logits, token_logprobs

# Numbers in one chunk of [positions, V] logits: 128 MiB in float32.
_CHUNK_NUMBERS = 2**25


class LogprobMode(Enum):
    """Whether log-probs of the sampled tokens are computed, and whether they carry gradient."""

    none = "none"
    constant = "constant"
    differentiable = "differentiable"


class PolicyModel(nn.Module):
    """Wraps a causal language model; the forward pass returns what the losses need and nothing V wide."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, H]; the embedding where the two are tied."""
        weight: nn.Parameter = self.language_model.get_output_embeddings().weight
        return weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        sampled_ids: Tensor,
        support_ids: Tensor | None,
        mode: LogprobMode,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the support [N, K] and log-probs of the sampled tokens [N] (each None if not asked for).

        `input_ids` int64 [B, L], `positions` int64 [N] into [B * L], `sampled_ids` int64 [N], `support_ids` int64
        [N, K] or None.
        """
        hidden = hidden_states(self.language_model, input_ids, positions)
        head = self.head_weight
        logits = None if support_ids is None else support_logits(hidden, head, support_ids)
        chunk_size = max(1, _CHUNK_NUMBERS // head.shape[0])
        logprobs = None
        if mode is LogprobMode.constant:
            with torch.no_grad():
                logprobs = token_logprobs(hidden, head, sampled_ids, chunk_size=chunk_size)
        elif mode is LogprobMode.differentiable:
            logprobs = token_logprobs(hidden, head, sampled_ids, chunk_size=chunk_size)
        return logits, logprobs
