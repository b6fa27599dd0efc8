"""The folder of one run: made once at the start, written atomically, and named by `runs/latest` at its end.

::

    runs/lsm_block64-tiny-s0-20260131-120000/
        .lock           locked by the process that runs it
        status.json     {"status": "running", "finished", "interrupted" or "failed", "error": null or a line}
        summary.json    of a run that came to its end
    runs/latest         relative link to the run folder that finished last
"""

from __future__ import annotations

import contextlib
import fcntl
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
CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
STATUS_FILE = "status.json"
SUMMARY_FILE = "summary.json"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class RunFolder:
    """The folder of one run; `create` makes it, `reopen` continues with it, `path` is where it lies (absolute)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    @classmethod
    def create(cls, runs_dir: str | Path, name: str) -> RunFolder:
        """Make ``<runs_dir>/<name>-<YYYYmmdd-HHMMSS>`` with the status "running".

        `name` is experiment, scale and seed; what does not belong in a file name becomes ``_``. A second run
        in the same second gets ``-2`` appended, and so on.

        Raises:
            RunFolderError: the folder cannot be made or written; whatever was made of it is removed again.
        """
        parent = Path(runs_dir).expanduser().absolute()
        stem = f"{_stem(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        made: list[Path] = []
        try:
            _make_parents(parent, made)
            path = _make_unique(parent, stem)
            made.append(path)
            folder = cls(path)
            folder._lock()
            folder.mark("running")
        except OSError as error:
            for path in reversed(made):
                with contextlib.suppress(OSError):
                    (path / LOCK_FILE).unlink(missing_ok=True)
                    path.rmdir()
            raise RunFolderError(
                f"runs_dir={str(runs_dir)!r}: cannot make a run folder in {parent}: {_reason(error)}; "
                "choose another place with runs_dir=FOLDER"
            ) from None
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Go on with the folder of a run that was cut off; its status is "running" again.

        Raises:
            RunFolderError: another process runs it, or it cannot be written.
        """
        folder = cls(path.absolute())
        try:
            folder._lock()
        except BlockingIOError:
            raise RunFolderError(f"{path} is run by another process: wait for its end, or set resume=never") from None
        except OSError as error:
            raise RunFolderError(f"cannot write {path}: {_reason(error)}; set resume=never") from None
        folder.mark("running")
        return folder

    def _lock(self) -> None:
        fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        self._lock_fd = fd

    def close(self) -> None:
        """Let others continue with the folder; closing twice does no harm."""
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            os.close(fd)

    def is_in_use(self) -> bool:
        """Whether a process runs it now."""
        try:
            self._lock()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        self.close()
        return False

    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        try:
            status = json.loads((self.path / STATUS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(status, dict) and status.get("status") == "finished"

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


def run_folders(runs_dir: str | Path, name: str) -> list[Path]:
    """Folders that `RunFolder.create` made for `name`, the newest first."""
    pattern = re.compile(rf"{re.escape(_stem(name))}-(\d{{8}}-\d{{6}})(?:-(\d+))?")
    found = []
    for path in Path(runs_dir).expanduser().absolute().glob(f"{_stem(name)}-*"):
        if (match := pattern.fullmatch(path.name)) and path.is_dir():
            found.append((match[1], int(match[2] or 1), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)


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
