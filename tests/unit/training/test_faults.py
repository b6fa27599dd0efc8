"""Actors that die at any moment: fakes around the real loops, groups' bookkeeping and store."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.cluster import worker_group as group
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ActorDiedError, ResourceError
from opd_ray.run.checkpoint import latest_checkpoint
from tests.unit.fake_actors import PAYLOADS, FakeEngine, FakeLearner, FakeTeacher, Run, World, config


def small(max_staleness: int, reuse: int, num_steps: int = 8) -> RunConfig:
    """Two engines, two teachers, any number of deaths."""
    cfg = config(max_staleness, reuse, num_steps, 2)
    cfg.teacher.num_workers = 2
    cfg.faults.max_restarts, cfg.faults.max_attempts = 50, 3
    cfg.checkpoint.every = 2
    return cfg


async def train_with_deaths(run: Run, deaths: list[tuple[int, str]]) -> Run:
    """Kill one actor of the named kind after so many turns of the event loop, one after the other."""
    # One thread: what is waited for comes after all that a killed actor had left to its threads.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    task = asyncio.create_task(run.train())
    for turns, kind in deaths:
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        engine, teacher = run.engines.workers[-1:], run.teachers.workers[:1]
        victims: list[Any] = {
            "rollout": engine,
            "rollouts": run.engines.workers,
            "teacher": teacher,
            "teachers": run.teachers.workers,
            "learner": [run.learner],
            "payloads": [],
            "node": [*engine, *teacher],
        }[kind]
        for victim in victims:
            victim.kill()
        if kind == "payloads" or kind.startswith("node"):
            lose_payloads(run.world, share=1.0 if kind == "payloads" else 0.5)
    async with asyncio.timeout(20):
        return await task


def lose_payloads(world: World, share: float = 1.0) -> None:
    """What was on a node is gone: each payload that somebody refers to, with probability `share`."""
    for payload in sorted(PAYLOADS, key=lambda payload: payload.number):
        payload.is_lost = payload.is_lost or world.random.random() < share


def assert_sound(run: Run, max_staleness: int, reuse: int) -> None:
    """The bound, each step once, no trajectory too often, and the books."""
    assert [step for step, _ in run.trained] == list(range(1, run.cfg.num_steps + 1))
    uses = Counter(trajectory_id for _, trajectory_ids in run.trained for trajectory_id in trajectory_ids)
    assert max(uses.values()) <= reuse
    assert all(
        info.staleness <= max_staleness + info.num_uses - 1 for _, batch in run.world.batches for info in batch.infos
    )
    books = run.books
    ended = books["trained"] + books["evicted"] + books["failed"]
    assert books["started"] == ended + books["in_store"] + books["in_flight"]
    # What the store counts as trained had all its uses, in steps that count.
    assert books["trained"] <= sum(count == reuse for count in uses.values())


KINDS = st.sampled_from(["rollout", "rollouts", "teacher"])


@given(
    st.integers(0, 3), st.integers(1, 2), st.lists(st.tuples(st.integers(0, 40), KINDS), max_size=6), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_workers_that_die_cost_no_step(
    max_staleness: int, reuse: int, deaths: list[tuple[int, str]], seed: int
) -> None:
    async def scenario() -> Run:
        return await train_with_deaths(Run(small(max_staleness, reuse), World(seed, 6)), deaths)

    run = asyncio.run(scenario())
    assert_sound(run, max_staleness, reuse)
    assert run.books["evicted"] == 0
    assert [step for step, _ in run.world.batches] == list(range(8))


def sound_run_with_checkpoints(max_staleness: int, reuse: int, deaths: list[tuple[int, str]], seed: int) -> Run:
    """A run in a folder of its own in which `deaths` happen, and which is sound for all that."""

    async def scenario(folder: Path) -> Run:
        return await train_with_deaths(Run(small(max_staleness, reuse), World(seed, 6), folder), deaths)

    with TemporaryDirectory() as folder:
        run = asyncio.run(scenario(Path(folder)))
    assert_sound(run, max_staleness, reuse)
    return run


@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 60), KINDS | st.just("learner")), min_size=1, max_size=5),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_lost_learner_takes_the_run_back_to_its_checkpoint(
    max_staleness: int, reuse: int, deaths: list[tuple[int, str]], seed: int
) -> None:
    run = sound_run_with_checkpoints(max_staleness, reuse, deaths, seed)
    assert len(run.rolled_back) == run.learner.num_restarts
    assert all(version % 2 == 0 for version in run.rolled_back)


LOSSES = st.sampled_from(["payloads", "node", "rollout"])


@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 60), LOSSES), min_size=1, max_size=6),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_lost_payloads_cost_their_trajectories_and_no_step(
    max_staleness: int, reuse: int, losses: list[tuple[int, str]], seed: int
) -> None:
    run = sound_run_with_checkpoints(max_staleness, reuse, losses, seed)
    assert [step for step, _ in run.world.batches] == list(range(8))
    lost = run.books.get("evicted/payload_lost", 0)
    assert run.books["evicted"] == lost
    # Trajectories that were found in no batch are lost when a checkpoint finds them.
    assert run.controller.totals.lost_trajectories <= lost


@given(
    st.integers(0, 2),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 60), LOSSES | st.just("learner")), min_size=1, max_size=4),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_a_node_with_a_learner_rank_takes_the_run_back_without_what_it_held(
    max_staleness: int, reuse: int, losses: list[tuple[int, str]], seed: int
) -> None:
    run = sound_run_with_checkpoints(max_staleness, reuse, losses, seed)
    assert len(run.rolled_back) == run.learner.num_restarts


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_lock_step_cohort_that_is_lost_between_its_visits_is_no_dead_end(is_whole: bool) -> None:
    """The engines are one version behind then: with these weights the next batch would be too old for ever."""
    cfg = small(0, 2)
    cfg.checkpoint.every = 0

    async def scenario() -> Run:
        run = Run(cfg, World(3, 4))
        task = asyncio.create_task(run.train())
        while len(run.trained) < 3:
            await asyncio.sleep(0)
        first, second = run.world.batches[-1][1].refs  # of four and of two trajectories
        first.is_lost, second.is_lost = is_whole, True
        async with asyncio.timeout(20):
            return await task

    run = asyncio.run(scenario())
    assert_sound(run, 0, 2)
    num_lost = 6 if is_whole else 2
    assert run.books["evicted/payload_lost"] == run.controller.totals.lost_trajectories == num_lost
    assert [len(trajectory_ids) for _, trajectory_ids in run.trained[:5]] == [6, 6, 6, 6 if is_whole else 4, 6]
    assert [batch.infos[0].num_uses for _, batch in run.world.batches[:4]] == [1, 2, 1, 1 if is_whole else 2]


def test_a_checkpoint_that_finds_a_cohort_lost_is_no_dead_end(tmp_path: Path) -> None:
    cfg = small(0, 2)
    cfg.checkpoint.every = 1
    saved = 0

    async def scenario() -> Run:
        run = Run(cfg, World(4, 4), tmp_path)

        async def save_and_lose(folder: Path) -> None:
            nonlocal saved
            saved += 1
            if saved == 3:
                lose_payloads(run.world)
            await FakeLearner.save_checkpoint(run.learner, folder)

        run.learner.save_checkpoint = save_and_lose  # type: ignore[method-assign]
        async with asyncio.timeout(20):
            return await run.train()

    run = asyncio.run(scenario())
    assert_sound(run, 0, 2)
    assert run.books["evicted/payload_lost"] == 6
    # The learner or the checkpoint finds it, whichever looks first.
    assert run.controller.totals.lost_trajectories in (0, 6)


class Nodes:
    """A group's room: what has no node waits until there `is_room`."""

    def __init__(self) -> None:
        self.is_room = False

    async def is_placed(self, index: int) -> bool:
        await asyncio.sleep(0)
        return self.is_room

    def no_room(self, waited_s: float) -> ResourceError:
        return ResourceError(f"no room in {waited_s:g} s: add a node")


