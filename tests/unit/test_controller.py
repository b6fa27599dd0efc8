"""The controller's protocol with fake actors around the real store: order, bounds, errors. Ray is never started."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.actors.learner.step_report import RankReport
from opd_ray.actors.store import store_config
from opd_ray.choices import ReplayOrder, StalePolicy
from opd_ray.config import RunConfig
from opd_ray.controller import Controller, Groups
from opd_ray.data.source import PromptSource
from opd_ray.errors import ActorError
from opd_ray.replay.cohort import SampledBatch
from opd_ray.replay.store import ReplayStore
from opd_ray.types import BatchReceipt, Prompt, RolloutRequest, TrajectoryReceipt, WeightsReceipt


class Method:
    """Looks like a Ray actor's method: `.remote()` gives something to await, `.options(num_returns=2)` two of them."""

    def __init__(self, call: Callable[..., Any], num_returns: int = 1) -> None:
        self._call = call
        self._num_returns = num_returns

    def options(self, num_returns: int) -> Method:
        return Method(self._call, num_returns)

    def remote(self, *args: Any) -> Any:
        task = asyncio.ensure_future(self._run(*args))
        if self._num_returns == 1:
            return task
        return tuple(asyncio.ensure_future(self._item(task, index)) for index in range(self._num_returns))

    async def _run(self, *args: Any) -> Any:
        result = self._call(*args)
        return await result if inspect.isawaitable(result) else result

    @staticmethod
    async def _item(task: Awaitable[Any], index: int) -> Any:
        return (await task)[index]


