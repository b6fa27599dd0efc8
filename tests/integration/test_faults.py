"""SIGKILL in the middle of a run: the real controller, vLLM engine, teacher and DeepSpeed learner continue."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from opd_ray.errors import DeadlineError
from opd_ray.replay.batch import SampledBatch
from opd_ray.training.controller import Controller, Groups
from opd_ray.types import Prompt, RolloutRequest
from tests.integration.runs import Engines, Hook, RunRecord, small_config, train

pytestmark = pytest.mark.integration


async def process_of(actor: Any) -> int:
    """The pid of an actor that is not busy."""
    pid: int = await actor.__ray_call__.remote(lambda _: os.getpid())
    return pid


def killer(kind: str, steps: list[SampledBatch]) -> tuple[Hook, Hook]:
    """Hooks that look up a process of `kind` before the training, and kill it after the second step."""
    found: list[int] = []

    async def look_up(groups: Groups, controller: Controller) -> None:
        actors = {
            "rollout": groups.rollout.workers,
            "teacher": groups.teacher.workers,
            "learner": groups.learner.workers[-1:],
        }[kind]
        found.append(await process_of(actors[0]))

    async def strike(groups: Groups, controller: Controller) -> None:
        while len(steps) < 2:
            await asyncio.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)

    return look_up, strike


def train_with_a_death(engines: Engines, kind: str, *overrides: str, folder: Path | None = None) -> RunRecord:
    """Ten steps; one actor of `kind` dies after the second."""
    steps: list[SampledBatch] = []
    before, during = killer(kind, steps)
    cfg = small_config("lsm_block64", "num_steps=10", *overrides)
    return train(cfg, engines, before, folder=folder, during=during, seen=steps)


def assert_complete(record: RunRecord) -> None:
    assert record.of("step") == list(range(1, 11))
    books = record.ledger
    ended = books["trained"] + books["evicted"] + books["failed"]
    assert books["started"] == ended + books["in_store"] + books["in_flight"]
    first_uses = [
        trajectory_ids
        for trajectory_ids, use in zip(record.trajectory_ids, record.of("replay/uses/max"), strict=True)
        if use == 1
    ]
    trajectory_ids = [trajectory_id for batch in first_uses for trajectory_id in batch]
    assert len(set(trajectory_ids)) == len(trajectory_ids)


@pytest.mark.parametrize("kind", ["rollout", "teacher"])
def test_a_dead_worker_costs_no_step(engines: Engines, kind: str) -> None:
    before = engines.rollout.num_restarts + engines.teacher.num_restarts
    record = train_with_a_death(engines, kind, "replay.max_staleness=2")
    assert_complete(record)
    assert max(record.of("replay/staleness/max")) <= 3
    assert engines.rollout.num_restarts + engines.teacher.num_restarts == before + 1
    assert record.ledger["evicted"] == 0 and record.ledger["failed"] == 0


def test_a_new_engine_has_the_published_weights_before_it_serves(engines: Engines) -> None:
    """Its own weights are the model's, version 0; what it samples says otherwise."""
    versions: list[int] = []

    async def probe(groups: Groups, controller: Controller) -> None:
        worker = groups.rollout.workers[0]
        os.kill(await process_of(worker), signal.SIGKILL)
        problems = [Prompt(id="p", problem="7+3-4=")]
        answers = await groups.rollout.complete(problems, 2)
        assert len(answers[0]) == 2
        assert groups.rollout.workers[0] is not worker
        request = RolloutRequest((problems[0],), (10**6,), 1)
        _, meta = groups.rollout.workers[0].generate.options(num_returns=2).remote(request)
        versions.append((await meta).trajectories[0].oldest_version)

    train(small_config("lsm", "num_steps=2"), engines, after=probe)
    assert versions == [2]


def test_a_lost_learner_rank_takes_the_run_back_bit_for_bit(engines: Engines, tmp_path: Path) -> None:
    """In lock-step the steps after the checkpoint come out as they were."""
    two_ranks = ["learner.num_ranks=2", "checkpoint.every=3"]
    unbroken = train(small_config("lsm_block64", "num_steps=10", *two_ranks), engines)
    record = train_with_a_death(engines, "learner", *two_ranks, folder=tmp_path)
    assert_complete(record)
    assert record.of("faults/restarts/learner")[-1] == 1
    assert record.of("learner/loss/mean") == unbroken.of("learner/loss/mean")
    assert record.of("learner/grad_norm") == unbroken.of("learner/grad_norm")
    assert record.trajectory_ids == unbroken.trajectory_ids


def test_a_hanging_engine_is_a_typed_error(engines: Engines) -> None:
    stopped: list[int] = []

    async def stop(groups: Groups, controller: Controller) -> None:
        stopped.append(await process_of(groups.rollout.workers[0]))
        os.kill(stopped[0], signal.SIGSTOP)

    engines.rollout.deadline_s = 5
    try:
        with pytest.raises(DeadlineError, match=r"actor rollout-0 gave no answer in 5 s: .*deadline_s"):
            train(small_config("lsm"), engines, before=stop)
    finally:
        engines.rollout.deadline_s = 120
        os.kill(stopped[0], signal.SIGCONT)


def test_payload_outlives_the_worker_that_made_it(engines: Engines) -> None:
    payloads: list[Any] = []

    async def probe(groups: Groups, controller: Controller) -> None:
        prompt = Prompt(id="p", problem="7+3-4=")
        worker = groups.teacher.workers[0]
        request = RolloutRequest((prompt,), (10**6,), 1)
        payload, meta = groups.rollout.workers[0].generate.options(num_returns=2).remote(request)
        scored, scored_meta = worker.score.options(num_returns=2).remote(payload, await meta, (prompt,))
        size = (await scored_meta).num_bytes
        os.kill(await process_of(worker), signal.SIGKILL)
        await asyncio.sleep(1)
        payloads.append(await scored)
        assert memoryview(payloads[0]).nbytes == size

    train(small_config("lsm"), engines, after=probe)
    assert payloads
