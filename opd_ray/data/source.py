"""The prompt source: several passes over the prompts, each in its own order, from any point on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from opd_ray.errors import DataError
from opd_ray.types import Prompt


def epoch_order(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """Order of one pass: a permutation of ``range(num_prompts)`` that depends on `seed` and `epoch` alone."""
    order = list(range(num_prompts))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class PromptSource:
    """An iterator over `prompts`, `epochs` times (None: endlessly), shuffled again each time by `seed`.

    ``next(source)`` is the next prompt with its `epoch` set, and raises `StopIteration` after the last.
    Raises `DataError` when there are no prompts or two have the same id.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, epochs: int | None = None) -> None:
        if not prompts:
            raise DataError("the prompt source has no prompts: give at least one")
        self._by_id = {prompt.id: prompt for prompt in prompts}
        if len(self._by_id) < len(prompts):
            raise DataError(f"{len(prompts)} prompts have only {len(self._by_id)} different ids: make ids distinct")
        if epochs is not None and epochs < 1:
            raise DataError(f"{epochs} epochs over the prompts: give at least 1, or None for endless")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._epochs = epochs
        self._digest = hashlib.sha256("\n".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]
        self._seek(0, 0)

    def __iter__(self) -> PromptSource:
        return self

    def __next__(self) -> Prompt:
        if self._position == len(self._prompts):
            self._seek(self._epoch + 1, 0)
        if self._epochs is not None and self._epoch >= self._epochs:
            raise StopIteration
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        return replace(prompt, epoch=self._epoch)

    def find(self, prompt_id: str) -> Prompt:
        """The prompt of that id; raises `DataError` if there is none."""
        if prompt_id not in self._by_id:
            raise DataError(f"there is no prompt with id {prompt_id!r}: resume with the same prompts")
        return self._by_id[prompt_id]

    def state(self) -> dict[str, int | str]:
        """Where the source stands, JSON-able."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "num_prompts": len(self._prompts),
            "digest": self._digest,
        }

    def restore(self, state: dict[str, int | str]) -> None:
        """Go on from a `state`; raises `DataError` when it belongs to other prompts or another seed."""
        for key in ("seed", "num_prompts", "digest"):
            if state.get(key) != self.state()[key]:
                raise DataError(
                    f"the saved prompt cursor has {key} {state.get(key)!r} and "
                    f"this run {self.state()[key]!r}: resume with the same prompts and seed"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or not 0 <= position <= len(self._prompts):
            raise DataError(f"the saved prompt cursor is at epoch {epoch!r}, position {position!r}: it is damaged")
        self._seek(epoch, position)

    def _seek(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = epoch_order(len(self._prompts), self._seed, epoch)
