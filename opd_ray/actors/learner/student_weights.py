"""The student's whole weights out of the learner ranks: published to the engines, or written to a folder.

Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from opd_ray.actors.learner.policy_model import PolicyModel
from opd_ray.actors.weights import BUCKET_BYTES, WeightBucket, pack_buckets
from opd_ray.checkpoint import committed_folder


class StudentWeights:
    """Reads the weights of the model that DeepSpeed trains; under ZeRO 3 every rank must take part in each call."""

    def __init__(self, policy: PolicyModel, *, rank: int, zero_stage: int) -> None:
        self._policy = policy
        self._rank = rank
        self._is_sharded = zero_stage == 3

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

    def _full(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """All weights by their names; gathered a bucket at a time under ZeRO 3."""
        for group in self._parameter_buckets():
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in group], enabled=self._is_sharded):
                for names, parameter in group:
                    # Within the context the storage is DeepSpeed's: it must not be kept.
                    yield names, parameter.detach().clone()

    def export(self, dtype_name: str) -> list[WeightBucket] | None:
        """All weights in the rollout engines' dtype (rank 0; None elsewhere).

        A tied head is named as well: vLLM keeps a repacked copy of it, which only loading it by name renews.
        """
        dtype: Any = getattr(torch, dtype_name)
        if self._rank == 0:
            return list(pack_buckets(self._full(), dtype))
        if self._is_sharded:
            for _ in self._full():
                pass
        return None

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write model and tokenizer with `save_pretrained` (rank 0)."""
        if self._rank == 0 or self._is_sharded:
            state = {names[0]: tensor.cpu() for names, tensor in self._full()}
        if self._rank == 0:
            with committed_folder(folder) as temporary:
                self._policy.language_model.save_pretrained(temporary, state_dict=state)
                tokenizer.save_pretrained(temporary)
