"""Elements of parameters out of the optimizer files of a saved state, however its ranks had cut them.

Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_ray.errors import CheckpointError
from opd_ray.learner.optimizer_shards import Fragment
from opd_ray.learner.state_files import StateIndex, check_file, open_tensors


class SavedShards:
    """The optimizer files of `index` in `folder`, opened where one is read."""

    def __init__(self, folder: Path, index: StateIndex) -> None:
        self._folder = folder
        self._index = index
        self._by_name: dict[str, list[tuple[int, Fragment]]] = {}
        for rank, part in enumerate(index.ranks):
            for saved in part.fragments:
                self._by_name.setdefault(saved.name, []).append((rank, saved))
        for entries in self._by_name.values():
            entries.sort(key=lambda entry: entry[1].start)
        self._open: dict[int, Any] = {}

    def check(self, wanted: Sequence[Fragment]) -> None:
        """Raise `CheckpointError` unless all elements of `wanted` are there, in files that are as they were written."""
        ranks = set()
        for fragment in wanted:
            sources = self._sources(fragment)
            if sum(stop - start for _, _, start, stop in sources) != fragment.size:
                raise CheckpointError(
                    f"the learner state in {self._folder} lacks a part of parameter {fragment.name!r}: "
                    "use an older checkpoint"
                )
            ranks |= {rank for rank, *_ in sources}
        for rank in sorted(ranks):
            check_file(self._folder, self._index.ranks[rank].optimizer)

    def read(self, fragment: Fragment, kind: str) -> Tensor:
        """[size] float32: the fragment's elements of the masters or of a moment."""
        parts = []
        for rank, saved, start, stop in self._sources(fragment):
            begin = saved.offset + start - saved.start
            whole = self._file(rank).get_slice(f"{saved.group}.{kind}")
            parts.append(whole[begin : begin + stop - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def step_of(self, fragment: Fragment) -> float:
        """AdamW's step of the fragment's parameter."""
        rank, saved = self._by_name[fragment.name][0]
        return self._index.ranks[rank].steps[saved.group]

    def _sources(self, fragment: Fragment) -> list[tuple[int, Fragment, int, int]]:
        """Rank, saved fragment, and the elements ``start .. stop`` of the parameter to take from it, in order."""
        end = fragment.start + fragment.size
        found = []
        for rank, saved in self._by_name.get(fragment.name, []):
            start, stop = max(fragment.start, saved.start), min(end, saved.start + saved.size)
            if start < stop:
                found.append((rank, saved, start, stop))
        return found

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = open_tensors(self._folder / self._index.ranks[rank].optimizer.name)
        return self._open[rank]