class Handle:
    """An object whose methods are called like a Ray actor's."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._target, name))


class World:
    """Engines, teachers and a learner that only sleep, and write down what they saw."""

    def __init__(self, seed: int, max_delay: int) -> None:
        self._random = random.Random(seed)
        self._max_delay = max_delay
        self.engine_version = 0
        self.busy: set[str] = set()
        self.together: set[frozenset[str]] = set()
        self.batches: list[SampledBatch] = []
        self.teacher_fails_at: int | None = None
        self.scored = 0

    async def work(self, role: str) -> None:
        self.busy.add(role)
        for _ in range(self._random.randint(0, self._max_delay)):
            self.together.add(frozenset(self.busy))
            await asyncio.sleep(0)
        self.busy.discard(role)

    async def generate(self, request: RolloutRequest) -> tuple[str, BatchReceipt]:
        oldest = self.engine_version
        await self.work(f"rollout{request.slots[0]}")
        rows = [
            TrajectoryReceipt(slot, "p", row, 3, 5, oldest, self.engine_version, "stop")
            for row, slot in enumerate(request.slots)
        ]
        return f"payload{request.slots[0]}", BatchReceipt(tuple(rows), "rollout-0", 0.1, 100)

    async def score(self, payload: Any, receipt: BatchReceipt, prompts: tuple[Prompt, ...]) -> tuple[str, BatchReceipt]:
        await payload
        await self.work("teacher")
        self.scored += 1
        if self.scored == self.teacher_fails_at:
            raise ActorError("actor teacher-0 died: start again")
        assert prompts
        return "scored", receipt

    async def load_weights(self, published: WeightsReceipt) -> WeightsReceipt:
        await self.work("load")
        self.engine_version = published.policy_version
        return published


class FakeGroup:
    """One worker of the world; the learner's methods are the group's own."""

    def __init__(self, world: World, num_workers: int = 1) -> None:
        self.world = world
        self.workers = [Handle(world) for _ in range(num_workers)]

    async def result(self, ref: Any, index: int) -> Any:
        return await ref

    async def all(self, call: Callable[[Any], Any]) -> list[Any]:
        return [await call(worker) for worker in self.workers]

    async def train_step(self, batch: SampledBatch, policy_version: int) -> list[RankReport]:
        self.world.batches.append(batch)
        await self.world.work("learner")
        return [RankReport(loss_sum=1.0, weight_sum=1.0, divisor=1.0, num_tokens=5, grad_norm=1.0)]

    async def export(self, version: int) -> tuple[WeightsReceipt, list[Any]]:
        return WeightsReceipt(version, "checksum", 0), []


def config(max_staleness: int, reuse: int, num_steps: int, num_engines: int) -> RunConfig:
    cfg = RunConfig()
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.num_engines = 3, 2, num_engines
    cfg.replay.max_staleness, cfg.replay.reuse, cfg.num_steps = max_staleness, reuse, num_steps
    cfg.deadline_s = 30
    return cfg


async def run(cfg: RunConfig, world: World, num_prompts: int = 50, epochs: int | None = None) -> SimpleNamespace:
    store = ReplayStore(store_config(cfg))
    group: Any = FakeGroup(world, cfg.rollout.num_engines)
    source = PromptSource([Prompt(id=str(i), problem="1+1=") for i in range(num_prompts)], 0, epochs)
    steps: list[Mapping[str, Any]] = []
    controller = Controller(
        cfg, Groups(group, group, group, Handle(store)), source, [], lambda _, metrics: steps.append(metrics)
    )
    await controller.train()
    return SimpleNamespace(steps=steps, ledger=store.ledger(), controller=controller, store=store)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(0, 10**6),
)
def test_any_timing_keeps_the_bound_and_the_books(
    max_staleness: int, reuse: int, num_steps: int, num_engines: int, max_delay: int, seed: int
) -> None:
    world = World(seed, max_delay)
    done = asyncio.run(run(config(max_staleness, reuse, num_steps, num_engines), world))
    assert len(done.steps) == num_steps
    for batch in world.batches:
        assert all(info.staleness <= max_staleness + info.visits - 1 for info in batch.infos)
        assert len({info.visits for info in batch.infos}) == 1
    books = done.ledger
    assert books["started"] == 6 * -(-num_steps // reuse)
    assert books["in_flight"] == 0 and books["started"] == books["trained"] + books["in_store"]
    assert world.engine_version == num_steps


MODES = [
    (ReplayOrder.fifo, StalePolicy.drop),
    (ReplayOrder.freshest, StalePolicy.drop),
    (ReplayOrder.weighted, StalePolicy.drop),
    (ReplayOrder.fifo, StalePolicy.gate),
    (ReplayOrder.freshest, StalePolicy.gate),
    (ReplayOrder.weighted, StalePolicy.gate),
]


@given(st.sampled_from(MODES), st.integers(1, 3), st.integers(1, 2), st.integers(0, 12), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_order_keeps_its_bound_and_the_books(
    mode: tuple[ReplayOrder, StalePolicy], max_staleness: int, reuse: int, max_delay: int, seed: int
) -> None:
    cfg = config(max_staleness, reuse, 8, 2)
    cfg.replay.order, cfg.replay.stale = mode
    cfg.replay.hard_staleness = max_staleness + 2 if mode[1] is StalePolicy.gate else 0
    world = World(seed, max_delay)
    done = asyncio.run(run(cfg, world))
    bound = cfg.replay.hard_staleness or max_staleness
    assert len(done.steps) == 8
    assert all(info.staleness <= bound + info.visits - 1 for batch in world.batches for info in batch.infos)
    books = done.ledger
    evicted = sum(number for name, number in books.items() if name.startswith("evicted/"))
    assert books["started"] == books["trained"] + evicted + books["in_store"] + books["in_flight"]


@given(st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_in_lock_step_the_groups_take_turns(reuse: int, seed: int) -> None:
    world = World(seed, 8)
    asyncio.run(run(config(0, reuse, 6, 1), world))
    assert not [busy for busy in world.together if "learner" in busy and len(busy) > 1]


def test_with_a_larger_bound_they_overlap() -> None:
    world = World(1, 8)
    asyncio.run(run(config(2, 2, 12, 1), world))
    assert [busy for busy in world.together if "learner" in busy and len(busy) > 1]
    assert max(info.staleness for batch in world.batches for info in batch.infos if info.visits == 1) > 0


def test_an_error_in_a_group_ends_the_run_with_that_error() -> None:
    world = World(3, 2)
    world.teacher_fails_at = 3
    with pytest.raises(ActorError, match="teacher-0 died"):
        asyncio.run(asyncio.wait_for(run(config(2, 1, 50, 1), world), timeout=20))


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_an_interrupt_at_any_moment_ends_everything(first: int) -> None:
    """A cancellation that met a result was once swallowed, and the run went on without its rollout loop."""

    async def interrupted(moment: int) -> set[asyncio.Task[Any]]:
        task = asyncio.create_task(run(config(1, 2, 10_000, 2), World(moment, 3)))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await task
        # What the fake actors still do is theirs; the controller's own tasks must be gone.
        return {t for t in asyncio.all_tasks() if "Controller" in repr(t.get_coro())}

    for moment in range(first, first + 50):
        assert asyncio.run(interrupted(moment)) == set()


def test_finite_prompts_drain() -> None:
    world = World(5, 4)
    done = asyncio.run(run(config(1, 1, 100, 1), world, num_prompts=7, epochs=1))
    assert len(done.steps) == 2
    assert done.ledger["trained"] == 12
    assert done.ledger["evicted/drained"] == 2
    assert done.ledger["in_flight"] == 0
