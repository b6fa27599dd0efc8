"""The store on disk: ready rows, what was in flight, the running cohort and the books, of one instant.

A folder that appears whole or not at all: ``index.json`` and one Arrow IPC stream a payload, its bytes as they were.
The index carries a checksum of itself and of every payload. Nothing in it is unpickled.

Work that the learner had and did not give back is lost with it, so these visits are taken back: a cohort without any
release goes back to the ready (and, with ``order=fifo``, is formed again), one with some goes on with the visits that
are left. No planned first visit moves by that, so the bound of `staleness` holds across a restart: what follows such a
cohort in the queue had ``next_version - version`` visits before it, and has them again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from opd_ray.checkpoint import committed_folder
from opd_ray.errors import SnapshotError, StoreError
from opd_ray.replay.cohort import StoredTrajectory
from opd_ray.replay.ledger import Ledger
from opd_ray.replay.lengths import LengthReport
from opd_ray.replay.parts import StoreParts
from opd_ray.replay.schedule import Schedule
from opd_ray.replay.spill import Spilled, settled
from opd_ray.replay.staleness import StoreConfig
from opd_ray.types import TrajectoryReceipt

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True, slots=True)
class StoreImage:
    """A store at one instant: JSON-able `index`, and the references of the payloads that it numbers."""

    index: dict[str, Any]
    refs: tuple[Any, ...]


def capture(parts: StoreParts, config: StoreConfig, now_s: float) -> StoreImage:
    """The image of a store; raises `StoreError` when batches were released in another order than sampled."""
    drafted = parts.drafted.members.values()
    ready = [*parts.queue.ready.values(), *(member for member in drafted if not member.num_releases)]
    cohort = [member for member in drafted if member.num_releases]
    releases = {member.num_releases for member in cohort}
    if len(releases) > 1 or len(cohort) > config.trajectories_per_step:
        raise StoreError("a snapshot was asked for between releases out of order: release as sampled, whole batches")
    payload_ids = sorted({member.payload_id for member in (*ready, *cohort)})
    numbers = {payload_id: number for number, payload_id in enumerate(payload_ids)}

    def rows(members: Sequence[StoredTrajectory]) -> list[dict[str, Any]]:
        return [
            {
                "receipt": asdict(member.receipt),
                "payload": numbers[member.payload_id],
                "age_s": now_s - member.appended_s,
            }
            for member in members
        ]

    index = {
        "format": FORMAT,
        "trajectories_per_step": config.trajectories_per_step,
        "reuse": config.reuse,
        "version": parts.schedule.version,
        "num_releases": max(releases, default=0),
        "num_given": parts.queue.num_given,
        "in_flight": [[slot, prompt_id] for slot, prompt_id in parts.queue.in_flight.items()],
        "ready": rows(ready),
        "cohort": rows(cohort),
        "payload_bytes": [parts.shelf.size(payload_id) for payload_id in payload_ids],
        "ledger": parts.ledger.as_dict(),
        "lengths": parts.lengths.as_dict(),
        "payload_size": [parts.payload_size.mean_bytes, parts.payload_size.num_seen],
        "data_ended": parts.data_ended,
    }
    # Written later, while the store goes on: nothing here may change with it.
    frozen: dict[str, Any] = json.loads(json.dumps(index))
    return StoreImage(frozen, tuple(parts.shelf.ref(payload_id) for payload_id in payload_ids))


def rebuild(image: StoreImage, config: StoreConfig, now_s: float) -> StoreParts:
    """The store of an image, with `refs` as its payloads; raises `SnapshotError` where the two do not fit."""
    index = image.index
    for name in ("trajectories_per_step", "reuse"):
        if index[name] != getattr(config, name):
            raise SnapshotError(
                f"the snapshot has {name} = {index[name]} and the run {getattr(config, name)}: go on with the same"
            )
    num_rows = [0] * len(image.refs)
    for row in (*index["ready"], *index["cohort"]):
        num_rows[row["payload"]] += 1
    parts = StoreParts.fresh(config, index["version"])
    sizes = index["payload_bytes"]
    ids = [parts.shelf.put(*payload) for payload in zip(image.refs, sizes, num_rows, strict=True)]

    def members(rows: Sequence[Mapping[str, Any]], num_visits: int) -> list[StoredTrajectory]:
        return [
            StoredTrajectory(
                TrajectoryReceipt(**row["receipt"]), ids[row["payload"]], now_s - row["age_s"], num_visits, num_visits
            )
            for row in rows
        ]

    cohort = members(index["cohort"], index["num_releases"])
    parts.drafted.begin(cohort)
    parts.schedule = Schedule.at(index["version"], config.reuse - index["num_releases"] if cohort else 0)
    parts.queue.num_given = index["num_given"]
    parts.queue.in_flight = {slot: prompt_id for slot, prompt_id in index["in_flight"]}
    parts.queue.ready = {member.receipt.slot: member for member in members(index["ready"], 0)}
    parts.ledger = Ledger.of(index["ledger"])
    parts.lengths = LengthReport.of(index["lengths"])
    parts.payload_size.mean_bytes, parts.payload_size.num_seen = index["payload_size"]
    parts.data_ended = index["data_ended"]
    parts.ledger.check(len(parts.queue.in_flight), len(parts.queue.ready) + len(parts.drafted))
    return parts


async def write_image(image: StoreImage, folder: Path, fetch: Callable[[Any], Any]) -> None:
    """Commit `image` as `folder`; `fetch` makes a payload's bytes, or an awaitable of them, of its reference."""
    try:
        with committed_folder(folder) as temporary:
            checksums = []
            for number, ref in enumerate(image.refs):
                data = memoryview(ref.data if isinstance(ref, Spilled) else await settled(fetch(ref)))
                checksums.append(await asyncio.to_thread(_write_payload, temporary / _name(number), data))
            body = {**image.index, "sha256": checksums}
            text = json.dumps({"checksum": _checksum(body), "index": body})
            (temporary / INDEX).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SnapshotError(
            f"the snapshot {folder} cannot be written ({error}): make room, or choose another"
        ) from error


async def read_image(folder: Path, put: Callable[[pa.Buffer], Any]) -> StoreImage:
    """The image in `folder`; `put` makes a payload's reference of its bytes.

    Raises `SnapshotError` when it is missing, damaged or of another format.
    """
    index = _read_index(folder)
    refs = []
    for number, checksum in enumerate(index.pop("sha256")):
        data = await asyncio.to_thread(_read_payload, folder / _name(number), checksum)
        refs.append(put(data))
    return StoreImage(index, tuple(refs))


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
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _name(number: int) -> str:
    return f"payload-{number:06d}.arrows"
