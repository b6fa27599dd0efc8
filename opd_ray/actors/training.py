"""One rank's optimizer steps: forward, gate, loss, backward, and the step scaled by the global number of tokens.

Imports torch, transformers and deepspeed: learner workers only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_ray.actors.learner import LearnerSpec, RankBatch
from opd_ray.actors.microbatch import (
    Microbatch,
    gate_weights,
    make_microbatch,
    reduce_loss,
    segment_ids,
    segment_stats,
    token_losses,
)
from opd_ray.actors.policy_model import LogprobMode, PolicyModel
from opd_ray.actors.schedule import lr_factor
from opd_ray.actors.scoring_model import load_causal_lm
from opd_ray.actors.step_report import RankReport, SegmentStats
from opd_ray.actors.tokenization import load_tokenizer, newline_token_mask
from opd_ray.actors.weights import BUCKET_BYTES, WeightBucket, pack_buckets
from opd_ray.checkpoint import committed_folder
from opd_ray.config import BehaviorSource, Dtype, GateKind, LearnerConfig, ObjectiveKind
from opd_ray.errors import DivergedError
from opd_ray.replay.codec import decode
from opd_ray.replay.rows import ScoredRow, scored_rows


def deepspeed_config(cfg: LearnerConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's config; microbatches are counted by hand (their number differs from step to step)."""
    return {
        "train_batch_size": num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.lr,
                "betas": [0.9, cfg.beta2],
                "weight_decay": cfg.weight_decay,
                # torch's own AdamW needs no compiler on the machine.
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": cfg.zero_stage},
        "gradient_clipping": cfg.grad_clip,
        "bf16": {"enabled": cfg.dtype is Dtype.bfloat16},
        # Accumulation in the gradients' own dtype keeps stage 1 on the optimizer that has a loss scale.
        "data_types": {"grad_accum_dtype": "bf16" if cfg.dtype is Dtype.bfloat16 else "fp32"},
        "steps_per_print": 2**31,
    }


