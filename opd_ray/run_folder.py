"""The folder of one run: made once at the start, written atomically, and named by `runs/latest` at its end.

::

    runs/lsm_block64-tiny-s0-20260131-120000/
        status.json     {"status": "running", "finished", "interrupted" or "failed", "error": null or a line}
        summary.json    of a run that came to its end
    runs/latest         relative link to the run folder that finished last
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from opd_ray.errors import RunFolderError

Status = Literal["running", "finished", "interrupted", "failed"]
"""What became of a run."""

LATEST = "latest"
STATUS_FILE = "status.json"
SUMMARY_FILE = "summary.json"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class RunFolder:
    """The folder of one run; `create` makes it, `path` is where it lies (absolute)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, runs_dir: str | Path, name: str) -> RunFolder:
        """Make ``<runs_dir>/<name>-<YYYYmmdd-HHMMSS>`` with the status "running".

        `name` is experiment, scale and seed; what does not belong in a file name becomes ``_``. A second run
        in the same second gets ``-2`` appended, and so on.

        Raises:
            RunFolderError: the folder cannot be made or written; whatever was made of it is removed again.
        """
        parent = Path(runs_dir).expanduser().absolute()
        stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        made: list[Path] = []
        try:
            _make_parents(parent, made)
            path = _make_unique(parent, stem)
            made.append(path)
            folder = cls(path)
            folder.mark("running")
        except OSError as error:
            for path in reversed(made):
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise RunFolderError(
                f"runs_dir={str(runs_dir)!r}: cannot make a run folder in {parent}: {_reason(error)}; "
                "choose another place with runs_dir=FOLDER"
            ) from None
        return folder

    def write_text(self, name: str, text: str) -> Path:
        """Write the file `name` (no folders in it) of the run folder, whole or not at all, in UTF-8.

        Raises:
            RunFolderError: it cannot be written; an older file of the name is left as it was.
            ValueError: `name` is not a plain file name.
        """
        if Path(name).name != name:
            raise ValueError(f"a file name without folders is needed, got {name!r}")
        target = self.path / name

        def write_and_replace(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)

        try:
            _by_temporary(self.path, name, write_and_replace)
        except OSError as error:
            raise RunFolderError(f"cannot write {target}: {_reason(error)}") from error
        return target

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file as `write_text` does; NaN and infinities, which JSON lacks, become null."""
        text = json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_text(name, text + "\n")

    def mark(self, status: Status, error: str | None = None) -> None:
        """Write `status.json`: what became of the run so far, and the error's one line."""
        self.write_json(STATUS_FILE, {"status": status, "error": error})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, mark the run finished and point the link ``latest`` beside the folder to it.

        A file system without links costs the link and a warning, not the run.

        Raises:
            RunFolderError: the summary cannot be written.
        """
        self.write_json(SUMMARY_FILE, summary)
        self.mark("finished")
        link = self.path.parent / LATEST

        def link_and_replace(temporary: Path) -> None:
            temporary.symlink_to(self.path.name, target_is_directory=True)
            temporary.replace(link)

        try:
            _by_temporary(link.parent, LATEST, link_and_replace)
        except OSError as error:
            _log.warning("%s does not name this run: %s", link, _reason(error))


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make `folder` and what is missing above it, noting in `made` what was made, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another run was faster
            path.mkdir()
            made.append(path)


def _make_unique(parent: Path, stem: str) -> Path:
    """Make a new folder in `parent`; ``mkdir`` decides who gets a name, so two runs never share one."""
    path, number = parent / stem, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = parent / f"{stem}-{number}"


def _by_temporary(folder: Path, name: str, put_in_place: Callable[[Path], None]) -> None:
    """Hand a fresh hidden path in `folder` to `put_in_place`, and leave nothing there when it fails."""
    temporary = folder / f".{name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        put_in_place(temporary)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _jsonable(value: Any) -> Any:
    """`value` with plain Python numbers, text for paths, and null for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: OSError) -> str:
    """What the operating system said, without the number and the path."""
    return error.strerror or str(error)
