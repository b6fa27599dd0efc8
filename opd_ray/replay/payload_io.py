"""Payloads in files: the bytes as they are, written and read where the payload is, with a checksum.

The store never looks inside a payload. What must write or read one goes through a `PayloadIO`; `cluster.payload_tasks`
has the one that runs as Ray tasks on the nodes that hold the payloads.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import xxhash

from opd_ray.errors import CheckpointError, PayloadLostError


@dataclass(frozen=True, slots=True)
class PayloadFile:
    """A payload's bytes, an Arrow IPC stream, in a file; `checksum` is their xxh3-128 in hex."""

    path: Path
    checksum: str


class SpillFile:
    """A `PayloadFile` that exists as long as this object is referenced."""

    def __init__(self, file: PayloadFile) -> None:
        self.file = file
        weakref.finalize(self, _unlink, str(file.path))


class PayloadIO(Protocol):
    """Writes and reads payloads without bringing them into the calling process; paths are on shared storage."""

    async def write(self, refs: Sequence[Any], paths: Sequence[Path]) -> list[str | None]:
        """Write each payload as a file that is on the disk before this returns; returns the files' checksums.

        None stands for a payload that was lost with its node. Raises `CheckpointError` where a file cannot be written.
        """
        ...

    async def read(self, files: Sequence[PayloadFile]) -> list[Any]:
        """Return payload references whose bytes were read and checked.

        Raises `CheckpointError` where a file is missing or damaged.
        """
        ...

    def read_later(self, files: Sequence[PayloadFile]) -> list[Any]:
        """Return payload references at once; fetching one raises `PayloadLostError` where its file is unusable."""
        ...


def write_payload(data: Any, path: Path) -> str:
    """Write the bytes of `data` (any buffer) as file `path`, through to the disk; returns their checksum."""
    view = memoryview(data)
    try:
        with path.open("wb") as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}): make room, or choose another runs_dir, which all nodes must share"
        ) from error
    return checksum_of(view)


def read_payload(file: PayloadFile) -> pa.Buffer:
    """Return the checked bytes of a payload file; raises `PayloadLostError` when it is missing or damaged."""
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise PayloadLostError(f"{file.path} cannot be read ({error}): use an older checkpoint") from error
    if checksum_of(data) != file.checksum:
        raise PayloadLostError(f"{file.path} is damaged ({len(data)} bytes, wrong checksum): use an older checkpoint")
    return pa.py_buffer(data)


def checksum_of(data: Any) -> str:
    """xxh3-128 of a buffer, in hex."""
    return xxhash.xxh3_128(data).hexdigest()


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)