class Trainer:
    """The student, its optimizer, and the learner's own behaviour log-probs of trajectories seen at staleness 0."""

    def __init__(self, spec: LearnerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        use_gpu = torch.cuda.is_available()
        if not use_gpu:
            # DeepSpeed would compile a shared-memory op for inference on CPUs, which takes a compiler and a minute.
            deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", verbose=False)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._tokenizer: Any = load_tokenizer(spec.model_path)
        self._pad_id = int(self._tokenizer.pad_token_id or 0)
        language_model = load_causal_lm(spec.model_path, spec.learner.dtype)
        if spec.learner.gradient_checkpointing:
            language_model.gradient_checkpointing_enable()
        self._policy = PolicyModel(language_model)
        vocab_size = self._policy.head_weight.shape[0]
        self._newlines = torch.from_numpy(newline_token_mask(self._tokenizer, vocab_size)).to(self._device)
        self._engine = self._start_engine()
        self._behavior: dict[int, Tensor] = {}

    def _start_engine(self) -> Any:
        spec = self._spec
        if spec.learner.zero_stage == 3:
            # The head's weight is used in the wrapper's forward pass, outside the module that owns it.
            deepspeed.zero.register_external_parameter(self._policy, self._policy.head_weight)

        def schedule(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: lr_factor(
                    step,
                    schedule=spec.learner.lr_schedule,
                    warmup_steps=spec.learner.warmup_steps,
                    num_steps=spec.num_steps,
                ),
            )

        engine, *_ = deepspeed.initialize(
            model=self._policy,
            model_parameters=[p for p in self._policy.parameters() if p.requires_grad],
            config=deepspeed_config(spec.learner, spec.num_ranks),
            lr_scheduler=schedule,
        )
        engine.train()
        return engine

    def train_step(self, batch: RankBatch, payloads: Sequence[Any]) -> RankReport:
        """One optimizer step; returns this rank's sums. Raises `DivergedError` on a non-finite loss or norm."""
        started = time.monotonic()
        report = RankReport(lr=float(self._engine.get_lr()[0]))
        decoded = [scored_rows(decode(payload)) for payload in payloads]
        rows = [decoded[payload][row] for payload, row in batch.rows]
        last = len(batch.microbatches) - 1
        for index, members in enumerate(batch.microbatches):
            self._engine.set_gradient_accumulation_boundary(index == last)
            begun = time.monotonic()
            loss = self._forward(batch, rows, members, report)
            done = time.monotonic()
            self._engine.backward(loss, scale_wrt_gas=False)
            report.forward_s += done - begun
            report.backward_s += time.monotonic() - done
        self._scaled_step(report)
        report.grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(report.grad_norm):
            raise DivergedError(f"the gradient norm is {report.grad_norm}: lower learner.lr")
        for info in batch.infos:
            if info.visits >= self._spec.reuse:
                self._behavior.pop(info.slot, None)
        report.step_s = time.monotonic() - started
        return report

    def _scaled_step(self, report: RankReport) -> None:
        """Step with the accumulated gradients of sum(m g l) divided by the all-reduced sum(m g).

        The divisor is known only now; as the optimizer's loss scale it divides gradients before the norm, the clipping
        and the update. DeepSpeed has averaged the gradients over the ranks, so the divisor is averaged too.
        """
        total = torch.tensor([report.weight_sum, report.loss_sum], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        weight_sum, loss_sum = total.tolist()
        if not math.isfinite(loss_sum) or not math.isfinite(weight_sum):
            raise DivergedError(f"the loss is {loss_sum / max(weight_sum, 1e-300)}: lower learner.lr")
        optimizer = self._engine.optimizer
        optimizer.loss_scale = weight_sum / self._spec.num_ranks if weight_sum > 0 else 1.0
        self._engine.step()
        optimizer.loss_scale = 1.0

    def _forward(
        self, batch: RankBatch, rows: Sequence[ScoredRow], members: Sequence[int], report: RankReport
    ) -> Tensor:
        """The microbatch's sum(m g l); without members an exact zero with a graph, as every rank must call backward."""
        lsm = self._spec.objective.kind is ObjectiveKind.lsm
        if not members:
            one = torch.zeros(1, dtype=torch.int64, device=self._device)
            support = one[:, None] if lsm else None
            mode = LogprobMode.none if lsm else LogprobMode.differentiable
            logits, logprobs = self._engine(one[:, None], one, one, support, mode)
            output: Tensor = logits if logits is not None else logprobs
            return output.float().sum() * 0.0
        micro = make_microbatch(
            [rows[i] for i in members], [batch.infos[i] for i in members], self._pad_id, self._device
        )
        mode = self._logprob_mode(micro, lsm)
        support = micro.support_ids if lsm else None
        logits, current = self._engine(micro.block.input_ids, micro.block.positions, micro.sampled_ids, support, mode)
        behavior = self._behavior_logprobs(micro, current, report)
        losses = token_losses(micro, self._spec.objective, logits, current, behavior)
        return reduce_loss(micro, losses, self._weights(micro, current, behavior, report), report)

    def _logprob_mode(self, micro: Microbatch, lsm: bool) -> LogprobMode:
        """LSM needs the full log-sum-exp only where the gate can bite, or to remember behaviour log-probs for it."""
        if not lsm:
            return LogprobMode.differentiable
        if self._spec.gate.kind is GateKind.off:
            return LogprobMode.none
        remembers = self._spec.gate.behavior_source is BehaviorSource.learner and self._spec.reuse > 1
        return LogprobMode.constant if remembers or not bool(micro.is_fresh.all()) else LogprobMode.none

    def _behavior_logprobs(self, micro: Microbatch, current: Tensor | None, report: RankReport) -> Tensor:
        """[N] behaviour log-probs by `gate.behavior_source`; remembers and compares those seen at staleness 0."""
        use_own = self._spec.gate.behavior_source is BehaviorSource.learner
        if current is None:
            return micro.engine_logprobs
        parts = []
        own = torch.split(current.detach().float(), list(micro.block.lengths))
        engine = torch.split(micro.engine_logprobs, list(micro.block.lengths))
        for info, mine, theirs in zip(micro.infos, own, engine, strict=True):
            if info.visits == 1 and info.staleness == 0:
                self._compare(mine, theirs, report)
                if use_own and self._spec.reuse > 1:
                    self._behavior[info.slot] = mine.clone()
                parts.append(mine if use_own else theirs)
                continue
            remembered = self._behavior.get(info.slot) if use_own else None
            if remembered is None:
                report.engine_behavior_tokens += len(theirs)
            parts.append(theirs if remembered is None else remembered)
        return torch.cat(parts)

    @staticmethod
    def _compare(own: Tensor, engine: Tensor, report: RankReport) -> None:
        difference = (own - engine).double()
        difference = difference[difference.isfinite()]
        report.mismatch_sum += float(difference.sum())
        report.mismatch_square_sum += float(difference.square().sum())
        report.mismatch_tokens += len(difference)

    def _weights(self, micro: Microbatch, current: Tensor | None, behavior: Tensor, report: RankReport) -> Tensor:
        """[B, T] token weights: the mask itself where there is no gate."""
        gate = self._spec.gate
        if gate.kind is GateKind.off:
            return micro.to_rows(micro.valid.float())
        # Without log-probs all trajectories are fresh: drift is zero by definition, and the gate exactly one.
        own = torch.zeros_like(behavior) if current is None else current.detach().float()
        if not bool(own[micro.valid].isfinite().all()):
            raise DivergedError("the student's log-probs are not finite: lower learner.lr")
        result = gate_weights(
            micro,
            gate,
            own,
            torch.zeros_like(own) if current is None else behavior,
            segment_ids(micro, gate, self._newlines),
        )
        report.segments = SegmentStats.join([report.segments, segment_stats(micro, result)])
        return result.token_weights

    def _parameter_buckets(self) -> Iterator[list[tuple[tuple[str, ...], nn.Parameter]]]:
        """Parameters with all their names, in groups of bounded size; a tied one comes once."""
        names: dict[nn.Parameter, tuple[str, ...]] = {}
        for name, parameter in self._policy.language_model.named_parameters(remove_duplicate=False):
            names[parameter] = (*names.get(parameter, ()), name)
        group: list[tuple[tuple[str, ...], nn.Parameter]] = []
        size = 0
        for parameter, all_names in names.items():
            num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            if group and size + num_bytes > BUCKET_BYTES:
                yield group
                group, size = [], 0
            group.append((all_names, parameter))
            size += num_bytes
        yield group

    def _full_weights(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """All weights by their names; gathered a bucket at a time under ZeRO 3, where every rank must iterate."""
        for group in self._parameter_buckets():
            with deepspeed.zero.GatheredParameters(
                [parameter for _, parameter in group], enabled=self._spec.learner.zero_stage == 3
            ):
                for names, parameter in group:
                    # Within the context the storage is DeepSpeed's: it must not be kept.
                    yield names, parameter.detach().clone()

    def export(self) -> list[WeightBucket] | None:
        """All weights in the rollout engines' dtype (rank 0; None elsewhere).

        A tied head is named as well: vLLM keeps a repacked copy of it, which only loading it by name renews.
        """
        dtype: Any = getattr(torch, self._spec.publish_dtype)
        if self._spec.rank == 0:
            return list(pack_buckets(self._full_weights(), dtype))
        if self._spec.learner.zero_stage == 3:
            for _ in self._full_weights():
                pass
        return None

    def save(self, folder: Path) -> None:
        """Write model and tokenizer with `save_pretrained` (rank 0)."""
        if self._spec.rank == 0 or self._spec.learner.zero_stage == 3:
            state = {names[0]: tensor.cpu() for names, tensor in self._full_weights()}
        if self._spec.rank == 0:
            with committed_folder(folder) as temporary:
                self._policy.language_model.save_pretrained(temporary, state_dict=state)
                self._tokenizer.save_pretrained(temporary)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