@pytest.mark.parametrize(("max_staleness", "room_comes"), [(0, True), (2, True), (0, False), (2, False)])
def test_a_group_goes_on_with_the_workers_that_are_left_until_there_is_room(
    max_staleness: int, room_comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "LOOK_S", 0.001)
    cfg = small(max_staleness, 1, 30)

    async def scenario() -> Run:
        run = Run(cfg, World(5, 4))
        nodes: Any = Nodes()
        run.engines._placement = run.teachers._placement = nodes
        task = asyncio.create_task(run.train())
        while len(run.trained) < 3:
            await asyncio.sleep(0)
        run.engines.workers[1].kill()
        run.teachers.workers[0].kill()
        while len(run.trained) < 15:
            await asyncio.sleep(0)
        assert (run.engines.unavailable, run.teachers.unavailable) == ({1}, {0})
        nodes.is_room = room_comes
        async with asyncio.timeout(20):
            return await task

    run = asyncio.run(scenario())
    assert_sound(run, max_staleness, 1)
    assert run.books["failed"] == run.books["evicted"] == 0
    absent = [metrics["faults/unavailable/rollout"] for _, metrics in run.steps]
    assert absent[0] == 0 and 1.0 in absent and absent[-1] == (0 if room_comes else 1)
    assert run.engines.workers[0]._target.version == 30
    assert not room_comes or run.engines.workers[1]._target.version == 30


