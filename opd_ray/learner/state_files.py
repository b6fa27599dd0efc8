"""A learner's state on disk: ``learner.json``, and two safetensors files per rank. Nothing in it is unpickled.

``optimizer-R.safetensors`` holds the flat partitions of rank R, ``rank-R.safetensors`` what is small and its own.
The index says which elements of which parameter lie where, and has a checksum (xxh3-128) of itself and of every file.
Imports torch: learner workers only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_ray.errors import CheckpointError
from opd_ray.learner.optimizer_shards import Fragment
from opd_ray.storage.committed_folder import sync

FORMAT = 1
INDEX = "learner.json"
_OLDER = "use an older checkpoint"


@dataclass(frozen=True, slots=True)
class StateFile:
    """One tensor file of the state."""

    name: str
    checksum: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RankPart:
    """What the index tells of one rank; `steps` are AdamW's by partition, `behavior` pairs of (trajectory, tokens)."""

    optimizer: StateFile
    own: StateFile
    fragments: tuple[Fragment, ...]
    steps: tuple[float, ...]
    behavior: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StateIndex:
    """``learner.json``: shapes by parameter name, the JSON-able state that all ranks share, and each rank's part."""

    parameters: dict[str, list[int]]
    shared: dict[str, Any]
    ranks: tuple[RankPart, ...]


def file_name(kind: str, rank: int) -> str:
    """Of a rank's tensor file; `kind` is ``optimizer`` or ``rank``."""
    return f"{kind}-{rank:05d}.safetensors"


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> StateFile:
    """Write a tensor file for good; raises `CheckpointError`."""
    path = folder / name
    try:
        save_file(tensors, path)
        sync(path)
        return StateFile(name, _checksum_of(path), path.stat().st_size)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error


def write_index(folder: Path, index: StateIndex) -> None:
    """Write the index for good; raises `CheckpointError`."""
    path = folder / INDEX
    body = {"format": FORMAT, **asdict(index)}
    try:
        path.write_text(json.dumps({"checksum": _checksum_json(body), "index": body}), encoding="utf-8")
        sync(path)
        sync(folder)
    except OSError as error:
        raise _unwritable(path, error) from error


def read_index(folder: Path) -> StateIndex:
    """The index of a state; raises `CheckpointError` when it is missing, damaged or of another format."""
    path = folder / INDEX
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        body, checksum = whole["index"], whole["checksum"]
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds no learner state ({error.strerror}: {INDEX}): name a checkpoint folder"
        ) from error
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): {_OLDER}") from error
    if checksum != _checksum_json(body):
        raise CheckpointError(f"{path} is damaged (wrong checksum): {_OLDER}")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {body.get('format')} and {FORMAT} is expected: continue with the version that wrote it"
        )
    return StateIndex(body["parameters"], body["shared"], tuple(_rank_part(part) for part in body["ranks"]))


def _rank_part(part: dict[str, Any]) -> RankPart:
    return RankPart(
        optimizer=StateFile(**part["optimizer"]),
        own=StateFile(**part["own"]),
        fragments=tuple(Fragment(**fragment) for fragment in part["fragments"]),
        steps=tuple(part["steps"]),
        behavior=tuple((trajectory_id, size) for trajectory_id, size in part["behavior"]),
    )


def check_file(folder: Path, file: StateFile) -> None:
    """Raise `CheckpointError` unless the file is there as it was written."""
    path = folder / file.name
    try:
        num_bytes = path.stat().st_size
        checksum = _checksum_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): {_OLDER}") from error
    if (num_bytes, checksum) != (file.num_bytes, file.checksum):
        raise CheckpointError(
            f"{path} is damaged ({num_bytes} bytes and wrong checksum, {file.num_bytes} bytes were written): {_OLDER}"
        )


def open_tensors(path: Path) -> Any:
    """An open tensor file, read lazily; raises `CheckpointError`."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_OLDER}") from error


def _checksum_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _checksum_json(body: Any) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written ({error}): make room, or choose another run folder")
