"""A store's image on disk: a folder that appears whole or not at all.

It holds ``index.json`` and one Arrow IPC stream a payload, its bytes as they were. The index carries a checksum of
itself and of every payload. Nothing in it is unpickled. Threads wait for the disk: the store goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from opd_ray.errors import SnapshotError
from opd_ray.replay.snapshot import FORMAT, StoreImage
from opd_ray.replay.spill import Spilled, settled
from opd_ray.storage.committed_folder import committed_in_thread, ended_in_thread

INDEX = "index.json"


async def write_image(image: StoreImage, folder: Path, fetch: Callable[[Any], Any]) -> None:
    """Commit `image` as `folder`; `fetch` makes a payload's bytes, or an awaitable of them, of its reference."""
    try:
        async with committed_in_thread(folder) as temporary:
            checksums = []
            for number, ref in enumerate(image.refs):
                data = memoryview(ref.data if isinstance(ref, Spilled) else await settled(fetch(ref)))
                checksums.append(await ended_in_thread(_write_payload, temporary / _name(number), data))
            await ended_in_thread(_write_index, temporary / INDEX, {**image.index, "sha256": checksums})
    except OSError as error:
        raise SnapshotError(
            f"the snapshot {folder} cannot be written ({error}): make room, or choose another"
        ) from error


async def read_index(folder: Path) -> dict[str, Any]:
    """The index in `folder`; raises `SnapshotError` when it is missing, damaged or of another format."""
    return await asyncio.to_thread(_read_index, folder)


async def read_payloads(
    folder: Path, index: dict[str, Any], put: Callable[[pa.Buffer], Any], needed: Container[int]
) -> StoreImage:
    """The image of `index`, with the `needed` payloads (the others: None); `put` makes a reference of their bytes.

    Raises `SnapshotError` when a payload is missing or damaged.
    """
    refs = []
    for number, checksum in enumerate(index["sha256"]):
        if number in needed:
            refs.append(put(await asyncio.to_thread(_read_payload, folder / _name(number), checksum)))
        else:
            refs.append(None)
    return StoreImage(index, tuple(refs))


def _write_index(path: Path, index: dict[str, Any]) -> None:
    text = json.dumps({"checksum": _checksum(index), "index": index}, default=asdict)
    path.write_text(text, encoding="utf-8")


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        whole = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index, checksum = whole["index"], whole["checksum"]
    except OSError as error:
        raise SnapshotError(f"{folder} holds no snapshot of a replay store ({error}): name its folder") from error
    except (ValueError, TypeError, LookupError) as error:
        raise SnapshotError(f"{folder / INDEX} is damaged ({error!r}): use an older snapshot") from error
    if checksum != _checksum(index):
        raise SnapshotError(f"{folder / INDEX} is damaged (wrong checksum): use an older snapshot")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise SnapshotError(f"{folder} has another format than {FORMAT}: go on with the version that wrote it")
    return index


def _read_payload(path: Path, checksum: str) -> pa.Buffer:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read ({error}): use an older snapshot") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise SnapshotError(f"{path} is damaged ({len(data)} bytes, wrong checksum): use an older snapshot")
    return pa.py_buffer(data)


def _write_payload(path: Path, data: memoryview) -> str:
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _checksum(index: Any) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True, default=asdict).encode()).hexdigest()


def _name(number: int) -> str:
    return f"payload-{number:06d}.arrows"
