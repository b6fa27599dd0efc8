"""One rank's optimizer steps: forward, gate, loss, backward, and the step scaled by the global number of tokens.

Imports torch, transformers and deepspeed: learner workers only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ray.config.choices import GateKind, HeadKernel
from opd_ray.config.registry import Needs
from opd_ray.errors import DivergedError, ModelError
from opd_ray.learner.columns import learner_columns
from opd_ray.learner.deepspeed_engine import join_ranks, start_engine
from opd_ray.learner.head_requests import HeadRequests
from opd_ray.learner.learner_state import LearnerState
from opd_ray.learner.losses import token_losses
from opd_ray.learner.microbatch import (
    Microbatch,
    make_microbatch,
    select_high_entropy,
    select_positions,
    select_support,
)
from opd_ray.learner.old_logprobs import Behavior, OldLogprobsCache
from opd_ray.learner.optimizer_shards import OptimizerShards
from opd_ray.learner.policy_model import HeadRequest, HeadValues, PolicyModel
from opd_ray.learner.spec import LearnerSpec, RankBatch
from opd_ray.learner.step_gate import StepGate, TokenWeights
from opd_ray.learner.step_record import StepRecord
from opd_ray.learner.step_report import RankReport
from opd_ray.learner.student_weights import StudentWeights
from opd_ray.learner.token_masks import TokenMasks
from opd_ray.learner.trajectory_recorder import TrajectoryRecorder
from opd_ray.models.loading import PaddedRows, load_causal_lm
from opd_ray.models.tokenization import load_tokenizer, newline_token_mask
from opd_ray.models.weights import WeightBucket
from opd_ray.objective import gated_token_mean
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import training_rows


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass of a microbatch (None: a placeholder): what it was asked for, and what it found."""

    micro: Microbatch | None
    request: HeadRequest
    values: HeadValues


