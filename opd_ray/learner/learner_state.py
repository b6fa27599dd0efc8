"""The learner's state for an exact resume, written to and read from a folder by all ranks.

A resumed run's losses equal the unbroken run's to the last bit with the same ranks and ZeRO stage; with others, up to
rounding. The learning rate of the next step is the config's at that step.
Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ray.errors import CheckpointError
from opd_ray.learner.old_logprobs import OldLogprobsCache
from opd_ray.learner.optimizer_shards import OptimizerShards
from opd_ray.learner.saved_shards import SavedShards
from opd_ray.learner.state_files import (
    RankPart,
    StateIndex,
    check_file,
    file_name,
    open_tensors,
    read_index,
    write_index,
    write_tensors,
)
from opd_ray.learner.step_gate import StepGate

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_CPU_RNG, _CUDA_RNG, _BEHAVIOR = "rng.cpu", "rng.cuda", "behavior"


class LearnerState:
    """Saves and loads one rank's part; every rank must be called, between steps."""

    def __init__(
        self, engine: Any, shards: OptimizerShards, memory: OldLogprobsCache, gate: StepGate, device: torch.device
    ) -> None:
        self._engine = engine
        self._shards = shards
        self._memory = memory
        self._gate = gate
        self._device = device
        self._rank = dist.get_rank()

    def save(self, folder: Path) -> None:
        """Write the state into `folder`, which exists; raises `CheckpointError` on all ranks when one cannot."""
        own = {_CPU_RNG: torch.get_rng_state()}
        if self._device.type == "cuda":
            own[_CUDA_RNG] = torch.cuda.get_rng_state(self._device)
        behavior = self._memory.entries
        if behavior:
            own[_BEHAVIOR] = torch.cat(list(behavior.values())).cpu()
        with _together():
            files = (
                write_tensors(folder, file_name("optimizer", self._rank), self._shards.tensors()),
                write_tensors(folder, file_name("rank", self._rank), own),
            )
        sizes = tuple((trajectory_id, len(logprobs)) for trajectory_id, logprobs in behavior.items())
        part = RankPart(*files, tuple(self._shards.fragments()), tuple(self._shards.steps()), sizes)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        if self._rank == 0:
            write_index(folder, StateIndex(self._shards.parameters, self._shared(), tuple(parts)))

    def _shared(self) -> dict[str, Any]:
        return {
            "counters": {name: getattr(self._engine, name) for name in _COUNTERS},
            "schedule_step": self._engine.lr_scheduler.last_epoch,
            "gate": self._gate.state_dict(),
        }

    def load(self, folder: Path) -> None:
        """Take over the state in `folder`.

        Raises:
            CheckpointError: on all ranks and with nothing changed, when it is missing, damaged or of another model.
        """
        with _together():
            index = read_index(folder)
            self._check_same_model(folder, index)
            saved = SavedShards(folder, index)
            saved.check(self._shards.fragments())
            for part in index.ranks:
                check_file(folder, part.own)
            behavior = self._saved_behavior(folder, index)
        self._shards.restore(saved.read, saved.step_of)
        self._restore_schedule(index.shared["schedule_step"])
        for name, value in index.shared["counters"].items():
            setattr(self._engine, name, value)
        self._gate.load_state_dict(index.shared["gate"])
        self._memory.entries = behavior
        self._restore_rng(folder, index)

    def _check_same_model(self, folder: Path, index: StateIndex) -> None:
        mine, theirs = self._shards.parameters, index.parameters
        differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"the learner state in {folder} is of another model: {name!r} has shape {theirs.get(name)} there and "
                f"{mine.get(name)} here ({len(differing)} differ): resume with the student that the run began with"
            )

    def _saved_behavior(self, folder: Path, index: StateIndex) -> dict[int, Tensor]:
        """This rank's own log-probs by trajectory; those of all ranks where their number has changed."""
        parts = index.ranks
        if len(parts) == dist.get_world_size():
            parts = parts[self._rank : self._rank + 1]
        found: dict[int, Tensor] = {}
        for part in parts:
            if part.behavior:
                joined = open_tensors(folder / part.own.name).get_tensor(_BEHAVIOR).to(self._device)
                pieces = torch.split(joined, [size for _, size in part.behavior])
                # Copies, because a piece would keep all others alive.
                found |= {
                    trajectory_id: piece.clone()
                    for (trajectory_id, _), piece in zip(part.behavior, pieces, strict=True)
                }
        return found

    def _restore_schedule(self, step: int) -> None:
        """The learning rate of `step` by the config's schedule, as `LambdaLR.step` would set it."""
        schedule = self._engine.lr_scheduler
        schedule.last_epoch, schedule._step_count = step, step + 1
        schedule._last_lr = [
            base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, lr in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = lr

    def _restore_rng(self, folder: Path, index: StateIndex) -> None:
        if self._rank >= len(index.ranks):
            return
        own = open_tensors(folder / index.ranks[self._rank].own.name)
        torch.set_rng_state(own.get_tensor(_CPU_RNG))
        if self._device.type == "cuda" and _CUDA_RNG in own.keys():  # noqa: SIM118  (no mapping)
            torch.cuda.set_rng_state(own.get_tensor(_CUDA_RNG), self._device)


@contextmanager
def _together() -> Iterator[None]:
    """All ranks leave the block well, or all raise the first one's `CheckpointError`."""
    mine: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        mine = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if mine is None else str(mine))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise CheckpointError(first) from mine
