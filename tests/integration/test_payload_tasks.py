"""Payloads written and read by real Ray tasks: checkpoints, spilling, and what cannot be read back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from opd_ray.cluster.payload_tasks import RayPayloads
from opd_ray.errors import CheckpointError, PayloadLostError
from opd_ray.learner.group import _fetched
from opd_ray.replay.payload_io import PayloadFile, checksum_of
from opd_ray.trajectory import codec
from tests.integration.runs import Engines, small_config, train
from tests.integration.test_learner_group import lost_payload

pytestmark = pytest.mark.integration


def made(number: int) -> bytes:
    return b"payload %d " % number * 1000


def test_payloads_go_to_files_and_come_back(ray_cluster: None, tmp_path: Path) -> None:
    refs: list[Any] = [ray.put(pa.py_buffer(made(number))) for number in range(70)]
    paths = [tmp_path / f"{number}.arrows" for number in range(70)]

    async def scenario() -> list[Any]:
        io = RayPayloads(60)
        checksums = await io.write(refs, paths)
        assert [path.read_bytes() for path in paths] == [made(number) for number in range(70)]
        assert checksums == [checksum_of(made(number)) for number in range(70)]
        files = [PayloadFile(path, checksum or "") for path, checksum in zip(paths, checksums, strict=True)]
        return [*await io.read(files), *io.read_later(files[:2])]

    found = asyncio.run(scenario())
    assert [ray.get(ref).to_pybytes() for ref in found] == [made(number) for number in [*range(70), 0, 1]]
    # On a node, as what a teacher makes: Ray sends nothing of it to the driver.
    assert all(ray.experimental.get_object_locations(found)[ref]["node_ids"] for ref in found)


def test_a_lost_payload_is_told_from_the_others(ray_cluster: None, tmp_path: Path) -> None:
    refs = [ray.put(pa.py_buffer(made(0))), lost_payload(), ray.put(pa.py_buffer(made(2)))]
    paths = [tmp_path / f"{number}.arrows" for number in range(3)]
    checksums = asyncio.run(RayPayloads(60).write(refs, paths))
    assert checksums == [checksum_of(made(0)), None, checksum_of(made(2))]


def test_what_cannot_be_written_or_read_ends_in_one_line(ray_cluster: None, tmp_path: Path) -> None:
    io = RayPayloads(60)
    ref = ray.put(pa.py_buffer(made(0)))
    with pytest.raises(CheckpointError, match="cannot be written .*make room"):
        asyncio.run(io.write([ref], [tmp_path / "missing" / "0.arrows"]))
    (checksum,) = asyncio.run(io.write([ref], [tmp_path / "0.arrows"]))
    file = PayloadFile(tmp_path / "0.arrows", checksum or "")
    file.path.write_bytes(made(1))
    with pytest.raises(CheckpointError, match="is damaged"):
        asyncio.run(io.read([file]))
    (later,) = io.read_later([file])
    with pytest.raises(PayloadLostError, match="is damaged"):
        ray.get(later)
    assert _fetched([ref, later])[1] == {1}, "a rank takes it for lost"


def test_a_run_that_spills_everything_trains_the_same(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither run decodes or encodes a payload in the driver."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a payload was decoded in the driver")

    monkeypatch.setattr(codec, "_read", refuse)
    wide = ["num_steps=4", "replay.reuse=1", "replay.max_staleness=3", "checkpoint.every=2"]
    spilled = train(small_config("lsm_block64", *wide, "replay.spill_bytes=1"), engines, folder=tmp_path / "a")
    assert spilled.of("step") == [1, 2, 3, 4]
    memory, stored = spilled.of("replay/memory_bytes"), spilled.of("replay/payload_bytes")
    assert any(some < all_of_it for some, all_of_it in zip(memory, stored, strict=True)), "nothing was spilled"
    assert spilled.ledger["evicted"] == 0
    assert [*(tmp_path / "a" / "spill").iterdir()] == []
    in_lock_step = ["num_steps=2", "replay.reuse=2"]
    plain = train(small_config("lsm_block64", *in_lock_step), engines)
    again = train(small_config("lsm_block64", *in_lock_step, "replay.spill_bytes=1"), engines, folder=tmp_path / "b")
    assert again.of("learner/loss/mean") == plain.of("learner/loss/mean")
