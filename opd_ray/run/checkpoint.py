"""Checkpoints of a run: all that an exact resume needs, committed together.

::

    checkpoints/step-000040/
        checkpoint.json   format, policy version, state of the rollout loop, notes of the session, the run's config
        learner/          weights, optimizer, what the gate remembers (`learner.learner_state`)
        store/            ready trajectories, what was in flight, the books (`replay.checkpoint`)
        student/          the student for transformers and vLLM

A folder appears whole, by a rename, after the step's line in `metrics.jsonl`; older ones are removed only then. The
store's payloads are written while training continues: what they belong to was frozen before.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.errors import CheckpointError, OpdError
from opd_ray.storage.committed_folder import FolderDraft, ended_in_thread

FORMAT = 2
FOLDER = "checkpoints"
INDEX = "checkpoint.json"
LEARNER, STORE, STUDENT = "learner", "store", "student"
_NAME = re.compile(r"step-(\d{6,})")

logger = logging.getLogger("opd_ray")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint. `rollout_state` is the rollout loop's `state_dict`, `notes` are the session's."""

    folder: Path
    policy_version: int
    rollout_state: Mapping[str, Any]
    notes: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def learner(self) -> Path:
        """Folder of the learner's state."""
        return self.folder / LEARNER

    @property
    def store(self) -> Path:
        """Folder of the store's state."""
        return self.folder / STORE


@dataclass(slots=True)
class CheckpointDraft:
    """A checkpoint in the making, in a temporary `folder`."""

    policy_version: int
    folder: Path
    commit_to: FolderDraft
    rollout_state: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Path:
        """Create the folder of one part; returns it."""
        path = self.folder / name
        path.mkdir()
        return path


class Checkpoints:
    """The checkpoints of one run folder: one each `every` steps (0: none), of which the `keep` newest stay.

    `notes` returns what the session wants to find again.
    """

    def __init__(
        self, run_folder: Path, every: int, keep: int, config: Mapping[str, Any], notes: Callable[[], dict[str, Any]]
    ) -> None:
        self._folder = run_folder / FOLDER
        self._every = every
        self._keep = keep
        self._config = config
        self._notes = notes
        self._writing: asyncio.Task[None] | None = None

    @property
    def are_on(self) -> bool:
        """Whether checkpoints are written."""
        return self._every > 0

    def is_due(self, policy_version: int) -> bool:
        """Whether a checkpoint is written at `policy_version`."""
        return self.are_on and policy_version % self._every == 0

    async def begin(self, policy_version: int) -> CheckpointDraft:
        """Return an empty draft, once the checkpoint before is committed; `commit` or `discard` it."""
        await self.settle()
        commit_to = FolderDraft(self._folder / f"step-{policy_version:06d}")
        try:
            temporary = await ended_in_thread(commit_to.begin)
        except BaseException as error:
            await ended_in_thread(commit_to.discard)
            if isinstance(error, OSError):
                raise _cannot_write(commit_to.folder, error) from error
            raise
        return CheckpointDraft(policy_version, temporary, commit_to)

    def commit(self, draft: CheckpointDraft, write_rest: Callable[[], Awaitable[None]]) -> None:
        """Commit a draft in the background, after `write_rest`; `settle` raises what went wrong.

        The session's notes are those of this moment.
        """
        index = {
            "format": FORMAT,
            "policy_version": draft.policy_version,
            "rollout_state": draft.rollout_state,
            "notes": self._notes(),
            "config": self._config,
        }
        self._writing = asyncio.create_task(self._commit(draft, index, write_rest))

    async def _commit(
        self, draft: CheckpointDraft, index: Mapping[str, Any], write_rest: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await write_rest()
            text = json.dumps(index, indent=2) + "\n"
            await ended_in_thread((draft.folder / INDEX).write_text, text, "utf-8")
            await ended_in_thread(draft.commit_to.commit)
        except BaseException as error:
            await ended_in_thread(draft.commit_to.discard)
            if isinstance(error, OSError) and not isinstance(error, OpdError):
                raise _cannot_write(draft.commit_to.folder, error) from error
            raise
        for old in _folders(self._folder)[: -self._keep]:
            await ended_in_thread(shutil.rmtree, old, True)

    async def discard(self, draft: CheckpointDraft) -> None:
        """Remove a draft that is not committed."""
        await ended_in_thread(draft.commit_to.discard)

    async def settle(self) -> None:
        """Wait until no checkpoint is being written; raises `CheckpointError` or `CheckpointError` where one failed.

        Older checkpoints are then still there.
        """
        if (writing := self._writing) is not None:
            await asyncio.wait([writing])
            self._writing = None
            writing.result()

    def raise_failure(self) -> None:
        """Raise what `settle` would, without waiting."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    async def stop(self) -> None:
        """End the writing of a checkpoint that is not committed yet; its errors are logged."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.cancel()
        (outcome,) = await asyncio.gather(writing, return_exceptions=True)
        if isinstance(outcome, Exception):
            logger.warning("the last checkpoint was not written: %s", outcome)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint; raises `CheckpointError` when it is damaged."""
        return latest_checkpoint(self._folder.parent)


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be written ({error.strerror}): make room, or set checkpoint.every=0")


def latest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run folder, or None; raises `CheckpointError` when it is damaged."""
    folders = _folders(run_folder / FOLDER)
    return read_checkpoint(folders[-1]) if folders else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint; raises `CheckpointError` when it is missing, damaged or of another format."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {index['format']} and {FORMAT} is expected: resume with the version of opd_ray "
                "that wrote it, or start a new run with resume=never"
            )
        return Checkpoint(folder, index["policy_version"], index["rollout_state"], index["notes"], index["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder} is no checkpoint, or a damaged one ({error!r}): remove it to resume from an older one"
        ) from error


def _folders(parent: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first."""
    found = [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
