"""Spilling: payloads that memory has no room for wait in files until they are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opd_ray.errors import CheckpointError, StoreError
from opd_ray.replay.payload_io import PayloadFile, PayloadIO, SpillFile
from opd_ray.replay.state import StoreState


@dataclass(slots=True)
class SpillSpace:
    """Moves payloads to files in `folder` while those in memory have more than `max_memory_bytes`.

    A file exists as long as its payload is needed; files of a killed process stay until `folder` is emptied.
    """

    max_memory_bytes: int
    folder: Path
    is_busy: bool = False
    _num_files: int = 0

    def is_needed(self, state: StoreState) -> bool:
        """Whether payloads have more memory than they may, and some of them can be moved."""
        return bool(self._choose(state))

    async def relieve(self, state: StoreState, io: PayloadIO) -> list[int]:
        """Spill what was stored last, and is not in training, until the rest fits; one call at a time.

        Returns the numbers of payloads that turned out to be lost; then others may be left to spill. Raises
        `StoreError` when the files cannot be written.
        """
        self.is_busy = True
        try:
            while chosen := self._choose(state):
                written = await self._write(state, io, chosen)
                for payload_id, file in written.items():
                    # It may have been sampled or dropped meanwhile.
                    if payload_id in state.payloads and not state.in_training.has_payload(payload_id):
                        state.payloads.spill(payload_id, file)
                if len(written) < len(chosen):
                    return [payload_id for payload_id in chosen if payload_id not in written]
            return []
        finally:
            self.is_busy = False

    def recall(self, state: StoreState, io: PayloadIO) -> None:
        """Bring the current batch's payloads back into memory."""
        members = state.in_training.current_batch()
        spilled = {
            payload_id: payload.file.file
            for payload_id in sorted({member.payload_id for member in members})
            if (payload := state.payloads[payload_id]).ref is None and payload.file is not None
        }
        for payload_id, ref in zip(spilled, io.read_later([*spilled.values()]), strict=True):
            state.payloads.load(payload_id, ref)

    def _choose(self, state: StoreState) -> list[int]:
        """Payloads that are enough, or as many as can be moved."""
        chosen: list[int] = []
        excess = state.payloads.memory_bytes - self.max_memory_bytes
        for payload_id in state.payloads.newest_in_memory():
            if excess <= 0:
                break
            if not state.in_training.has_payload(payload_id):
                chosen.append(payload_id)
                excess -= state.payloads[payload_id].num_bytes
        return chosen

    async def _write(self, state: StoreState, io: PayloadIO, chosen: list[int]) -> dict[int, SpillFile]:
        payloads = {payload_id: state.payloads[payload_id] for payload_id in chosen}
        written = {payload_id: payload.file for payload_id, payload in payloads.items() if payload.file is not None}
        new = {payload_id: payload for payload_id, payload in payloads.items() if payload.file is None}
        paths = [self._new_path() for _ in new]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checksums = await io.write([payload.ref for payload in new.values()], paths)
        except (CheckpointError, OSError) as error:
            raise StoreError(
                f"payloads cannot be spilled ({error}): make room in runs_dir, or set replay.max_bytes"
            ) from error
        for payload_id, path, checksum in zip(new, paths, checksums, strict=True):
            if checksum is not None:
                written[payload_id] = SpillFile(PayloadFile(path, checksum))
        return written

    def _new_path(self) -> Path:
        self._num_files += 1
        return self.folder / f"payload-{self._num_files:08d}.arrows"
