"""The part of the fp32 master weights and of AdamW's state that DeepSpeed keeps on this rank, by parameter name.

ZeRO 1 and 2 cut the flattened parameters of a group, one after the other, into equal parts; ZeRO 3 cuts every
parameter by itself. Either way a rank holds flat float32 partitions, and each `Fragment` says which elements of which
parameter lie where in them: all that is needed to continue with another stage or number of ranks.
Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ray.learner.policy_model import PolicyModel

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start .. start + size`` of a flattened parameter, at `offset` of the rank's partition number `group`.

    Padding belongs to no fragment.
    """

    name: str
    start: int
    size: int
    group: int
    offset: int


class OptimizerShards:
    """Reads and renews this rank's partitions; `engine` is DeepSpeed's, around `policy`."""

    def __init__(self, engine: Any, policy: PolicyModel, *, rank: int, zero_stage: int) -> None:
        self._zero: Any = engine.optimizer
        self._is_sharded = zero_stage == 3
        self._named = dict(policy.language_model.named_parameters())
        self._rank = rank

    @property
    def parameters(self) -> dict[str, list[int]]:
        """Shape of every trained parameter, by name."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._named.items() if p.requires_grad}

    @property
    def partitions(self) -> list[Tensor]:
        """The flat fp32 masters of this rank, by group."""
        zero = self._zero
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._is_sharded else zero.single_partition_of_fp32_groups
        )
        return flat

    def fragments(self) -> list[Fragment]:
        """Where the elements of the parameters lie in `partitions`."""
        find = self._fragment_zero3 if self._is_sharded else self._fragment_zero12
        found = (find(name, parameter) for name, parameter in self._named.items() if parameter.requires_grad)
        return [fragment for fragment in found if fragment is not None]

    def _fragment_zero12(self, name: str, parameter: Any) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(name, here.start, here.numel, mapping.param_group_index, there.start)

    def _fragment_zero3(self, name: str, parameter: Any) -> Fragment | None:
        group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = size * self._rank
        size = min(size, parameter.ds_numel - start)
        return Fragment(name, start, size, group, offset) if size > 0 else None

    def steps(self) -> list[float]:
        """AdamW's step of each partition; 0 before the first."""
        return [float(self._state(flat).get("step", 0.0)) for flat in self.partitions]

    def tensors(self) -> dict[str, Tensor]:
        """The flat partitions and their moments as ``<group>.<kind>``; no moments before the first step."""
        found = {}
        for group, flat in enumerate(self.partitions):
            state = self._state(flat)
            found[f"{group}.{MASTER}"] = flat.detach()
            found |= {f"{group}.{kind}": state[kind] for kind in MOMENTS if kind in state}
        return found

    def restore(self, read: Callable[[Fragment, str], Tensor], step_of: Callable[[Fragment], float]) -> None:
        """Take over the saved elements of every fragment, ``read(fragment, kind)`` [size], and renew the weights.

        Every rank must call it.
        """
        if self._is_sharded:
            self._zero.checkpoint_event_prologue()
        with torch.no_grad():
            for fragment in self.fragments():
                flat = self.partitions[fragment.group]
                step = step_of(fragment)
                targets = {MASTER: flat.data} | self._moments(flat, step)
                for kind, target in targets.items():
                    target.narrow(0, fragment.offset, fragment.size).copy_(read(fragment, kind))
            self._renew_weights()

    def _moments(self, flat: Tensor, step: float) -> dict[str, Tensor]:
        """The moments of a partition, made where AdamW has not yet; none before its first step."""
        if not step:
            self._zero.optimizer.state.pop(flat, None)
            return {}
        state = self._zero.optimizer.state[flat]
        if not state:
            # As AdamW itself begins; "step" stays on the CPU.
            state |= {"step": torch.zeros((), dtype=torch.float32)}
            state |= {kind: torch.zeros_like(flat.data) for kind in MOMENTS}
        state["step"].fill_(step)
        return {kind: state[kind] for kind in MOMENTS}

    def _renew_weights(self) -> None:
        """The model's own weights are the masters in the training dtype."""
        if not self._is_sharded:
            self._zero.update_lp_params()
            return
        for group in range(len(self.partitions)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()

    def _state(self, flat: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = self._zero.optimizer.state.get(flat, {})
        return found