class Trainer:
    """The student, its optimizer, and what the gate remembers of earlier steps.

    Attributes:
        takes_trees: whether what trajectories of a microbatch begin with alike is computed once (`prefix_tree`).
    """

    def __init__(self, spec: LearnerSpec) -> None:
        torch.set_num_threads(spec.threads)
        cfg = self._cfg = spec.cfg
        self._device = join_ranks()
        self._tokenizer: Any = load_tokenizer(spec.model_path)
        self._pad_id = int(self._tokenizer.pad_token_id or 0)
        language_model = load_causal_lm(spec.model_path, cfg.learner.dtype)
        if cfg.learner.gradient_checkpointing:
            language_model.gradient_checkpointing_enable()
        if cfg.learner.head_kernel is HeadKernel.triton and self._device.type != "cuda":
            raise ModelError("learner.head_kernel=triton needs a learner on a GPU: set learner.head_kernel=torch")
        policy = PolicyModel(language_model, cfg.learner.head_kernel)
        self.takes_trees = policy.takes_trees
        newlines = torch.from_numpy(newline_token_mask(self._tokenizer, policy.head_weight.shape[0]))
        self._columns = learner_columns(cfg.objective, cfg.gate, probes=cfg.telemetry.probe_positions > 0)
        self._masks = TokenMasks(cfg.objective.mask_rules, self._tokenizer)
        self._memory = OldLogprobsCache(cfg.gate.behavior_source, cfg.replay.reuse)
        loss_has_ratio = cfg.objective.needs is Needs.sampled_logprobs
        self._gate = StepGate(cfg.gate, newlines.to(self._device), seed=cfg.seed, loss_has_ratio=loss_has_ratio)
        self._requests = HeadRequests(cfg, self._gate, self._memory)
        self._watch = TrajectoryRecorder(spec, self._tokenizer)
        self._engine = start_engine(policy, cfg.learner, num_ranks=cfg.learner.num_ranks, num_steps=cfg.num_steps)
        zero_stage = cfg.learner.zero_stage
        self._weights = StudentWeights(
            policy, getattr(torch, cfg.student.dtype.name), rank=spec.rank, is_sharded=zero_stage == 3
        )
        shards = OptimizerShards(self._engine, policy, rank=spec.rank, zero_stage=zero_stage)
        self._state = LearnerState(self._engine, shards, self._memory, self._gate, self._device)

    def any_rank(self, fact: bool) -> bool:
        """Whether `fact` holds on any rank; every rank must ask."""
        if self._cfg.learner.num_ranks == 1:
            return fact
        flag = torch.tensor([int(fact)], device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def train_step(self, batch: RankBatch, payloads: Sequence[Any]) -> RankReport:
        """One optimizer step; returns this rank's sums. Raises `DivergedError` on a non-finite loss or norm."""
        started = time.monotonic()
        gate = self._gate
        report = RankReport(lr=float(self._engine.get_lr()[0]), tau=gate.strength.tau)
        record = StepRecord(report, self._cfg.gate.kind is not GateKind.off)
        with record.timed("pack"):
            micros = self._microbatches(batch, payloads)
            self._watch.begin(batch, payloads)
        planned = self._planned(batch, micros, record)
        for index, (micro, weighed) in enumerate(zip(micros, planned, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
            with record.timed("forward"):
                done = self._forward(micro, with_loss=True, is_planned=weighed is not None, num_passes=len(micros))
            loss = self._loss(done, weighed, record)
            with record.timed("backward"):
                self._engine.backward(loss, scale_wrt_gas=False)
        with record.timed("optimizer"):
            weight_scale = self._scaled_step(report)
        report.grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(report.grad_norm):
            raise DivergedError(f"the gradient norm is {report.grad_norm}: lower learner.lr")
        with record.timed("gate"):
            gate.end_step()
        self._memory.forget(batch.last_uses)
        if batch.dumped:
            with record.timed("dump"):
                self._watch.write(report.tau, weight_scale)
        report.times["step"] = time.monotonic() - started
        return record.finish(weight_scale)

    def _microbatches(self, batch: RankBatch, payloads: Sequence[Any]) -> list[Microbatch | None]:
        """This rank's microbatches; None is a placeholder, as every rank must call backward equally often."""
        needed = {payload for payload, _ in batch.rows.values()}
        decoded = {i: training_rows(decode(payloads[i], columns=self._columns)) for i in needed}
        micros: list[Microbatch | None] = []
        for members in batch.microbatches:
            if not members:
                micros.append(None)
                continue
            rows = [decoded[payload][row] for payload, row in (batch.rows[i] for i in members)]
            infos = [batch.infos[i] for i in members]
            micro = make_microbatch(
                rows, infos, members, pad_id=self._pad_id, device=self._device, with_tree=self.takes_trees
            )
            micro = select_support(micro, self._cfg.teacher.support)
            micros.append(self._gate.segmented(select_positions(micro, self._cfg.objective, self._masks)))
        return micros

    def _planned(
        self, batch: RankBatch, micros: list[Microbatch | None], record: StepRecord
    ) -> list[TokenWeights | None]:
        """Weights that need the whole step first, by a forward pass without gradient; None for each otherwise.

        Placeholders take part, because under ZeRO 3 a forward pass is a collective; `micros` get their final `valid`.
        """
        if not self._gate.needs_plan(batch.is_fresh):
            return [None] * len(micros)
        drafts: list[tuple[Microbatch, TokenWeights] | None] = []
        with record.timed("plan"), torch.no_grad():
            for index, micro in enumerate(micros):
                done = self._forward(micro, with_loss=False)
                micros[index] = done.micro
                drafts.append(
                    None if done.micro is None else (done.micro, self._weigh(done.micro, done.values.logprobs)[0])
                )
            return self._gate.plan(drafts, batch.policy_version)

    def _forward(
        self, micro: Microbatch | None, *, with_loss: bool, is_planned: bool = False, num_passes: int = 0
    ) -> _Pass:
        """One forward pass; the microbatch comes back with its final `valid`."""
        if micro is None:
            one = torch.zeros(1, dtype=torch.int64, device=self._device)
            request = self._requests.placeholder(self._device)
            block = PaddedRows(one[:, None], one, (1,))
            return _Pass(None, request, HeadValues.of(request, self._engine(block, one, request)))
        request = self._requests.of(micro, with_loss=with_loss, is_planned=is_planned, num_passes=num_passes)
        if with_loss:
            request = self._watch.added_to(request, micro)
        outputs = self._engine(micro.block, micro.sampled_ids, request)
        values = HeadValues.of(request, outputs)
        if values.entropy is not None:
            micro = select_high_entropy(micro, values.entropy, self._cfg.objective.entropy_top_share)
        return _Pass(micro, request, values)

    def _weigh(self, micro: Microbatch, current: Tensor | None) -> tuple[TokenWeights, Behavior]:
        if current is not None and bool(current.detach()[micro.valid].isinf().any()):
            raise DivergedError("the student's log-probs are infinite: lower learner.lr")
        behavior = self._memory.behavior(micro, current)
        return self._gate.weigh(micro, current, behavior), behavior

    def _loss(self, done: _Pass, planned: TokenWeights | None, record: StepRecord) -> Tensor:
        """The microbatch's sum(m g l); a placeholder's is exactly zero with a graph."""
        micro, values = done.micro, done.values
        if micro is None:
            scores = [score for score in (values.logits, values.logprobs) if score is not None]
            return sum((score.float().sum() for score in scores), start=torch.zeros((), device=self._device)) * 0.0
        with record.timed("gate"):
            if planned is None:
                weighed, behavior = self._weigh(micro, values.logprobs)
            else:
                weighed, behavior = planned, self._memory.behavior(micro, values.logprobs)
        with record.timed("loss"):
            losses = token_losses(micro, self._cfg.objective, values, behavior.logprobs)
            mask = micro.to_rows(micro.valid)
            loss = gated_token_mean(micro.to_rows(losses), weighed.gate.token_weights, mask, num_loss_tokens=1)
        with record.timed("diagnostics"):
            record.report.loss_sum += float(loss.detach())
            record.count(micro, weighed, losses)
            record.compare(micro, values.logprobs, behavior)
            record.probe(micro, done.request.probe_at, values.probe)
            self._watch.take(micro, values.watched, weighed, behavior, losses)
        return loss

    def _scaled_step(self, report: RankReport) -> float:
        """Step with the accumulated gradients of sum(m g l) divided by the all-reduced divisor of the step.

        The divisor is known only now; as the optimizer's loss scale it divides gradients before the norm, the clipping
        and the update. DeepSpeed has averaged the gradients over the ranks, so the divisor is averaged too. Returns the
        factor that turns token weights into normalised ones.
        """
        sums = [report.weight_sum, report.loss_sum, float(report.num_tokens)]
        total = torch.tensor(sums, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        weight_sum, loss_sum, num_tokens = total.tolist()
        if not math.isfinite(loss_sum) or not math.isfinite(weight_sum):
            raise DivergedError(f"the loss is {loss_sum / max(weight_sum, 1e-300)}: lower learner.lr")
        report.divisor = self._gate.divisor(weight_sum, num_tokens)
        optimizer = self._engine.optimizer
        optimizer.loss_scale = report.divisor / self._cfg.learner.num_ranks if report.divisor > 0 else 1.0
        self._engine.step()
        optimizer.loss_scale = 1.0
        return num_tokens / report.divisor if report.divisor > 0 else 1.0

    @property
    def num_buckets(self) -> int:
        """Number of buckets that `export` yields."""
        return self._weights.num_buckets

    def export(self) -> Iterator[WeightBucket]:
        """All weights in the rollout engines' dtype (rank 0; nothing elsewhere, but every rank must exhaust it)."""
        return self._weights.export()

    def save(self, folder: Path) -> None:
        """Write model and tokenizer with `save_pretrained` (rank 0)."""
        self._weights.save(folder, self._tokenizer)

    def save_checkpoint(self, folder: Path) -> None:
        """Write what an exact resume needs into `folder`; raises `CheckpointError`."""
        self._state.save(folder)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a saved state; raises `CheckpointError`, then nothing has changed."""
        self._state.load(folder)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