def test_a_group_of_which_nobody_is_left_and_no_room_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LOOK_S", 0.001)
    cfg = small(1, 1, 1000)
    cfg.deadline_s = 0.2

    async def scenario() -> None:
        run = Run(cfg, World(5, 4))
        nodes: Any = Nodes()
        run.teachers._placement = nodes
        await train_with_deaths(run, [(30, "teacher"), (0, "teachers")])

    with pytest.raises(ResourceError, match=r"no room in 0\.\d+ s: add a node"):
        asyncio.run(scenario())


def test_without_checkpoints_a_lost_learner_ends_the_run() -> None:
    async def scenario() -> None:
        await train_with_deaths(Run(small(1, 1, 1000), World(1, 6)), [(30, "learner")])

    with pytest.raises(ActorDiedError, match=r"learner-0 died"):
        asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["rollout", "teacher"])
def test_restarts_are_bounded(kind: str) -> None:
    cfg = small(1, 1, 1000)
    cfg.faults.max_restarts = 2

    async def scenario() -> None:
        await train_with_deaths(Run(cfg, World(1, 6)), [(60, kind)] * 30)

    with pytest.raises(ActorDiedError, match=r"faults.max_restarts=2: mend the cause"):
        asyncio.run(scenario())


def test_slots_fail_when_all_attempts_did() -> None:
    cfg = small(1, 1, 6)
    cfg.faults.max_attempts = 1
    deaths = [(25, "teacher")] * 4

    async def scenario() -> Run:
        return await train_with_deaths(Run(cfg, World(5, {"teacher": 30})), deaths)

    run = asyncio.run(scenario())
    assert_sound(run, 1, 1)
    assert run.books["failed/worker_died"] > 0


