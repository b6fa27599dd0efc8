"""A file of JSON objects, one per line, that is only appended to, or cut back to an earlier end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_ray.errors import RunFolderError

_TAIL_BYTES = 1 << 16


class JsonLines:
    """Appends lines. Each is handed to the system as a whole, so a kill can cut the last one at most.

    Opening an existing file continues after its last whole line. Raises `RunFolderError` when the file cannot be
    opened, written or cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _drop_broken_line(self._fd)
        except OSError as error:
            self.close()
            raise RunFolderError(f"cannot write {path}: {error.strerror}") from error

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._open_fd()).st_size

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line; nothing of it is left where that fails."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        fd = self._open_fd()
        size = self.num_bytes
        try:
            written = 0
            while written < len(line):
                written += os.write(fd, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise RunFolderError(f"cannot write {self.path}: {error.strerror}") from error

    def cut(self, num_bytes: int) -> int:
        """Cut the file back to `num_bytes`, an earlier size of it; returns the number of lines dropped."""
        size = self.num_bytes
        if num_bytes > size:
            raise RunFolderError(
                f"{self.path} has {size} bytes and {num_bytes} are to be kept: it was changed from outside, "
                "start a new run"
            )
        try:
            with self.path.open("rb") as file:
                file.seek(num_bytes)
                num_lines = sum(1 for _ in file)
            os.ftruncate(self._open_fd(), num_bytes)
        except OSError as error:
            raise RunFolderError(f"cannot cut {self.path}: {error.strerror}") from error
        return num_lines

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise RunFolderError(f"cannot write {self.path}: the writer is closed")
        return self._fd


def _drop_broken_line(fd: int) -> None:
    """Cut off what follows the last line end: a line that a killed machine did not finish."""
    size = keep = os.fstat(fd).st_size
    while keep > 0:
        start = max(0, keep - _TAIL_BYTES)
        newline = os.pread(fd, keep - start, start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        keep = start
    if keep != size:
        os.ftruncate(fd, keep)
