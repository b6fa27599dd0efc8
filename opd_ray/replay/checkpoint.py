"""The store in a checkpoint: frozen at one instant, written to a folder, and rebuilt from it.

A step that was sampled and not released is lost with the learner, so its uses are taken back: a batch without any
release returns to the ready trajectories (and, with ``order=fifo``, is formed again), one with some continues with the
uses that are left. No planned first use moves by that, so the bound of `staleness` holds across a restart: what follows
such a batch in the queue had ``next_version - version`` uses before it, and has them again.

The folder holds ``index.json``, with a checksum of itself and of every payload, and one Arrow IPC stream per payload.
Nothing in it is unpickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_ray.errors import CheckpointError, StoreError
from opd_ray.replay.admission import Schedule
from opd_ray.replay.batch import StoredTrajectory
from opd_ray.replay.ledger import Ledger
from opd_ray.replay.lengths import LengthReport
from opd_ray.replay.payload_io import PayloadFile, PayloadIO, SpillFile
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.state import StoreState
from opd_ray.storage.committed_folder import ended_in_thread
from opd_ray.types import TrajectoryMeta

FORMAT = 2
INDEX = "index.json"
PAYLOAD_LOST = "payload_lost"


@dataclass(frozen=True, slots=True)
class StoreImage:
    """A store frozen at one instant.

    `index` is JSON-able apart from its records; `refs` and `files` pin the payloads by number: each is in memory, in a
    spill file, or both.
    """

    index: dict[str, Any]
    refs: dict[int, Any]
    files: dict[int, SpillFile]


def freeze(state: StoreState, config: StoreConfig, now_s: float) -> StoreImage:
    """Return the image of a store; raises `StoreError` when batches were released in another order than sampled."""
    in_training = state.in_training.members.values()
    ready = [*state.queue.ready.values(), *(member for member in in_training if not member.num_releases)]
    current = [member for member in in_training if member.num_releases]
    releases = {member.num_releases for member in current}
    if len(releases) > 1 or len(current) > config.trajectories_per_step:
        raise StoreError("a checkpoint was asked for between releases out of order: release as sampled, whole batches")
    payloads = {member.payload_id: state.payloads[member.payload_id] for member in (*ready, *current)}

    def rows(members: Sequence[StoredTrajectory]) -> list[dict[str, Any]]:
        return [
            {"metadata": member.meta, "payload": member.payload_id, "age_s": now_s - member.appended_s}
            for member in members
        ]

    # Written later, while training continues: nothing in here may change with the store.
    index: dict[str, Any] = {
        "format": FORMAT,
        "trajectories_per_step": config.trajectories_per_step,
        "reuse": config.reuse,
        "version": state.schedule.version,
        "num_releases": max(releases, default=0),
        "num_given": state.queue.num_given,
        "in_flight": [[trajectory_id, prompt_id] for trajectory_id, prompt_id in state.queue.in_flight.items()],
        "ready": rows(ready),
        "current": rows(current),
        "payloads": [[payload_id, payload.num_bytes] for payload_id, payload in sorted(payloads.items())],
        "ledger": state.ledger.as_dict(),
        "lengths": state.lengths.as_dict(),
        "payload_size": [state.payload_size.mean_bytes, state.payload_size.num_seen],
        "data_ended": state.data_ended,
    }
    refs = {number: payload.ref for number, payload in payloads.items() if payload.ref is not None}
    files = {number: payload.file for number, payload in payloads.items() if payload.file is not None}
    return StoreImage(index, refs, files)


def rebuild(image: StoreImage, config: StoreConfig, now_s: float) -> StoreState:
    """Return the state of an image; raises `CheckpointError` where it does not fit `config`."""
    index = image.index
    for name in ("trajectories_per_step", "reuse"):
        if index[name] != getattr(config, name):
            raise CheckpointError(
                f"the checkpoint has {name} = {index[name]} and the run {getattr(config, name)}: resume with the same"
            )
    num_rows = dict.fromkeys((payload_id for payload_id, _ in index["payloads"]), 0)
    for row in (*index["ready"], *index["current"]):
        num_rows[row["payload"]] += 1
    state = StoreState.fresh(config, index["version"])
    ids = {}
    for number, num_bytes in index["payloads"]:
        ids[number] = state.payloads.put(image.refs.get(number), num_bytes, num_rows[number])
        if number in image.files:
            state.payloads.spill(ids[number], image.files[number])

    def members(rows: Sequence[Mapping[str, Any]], num_uses: int) -> list[StoredTrajectory]:
        return [
            StoredTrajectory(_metadata(row["metadata"]), ids[row["payload"]], now_s - row["age_s"], num_uses, num_uses)
            for row in rows
        ]

    current = members(index["current"], index["num_releases"])
    state.in_training.begin(current)
    state.schedule = Schedule.at(index["version"], config.reuse - index["num_releases"] if current else 0)
    state.queue.num_given = index["num_given"]
    state.queue.in_flight = {trajectory_id: prompt_id for trajectory_id, prompt_id in index["in_flight"]}
    for member in members(index["ready"], 0):
        state.queue.put(member)
    state.ledger = Ledger.of(index["ledger"])
    state.lengths = LengthReport.of(index["lengths"])
    state.payload_size.mean_bytes, state.payload_size.num_seen = index["payload_size"]
    state.data_ended = index["data_ended"]
    state.check()
    return state


def _metadata(record: TrajectoryMeta | Mapping[str, Any]) -> TrajectoryMeta:
    return record if isinstance(record, TrajectoryMeta) else TrajectoryMeta(**record)


def without_payloads(image: StoreImage, lost: Sequence[int], config: StoreConfig) -> StoreImage:
    """Return the image of the store in which the trajectories of some payloads had been evicted as lost."""
    kept = StoreImage(image.index, dict(image.refs), dict(image.files))
    state = rebuild(kept, config, now_s=0.0)
    number = {payload_id: place for place, (payload_id, _) in enumerate(image.index["payloads"])}
    state.evict(state.in_payloads({number[payload_id] for payload_id in lost}), PAYLOAD_LOST)
    return freeze(state, config, now_s=0.0)


async def write_image(image: StoreImage, folder: Path, io: PayloadIO, config: StoreConfig) -> list[int]:
    """Write an image into `folder`, which exists; returns the ids of trajectories that were lost with their payloads.

    The folder then holds the store without these. Raises `CheckpointError` if it cannot be written.
    """
    lost_ids: list[int] = []
    while True:
        numbers = [number for number, _ in image.index["payloads"]]
        paths = {number: folder / _name(number) for number in numbers}
        checksums = await _write_payloads(image, paths, io)
        lost = [number for number in numbers if checksums[number] is None]
        if not lost:
            break
        rows = (*image.index["ready"], *image.index["current"])
        lost_ids += [row["metadata"].trajectory_id for row in rows if row["payload"] in lost]
        image = without_payloads(image, lost, config)
        # The payloads that are left have other numbers now.
        for path in paths.values():
            path.unlink(missing_ok=True)
    try:
        await ended_in_thread(_write_index, folder / INDEX, {**image.index, "checksums": [*checksums.values()]})
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}): make room, or choose another runs_dir") from error
    return lost_ids


async def _write_payloads(image: StoreImage, paths: Mapping[int, Path], io: PayloadIO) -> dict[int, str | None]:
    """Checksums by payload number; None where the payload is lost. A spilled payload is linked, not written again."""
    checksums: dict[int, str | None] = dict.fromkeys(paths)
    for number in image.files.keys() & paths.keys():
        file = image.files[number].file
        try:
            await ended_in_thread(_link, file.path, paths[number])
        except OSError as error:
            raise CheckpointError(f"{paths[number]} cannot be written ({error}): make room in runs_dir") from error
        checksums[number] = file.checksum
    in_memory = [number for number in paths if number not in image.files]
    written = await io.write([image.refs[number] for number in in_memory], [paths[number] for number in in_memory])
    return checksums | dict(zip(in_memory, written, strict=True))


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    os.link(source, target)


async def read_image(folder: Path, io: PayloadIO) -> StoreImage:
    """Return the image in `folder`; raises `CheckpointError` when it is missing, damaged or of another format."""
    index = await asyncio.to_thread(_read_index, folder)
    numbers = [number for number, _ in index["payloads"]]
    files = [
        PayloadFile(folder / _name(number), checksum)
        for number, checksum in zip(numbers, index["checksums"], strict=True)
    ]
    return StoreImage(index, dict(zip(numbers, await io.read(files), strict=True)), {})


def _write_index(path: Path, index: dict[str, Any]) -> None:
    text = _canonical(index)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f'{{"checksum": "{checksum}", "index": {text}}}', encoding="utf-8")


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        whole = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index, checksum = whole["index"], whole["checksum"]
    except OSError as error:
        raise CheckpointError(f"{folder} holds no replay store ({error}): use an older checkpoint") from error
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}): use an older checkpoint") from error
    if checksum != hashlib.sha256(_canonical(index).encode()).hexdigest():
        raise CheckpointError(f"{folder / INDEX} is damaged (wrong checksum): use an older checkpoint")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has another format than {FORMAT}: resume with the version that wrote it")
    return index


def _canonical(index: Any) -> str:
    return json.dumps(index, sort_keys=True, default=asdict)


def _name(number: int) -> str:
    return f"payload-{number:06d}.arrows"
