"""Requests to the LM head for each forward pass: what the loss and the gate need, and no more of the vocabulary.

Imports torch: learner workers only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ray.config.choices import GateKind
from opd_ray.config.schema import RunConfig
from opd_ray.learner.facts import probe_positions
from opd_ray.learner.losses import needs_logprobs, requested_ids
from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.old_logprobs import OldLogprobsCache
from opd_ray.learner.policy_model import HeadRequest, LogprobMode
from opd_ray.learner.step_gate import StepGate


class HeadRequests:
    """Makes the requests of a rank's forward passes."""

    def __init__(self, cfg: RunConfig, gate: StepGate, memory: OldLogprobsCache) -> None:
        self._cfg = cfg
        self._gate = gate
        self._memory = memory

    def of(self, batch: Microbatch, *, with_loss: bool, is_planned: bool, num_passes: int) -> HeadRequest:
        """The request for a microbatch; without the loss, only what its weights need.

        `is_planned`: the weights are known already. The step's probe is spread over its `num_passes` passes.
        """
        objective = self._cfg.objective
        mode, at = LogprobMode.none, None
        if with_loss and needs_logprobs(objective):
            mode = LogprobMode.differentiable
        elif not is_planned and self._needs_drift(batch):
            mode, at = LogprobMode.constant, _measured_at(batch)
        probe = probe_positions(batch, -(-self._cfg.telemetry.probe_positions // num_passes)) if with_loss else None
        # The sampled token, where it was added, may stand in the support twice.
        width = batch.support_ids.shape[1] - objective.include_sampled
        return HeadRequest(
            support_ids=requested_ids(batch, objective) if with_loss else None,
            logprobs=mode,
            logprob_at=at,
            entropy=not is_planned and objective.entropy_top_share < 1,
            probe_at=probe,
            probe_support=None if probe is None else batch.support_ids[probe, :width],
        )

    def placeholder(self, device: torch.device) -> HeadRequest:
        """The least that gives a placeholder's output a graph through the whole model."""
        if needs_logprobs(self._cfg.objective):
            return HeadRequest(logprobs=LogprobMode.differentiable)
        return HeadRequest(support_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))

    def _needs_drift(self, batch: Microbatch) -> bool:
        """Drift takes the full log-sum-exp only where the gate can bite, or to remember log-probs for it."""
        if self._cfg.gate.kind is GateKind.off:
            return False
        return self._memory.remembers or self._gate.weighs_fresh or not all(batch.fresh)


def _measured_at(batch: Microbatch) -> Tensor | None:
    """[M] positions of the tokens whose drift is measured; None for all."""
    measured = batch.segments.measured
    return None if measured is None else batch.to_tokens(measured).nonzero().flatten()
