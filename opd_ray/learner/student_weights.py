"""The student's whole weights out of the learner ranks: published to the engines, or written to a folder.

Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from opd_ray.learner.policy_model import PolicyModel
from opd_ray.models.weights import BUCKET_BYTES, WeightBucket, pack_buckets
from opd_ray.storage.committed_folder import committed_folder

_Named = tuple[tuple[str, ...], nn.Parameter]


class StudentWeights:
    """Reads the weights of the model that DeepSpeed trains.

    With `is_sharded` (ZeRO 3) every rank must take part in each call. `dtype` is the rollout engines'.
    """

    def __init__(self, policy: PolicyModel, dtype: torch.dtype, *, rank: int, is_sharded: bool) -> None:
        self._policy = policy
        self._dtype = dtype
        self._rank = rank
        self._is_sharded = is_sharded
        self._groups = list(_groups(policy.language_model, dtype.itemsize))

    @property
    def num_buckets(self) -> int:
        """Number of buckets that rank 0 exports; each is of bounded size, or one larger tensor."""
        return len(self._groups)

    def _whole(self) -> Iterator[Iterator[tuple[tuple[str, ...], Tensor]]]:
        """All weights by their names, a group at a time: it must be used up before the next one is asked for."""
        for group in self._groups:
            # Under ZeRO 3 the storage is DeepSpeed's within the context, and gone after it.
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in group], enabled=self._is_sharded):
                yield ((names, parameter.detach()) for names, parameter in group)

    def export(self) -> Iterator[WeightBucket]:
        """All weights in the rollout engines' dtype (rank 0; nothing elsewhere).

        A tied head is named as well: vLLM keeps a repacked copy of it, which only loading it by name renews.
        """
        if self._rank and not self._is_sharded:
            return
        for weights in self._whole():
            if self._rank == 0:
                yield from pack_buckets(weights, self._dtype, bucket_bytes=sys.maxsize)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write model and tokenizer with `save_pretrained` (rank 0)."""
        state: dict[str, Tensor] = {}
        if self._rank == 0 or self._is_sharded:
            for weights in self._whole():
                if self._rank == 0:
                    state |= {names[0]: tensor.cpu().clone() for names, tensor in weights}
        if self._rank == 0:
            with committed_folder(folder) as temporary:
                self._policy.language_model.save_pretrained(temporary, state_dict=state)
                tokenizer.save_pretrained(temporary)


def _groups(language_model: nn.Module, item_bytes: int) -> Iterator[Sequence[_Named]]:
    """Parameters with all their names, of `BUCKET_BYTES` at most or one larger one; a tied one comes once."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, parameter in language_model.named_parameters(remove_duplicate=False):
        names[parameter] = (*names.get(parameter, ()), name)
    group: list[_Named] = []
    size = 0
    for parameter, all_names in names.items():
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * item_bytes
        if group and size + num_bytes > BUCKET_BYTES:
            yield group
            group, size = [], 0
        group.append((all_names, parameter))
        size += num_bytes
    yield group
