"""Sums, diagnostics and wall times that a rank gathers during one step.

Imports torch: learner workers only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from opd_ray.learner.diagnostics import ProbeFacts, SegmentFacts, StepDiagnostics, TokenStats
from opd_ray.learner.facts import probe_facts, segment_facts, token_facts
from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.old_logprobs import Behavior
from opd_ray.learner.step_gate import TokenWeights
from opd_ray.learner.step_report import RankReport


@dataclass(slots=True)
class StepRecord:
    """One rank's step so far."""

    report: RankReport
    is_gated: bool
    tokens: list[TokenStats] = field(default_factory=list)
    segments: list[SegmentFacts] = field(default_factory=list)
    probes: list[ProbeFacts] = field(default_factory=list)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of the block to the part's."""
        begun = time.monotonic()
        yield
        self.report.times[part] = self.report.times.get(part, 0.0) + time.monotonic() - begun

    def count(self, batch: Microbatch, weighed: TokenWeights, losses: Tensor) -> None:
        """Add a microbatch's tokens, weights and ungated losses [N]."""
        report, valid = self.report, batch.valid
        report.ungated_loss_sum += float(losses.detach()[valid].double().sum())
        report.weight_sum += float(weighed.gate.weight_sum)
        report.num_tokens += int(valid.sum())
        for rule, number in batch.removed.items():
            report.removed[rule] = report.removed.get(rule, 0) + number
        report.kl_sum += float((batch.engine_logprobs - batch.teacher_logprobs)[valid].double().sum())
        report.padded_tokens += batch.block.input_ids.numel()
        # A trajectory's last token predicts nothing and is not computed.
        report.model_tokens += sum(info.num_prompt_tokens + info.num_response_tokens - 1 for info in batch.infos)
        report.computed_tokens += batch.block.num_computed
        if weighed.sampling_error is not None:
            errors = weighed.sampling_error[weighed.gate.segment_tokens > 0].double()
            report.sampling_error_square_sum += float(errors.square().sum())
            report.sampled_segments += len(errors)
        self.tokens.append(token_facts(batch, weighed, is_gated=self.is_gated))
        if self.is_gated:
            self.segments.append(segment_facts(batch, weighed))

    def compare(self, batch: Microbatch, current: Tensor | None, behavior: Behavior) -> None:
        """Count what learner and engine disagree on in fresh trajectories, and what is measured against the engine."""
        lengths = list(batch.block.lengths)
        for index, (fresh, length) in enumerate(zip(batch.fresh, lengths, strict=True)):
            if not fresh and behavior.from_engine[index]:
                self.report.engine_behavior_tokens += length
        if current is None or not any(batch.fresh):
            return
        fresh_tokens = batch.to_tokens(batch.fresh_rows.expand(-1, max(lengths)))
        difference = (current.detach() - batch.engine_logprobs)[fresh_tokens].double()
        difference = difference[difference.isfinite()]
        self.report.mismatch_sum += float(difference.sum())
        self.report.mismatch_square_sum += float(difference.square().sum())
        self.report.mismatch_tokens += len(difference)

    def probe(self, batch: Microbatch, at: Tensor | None, found: Tensor | None) -> None:
        """Add what a forward pass found at the probed positions."""
        if at is not None and found is not None:
            self.probes.append(probe_facts(batch, at, found))

    def finish(self, weight_scale: float) -> RankReport:
        """The report with its diagnostics; `weight_scale` turns weights into normalised ones."""
        self.report.diagnostics = StepDiagnostics.of(self.tokens, self.segments, self.probes, weight_scale=weight_scale)
        return self.report
