"""What an exact resume needs, committed together: learner, store, prompt cursor, and where the outputs stood.

::

    checkpoints/step-000040/
        checkpoint.json   format, policy version, frontier of the prompts, notes of the session, the run's config
        learner/          weights, optimizer, what the gate remembers (`learner.learner_state`)
        store/            ready rows, what was in flight, the books (`replay.snapshot`)
        student/          the student for transformers and vLLM

A folder appears whole, by a rename, after the step's line in `metrics.jsonl`; the older ones go only then.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.errors import CheckpointError, OpdError
from opd_ray.storage.committed_folder import committed_in_thread

FORMAT = 1
FOLDER = "checkpoints"
INDEX = "checkpoint.json"
LEARNER, STORE, STUDENT = "learner", "store", "student"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint. `frontier` is the rollout loop's, `notes` are the session's."""

    folder: Path
    policy_version: int
    frontier: Mapping[str, Any]
    notes: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def learner(self) -> Path:
        """Folder of the learner's state."""
        return self.folder / LEARNER

    @property
    def store(self) -> Path:
        """Folder of the store's snapshot."""
        return self.folder / STORE


@dataclass(slots=True)
class CheckpointDraft:
    """A checkpoint in the making: `folder` becomes `committed`."""

    folder: Path
    committed: Path
    frontier: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Path:
        """A new folder for one part."""
        path = self.folder / name
        path.mkdir()
        return path


class Checkpoints:
    """The checkpoints of one run folder: one each `every` steps (0: none), of which the `keep` newest stay.

    `notes` gives what the session wants to find again.
    """

    def __init__(
        self, run_folder: Path, every: int, keep: int, config: Mapping[str, Any], notes: Callable[[], dict[str, Any]]
    ) -> None:
        self._folder = run_folder / FOLDER
        self._every = every
        self._keep = keep
        self._config = config
        self._notes = notes

    @property
    def are_on(self) -> bool:
        """Whether checkpoints are written."""
        return self._every > 0

    @asynccontextmanager
    async def draft(self, policy_version: int) -> AsyncIterator[CheckpointDraft | None]:
        """A draft if one is due at `policy_version`, committed where the block ends well; else None.

        Raises `CheckpointError` when it cannot be written; older checkpoints are then still there.
        """
        if not self._every or policy_version % self._every:
            yield None
            return
        folder = self._folder / f"step-{policy_version:06d}"
        try:
            async with committed_in_thread(folder) as temporary:
                draft = CheckpointDraft(temporary, folder)
                yield draft
                self._write_index(draft, policy_version)
        except OSError as error:
            if isinstance(error, OpdError):
                raise
            raise CheckpointError(
                f"{folder} cannot be written ({error.strerror}): make room, or set checkpoint.every=0"
            ) from error
        for old in _folders(self._folder)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _write_index(self, draft: CheckpointDraft, policy_version: int) -> None:
        index = {
            "format": FORMAT,
            "policy_version": policy_version,
            "frontier": draft.frontier,
            "notes": self._notes(),
            "config": self._config,
        }
        (draft.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; raises `CheckpointError` when it is damaged."""
        return latest_checkpoint(self._folder.parent)


def latest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder; None if it has none. Raises `CheckpointError` when it is damaged."""
    folders = _folders(run_folder / FOLDER)
    return read_checkpoint(folders[-1]) if folders else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Raises `CheckpointError` when it is missing, damaged or of another format."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {index['format']} and {FORMAT} is expected: go on with the version that wrote it"
            )
        return Checkpoint(folder, index["policy_version"], index["frontier"], index["notes"], index["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder} is no checkpoint, or a damaged one ({error!r}): remove it to go on from an older one"
        ) from error


def _folders(parent: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first."""
    found = [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
