"""The learner group as the controller sees it: what it publishes outlives it, and the death of a rank is named."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectLostError

from opd_ray.cluster.placement import Placement
from opd_ray.config.choices import PlacementStrategy
from opd_ray.errors import ActorDiedError, ResourceError
from opd_ray.learner.group import LearnerGroup
from opd_ray.learner.spec import LostTrajectories
from opd_ray.models.weights import combined_checksum
from opd_ray.planning.placement import Share
from opd_ray.replay.batch import SampledBatch
from tests.integration.batches import scored_payload, stale_infos
from tests.integration.learners import Learners
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


class Owner:
    """What it puts into the object store belongs to it, and is gone with it."""

    def put(self, payload: Any) -> list[Any]:
        return [ray.put(payload)]


def lost_payload() -> Any:
    """A reference to what is gone, as with the node that held it."""
    owner_class: Any = ray.remote(Owner)
    owner = owner_class.options(num_cpus=0).remote()
    (ref,) = ray.get(owner.put.remote(scored_payload(LENGTHS, seed=3)))
    ray.kill(owner)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            # Not kept: what is in use here stays here.
            ray.get(ref)
        except ObjectLostError:
            return ref
        time.sleep(0.2)
    raise AssertionError("the payload is not lost yet")


async def lose_a_payload(group: LearnerGroup) -> None:
    """Neither rank is left waiting for the other, nothing has changed, and the step continues with the rest."""
    before, _ = await group.export(0)
    kept, lost = some_batch(), lost_payload()
    infos = tuple(
        replace(info, trajectory_id=info.trajectory_id + 100 * number) for number in (0, 1) for info in kept.infos
    )
    rows = tuple((number, row) for number in (0, 1) for _, row in kept.rows)
    batch = SampledBatch((*kept.refs, lost), rows, infos)
    async with asyncio.timeout(30):
        answer = await group.train_step(batch, 0)
    assert isinstance(answer, LostTrajectories)
    assert answer.trajectory_ids == tuple(info.trajectory_id + 100 for info in kept.infos)
    assert (await group.export(0))[0] == before
    reports = await group.train_step(batch.without(answer.trajectory_ids), 0)
    assert isinstance(reports, list)
    assert sum(report.num_tokens for report in reports) == sum(LENGTHS)


async def lose_and_restart(group: LearnerGroup, folder: Path) -> None:
    await group.ready()
    await lose_a_payload(group)
    meta, buckets = await group.export(1)
    await group.save_checkpoint(folder)
    with pytest.raises(ActorDiedError, match="actor learner-1 died") as caught:
        await killed_in_a_step(group, 1)
    os.kill(process_of(group.workers[0]), signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        await group.result(group.workers[0].ping.remote(), 0)
    found = ray.get(buckets)
    assert combined_checksum(found) == meta.checksum
    assert sum(bucket.data.nbytes for bucket in found) == meta.num_bytes > 100_000
    await group.restart(caught.value)
    await group.ready()
    await group.load_checkpoint(folder)
    again, _ = await group.export(1)
    assert again == meta
    await group.train_step(some_batch(), 1)


@pytest.mark.slow
def test_a_lost_payload_costs_its_rows_and_a_lost_rank_is_named_its_weights_stay_and_the_group_goes_on_from_its_state(
    learners: Learners, student_folder: Path, tmp_path: Path
) -> None:
    cfg = small_config("lsm_block64", "learner.num_ranks=2", "learner.zero_stage=2")
    asyncio.run(lose_and_restart(learners.create(cfg, str(student_folder)), tmp_path))


def test_room_that_does_not_come_is_refused_with_the_numbers() -> None:
    placement = Placement("learner", Share(1.0, 0.0, 1), 3, PlacementStrategy.spread)
    try:
        with pytest.raises(
            ResourceError,
            match=r"^learner: 3 x \(1 CPU, 0 GPUs\) \(spread\) found no room in 1\S* s; there are nodes with "
            r"1 x \(2 CPUs, 0 GPUs\), free of all are \S+ CPUs and 0 GPUs: add a node",
        ):
            asyncio.run(placement.wait(1.0))
    finally:
        placement.remove()