def test_the_attempts_of_a_request_are_counted_over_all_of_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One death while it is sampled and one while it is scored are two."""
    cfg = small(0, 1, 3)
    cfg.faults.max_attempts = 2
    deaths: set[str] = set()

    def dying_once(kind: type, name: str) -> None:
        call = getattr(kind, name)

        async def mortal(self: Any, *args: Any) -> Any:
            if name not in deaths:
                deaths.add(name)
                raise ActorDiedError(f"an actor died in {name}: start again")
            return await call(self, *args)

        monkeypatch.setattr(kind, name, mortal)

    async def scenario() -> Run:
        # One request at a time: the death in `score` is that of the request that met the one in `generate`.
        cfg.rollout.prompts_per_step, cfg.rollout.num_engines = 1, 1
        dying_once(FakeEngine, "generate")
        dying_once(FakeTeacher, "score")
        async with asyncio.timeout(20):
            return await Run(cfg, World(1, 2)).train()

    run = asyncio.run(scenario())
    assert run.books["failed/worker_died"] == 2 and len(run.trained) == 3


def test_a_new_engine_serves_with_the_published_weights() -> None:
    """A new engine starts with the model's own weights; before it serves it has the others'."""
    cfg = small(2, 1, 12)

    async def scenario() -> Run:
        return await train_with_deaths(Run(cfg, World(2, 8)), [(120, "rollouts"), (60, "rollout")])

    run = asyncio.run(scenario())
    assert run.engines.num_restarts == 3
    oldest = [info.staleness for _, batch in run.world.batches for info in batch.infos]
    assert run.books["evicted"] == 0 and max(oldest) <= 2


def test_waiting_for_others_is_no_hang() -> None:
    """The learner takes longer than the deadline between two acquisitions."""
    cfg = small(0, 4, 4)
    cfg.deadline_s = 0.05

    async def scenario() -> Run:
        run = Run(cfg, World(1, 2))

        async def slow_step(*args: Any) -> Any:
            await asyncio.sleep(0.1)
            return await step(*args)

        step, run.learner.train_step = run.learner.train_step, slow_step  # type: ignore[method-assign,assignment]
        async with asyncio.timeout(20):
            return await run.train()

    assert len(asyncio.run(scenario()).steps) == 4


def live_and_die(folder: Path, cfg: RunConfig, seed: int, turns: int, seen: Path) -> None:
    """In a process of its own: continue the run in `folder` for some turns of its loop, then end as by SIGKILL.

    What an observer saw goes to `seen`; "books" are in it if the run came to its end.
    """
    if os.fork():
        os.wait()
        return
    try:
        found: dict[str, Any] = {}

        async def life() -> None:
            checkpoint = latest_checkpoint(folder)
            run = Run(cfg, World(seed, 6), folder)
            task = asyncio.create_task(run.train(checkpoint))
            for _ in range(turns):
                await asyncio.sleep(0)
                if task.done():
                    await task
                    found["books"] = run.books
                    break
            found["first"] = checkpoint.policy_version if checkpoint else 0
            found["trained"] = run.trained
            found["stale"] = [info.staleness - info.num_uses for _, batch in run.world.batches for info in batch.infos]
            seen.write_text(json.dumps(found))
            os._exit(0)

        asyncio.run(life())
    finally:
        os._exit(1)


@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.lists(st.integers(0, 250), min_size=1, max_size=4),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_a_driver_that_dies_at_any_moment_resumes_from_its_last_checkpoint(
    max_staleness: int, reuse: int, deaths: list[int], seed: int
) -> None:
    """Over all lives of a run each step is made once, no trajectory is used too often, and the books balance."""
    cfg = small(max_staleness, reuse)
    with TemporaryDirectory() as folder:
        trained: list[tuple[int, list[int]]] = []
        for life, turns in enumerate([*deaths, 10**6]):
            seen = Path(folder) / f"life-{life}.json"
            live_and_die(Path(folder), cfg, seed + life, turns, seen)
            found = json.loads(seen.read_text())
            trained = trained[: found["first"]] + found["trained"]
            assert [step for step, _ in trained] == list(range(1, len(trained) + 1))
            assert max(found["stale"], default=-1) <= max_staleness - 1
            if "books" in found:
                break
        uses = Counter(trajectory_id for _, trajectory_ids in trained for trajectory_id in trajectory_ids)
        books = found["books"]
        assert len(trained) == cfg.num_steps and max(uses.values()) <= reuse
        assert books["trained"] <= sum(count == reuse for count in uses.values())
        assert books["started"] == books["trained"] + books["evicted"] + books["failed"] + books["in_store"]
        assert books["evicted"] == books["failed"] == 0
