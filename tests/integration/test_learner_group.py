"""The learner group as the controller sees it: what it publishes outlives it, and the death of a rank is named."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from opd_ray.actors.learner.group import LearnerGroup
from opd_ray.actors.weights import combined_checksum
from opd_ray.errors import ActorDiedError
from opd_ray.placement import Share
from opd_ray.replay.cohort import SampledBatch
from tests.integration.batches import scored_payload, stale_infos
from tests.integration.runs import small_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

LENGTHS = [40, 9, 33, 64]


def some_batch() -> SampledBatch:
    payload = scored_payload(LENGTHS, seed=3)
    rows = tuple((0, row) for row in range(len(LENGTHS)))
    return SampledBatch((ray.put(payload),), rows, stale_infos(payload))


def process_of(worker: Any) -> int:
    pid: int = ray.get(worker.__ray_call__.remote(lambda _: os.getpid()))
    return pid


async def killed_in_a_step(group: LearnerGroup, rank: int) -> None:
    """End a rank's process while the others wait for it in the step's first collective call."""
    pid = process_of(group.workers[rank])
    os.kill(pid, signal.SIGSTOP)
    step = asyncio.create_task(group.train_step(some_batch(), 1))
    await asyncio.sleep(2)
    assert not step.done()
    os.kill(pid, signal.SIGKILL)
    await step


async def lose_and_restart(group: LearnerGroup, folder: Path) -> None:
    await group.ready()
    await group.train_step(some_batch(), 0)
    receipt, buckets = await group.export(1)
    await group.save_state(folder)
    with pytest.raises(ActorDiedError, match="actor learner-1 died") as caught:
        await killed_in_a_step(group, 1)
    os.kill(process_of(group.workers[0]), signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        await group.result(group.workers[0].ping.remote(), 0)
    found = ray.get(buckets)
    assert combined_checksum(found) == receipt.checksum
    assert sum(bucket.data.nbytes for bucket in found) == receipt.num_bytes > 100_000
    await group.restart(caught.value)
    await group.ready()
    await group.load_state(folder)
    again, _ = await group.export(1)
    assert again == receipt
    await group.train_step(some_batch(), 1)


def test_a_lost_rank_is_named_its_weights_stay_and_the_group_goes_on_from_its_state(
    student_folder: Path, tmp_path: Path
) -> None:
    cfg = small_config("lsm_block64", "learner.num_ranks=2", "learner.zero_stage=2", "deadline_s=60")
    group = LearnerGroup.create(cfg, Share(0.0, 0.0, 1), str(student_folder))
    try:
        asyncio.run(lose_and_restart(group, tmp_path))
    finally:
        group.shutdown()
