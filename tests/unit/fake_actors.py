"""Fake actors around the real loops, groups' bookkeeping and store: they only sleep, may die, and tell what they saw.

Ray is never started.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import random
import weakref
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.cluster.worker_group import WorkerGroup
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.errors import ActorDiedError, ActorError, PayloadLostError
from opd_ray.learner.spec import LostTrajectories
from opd_ray.learner.step_report import RankReport
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.payload_io import PayloadFile, read_payload, write_payload
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import Checkpoint, Checkpoints
from opd_ray.training.controller import Controller, Groups, Outputs
from opd_ray.types import BatchMeta, LoadResult, Prompt, RolloutRequest, TrajectoryMeta, WeightsMeta

_NUMBERS = itertools.count()


class FakePayload:
    """A reference to a payload that comes to something unless it `is_lost`."""

    def __init__(self, value: asyncio.Future[Any]) -> None:
        self.value = value
        self.is_lost = False
        self.number = next(_NUMBERS)

    def __await__(self) -> Generator[Any, None, Any]:
        if self.is_lost:
            raise PayloadLostError("a payload was lost with its node: have it made again")
        return self.value.__await__()


# Those of the last run that are referred to somewhere.
PAYLOADS: weakref.WeakSet[FakePayload] = weakref.WeakSet()


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
        items = [asyncio.ensure_future(self._item(task, index)) for index in range(self._num_returns)]
        for item in items:
            # Nobody looks at the payload of a call that died.
            item.add_done_callback(lambda done: done.cancelled() or done.exception())
        payload = FakePayload(items[0])
        PAYLOADS.add(payload)
        return payload, *items[1:]

    async def _run(self, *args: Any) -> Any:
        result = self._call(*args)
        return await result if inspect.isawaitable(result) else result

    @staticmethod
    async def _item(task: Awaitable[Any], index: int) -> Any:
        return (await task)[index]


class Handle:
    """An object whose methods are called like a Ray actor's; once `kill` was called, every call dies."""

    def __init__(self, target: Any, name: str = "actor") -> None:
        self._target = target
        self._name = name
        self._death = asyncio.Event()

    def kill(self) -> None:
        self._death.set()

    def __getattr__(self, name: str) -> Method:
        call = getattr(self._target, name)

        async def mortal(*args: Any) -> Any:
            if not self._death.is_set():
                result = call(*args)
                if not inspect.isawaitable(result):
                    return result
                work, death = asyncio.ensure_future(result), asyncio.ensure_future(self._death.wait())
                try:
                    await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
                    if work.done():
                        return work.result()
                finally:
                    # Killed, or left by its caller, which ends it: it does not write on, not even in its threads.
                    death.cancel()
                    if not work.done():
                        work.cancel()
                        await asyncio.wait({work})
                        await asyncio.to_thread(int)
            raise ActorDiedError(f"actor {self._name} died (killed): start again")

        return Method(mortal)


class FakePayloads:
    """A `PayloadIO` for fake payloads."""

    async def write(self, refs: Sequence[Any], paths: Sequence[Path]) -> list[str | None]:
        checksums: list[str | None] = []
        for ref, path in zip(refs, paths, strict=True):
            try:
                checksums.append(write_payload(await ref, path))
            except PayloadLostError:
                checksums.append(None)
            await asyncio.sleep(0)
        return checksums

    async def read(self, files: Sequence[PayloadFile]) -> list[Any]:
        return self.read_later(files)

    def read_later(self, files: Sequence[PayloadFile]) -> list[Any]:
        payloads = []
        for file in files:
            value = asyncio.get_running_loop().create_future()
            value.set_result(bytes(read_payload(file)))
            payloads.append(FakePayload(value))
            PAYLOADS.add(payloads[-1])
        return payloads


class World:
    """What all fake actors share: time, the weights' versions, and what was seen."""

    def __init__(self, seed: int, max_delay: int | Mapping[str, int]) -> None:
        self.random = random.Random(seed)
        self._max_delay = max_delay
        self.busy: set[str] = set()
        self.together: set[frozenset[str]] = set()
        self.batches: list[tuple[int, SampledBatch]] = []
        self.prompts: dict[int, str] = {}
        self.teacher_fails_at: int | None = None
        self.scored = 0

    async def work(self, role: str) -> None:
        kind = role.rstrip("0123456789")
        most = self._max_delay if isinstance(self._max_delay, int) else self._max_delay.get(kind, 2)
        self.busy.add(role)
        try:
            for _ in range(self.random.randint(0, most)):
                self.together.add(frozenset(self.busy))
                await asyncio.sleep(0)
        finally:
            self.busy.discard(role)


class FakeEngine:
    """Stamps its version on trajectories; a new one has the model's own weights, version 0."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.version = 0

    def ping(self) -> str:
        return "rollout"

    def abandon(self) -> None:
        """Nothing runs in here."""

    async def generate(self, request: RolloutRequest) -> tuple[str, BatchMeta]:
        oldest = self.version
        await self.world.work(f"rollout{request.trajectory_ids[0]}")
        rows = [
            TrajectoryMeta(trajectory_id, request.prompt_of(row).id, row, 3, 5, oldest, self.version, "stop")
            for row, trajectory_id in enumerate(request.trajectory_ids)
        ]
        self.world.prompts |= {row.trajectory_id: row.prompt_id for row in rows}
        return f"payload{request.trajectory_ids[0]}", BatchMeta(tuple(rows), "rollout-0", 0.1, 100)

    async def load_weights(self, published: WeightsMeta, *buckets: Any) -> LoadResult:
        await self.world.work("load")
        self.version = published.policy_version
        return LoadResult("rollout", published.policy_version, published.checksum, 8, 0.0)


class FakeTeacher:
    """Scores anything."""

    def __init__(self, world: World) -> None:
        self.world = world

    def ping(self) -> str:
        return "teacher"

    async def score(self, payload: Any, meta: BatchMeta, prompts: tuple[Prompt, ...]) -> tuple[bytes, BatchMeta]:
        await payload
        await self.world.work("teacher")
        self.world.scored += 1
        if self.world.scored == self.world.teacher_fails_at:
            raise ActorError("actor teacher-0 failed: mend it")
        assert prompts
        return b"scored", meta


class _Spawning(WorkerGroup):
    """The real group with fake actors."""

    world: World
    kind: type

    def _spawn(self, index: int) -> Any:
        return Handle(self.kind(self.world), f"{self.role}-{index}")

    def _kill(self, worker: Any) -> None:
        worker.kill()

    def begin(self, world: World, num_workers: int) -> None:
        self.world = world
        self._spawn_all(num_workers)


class FakeEngines(_Spawning, RolloutGroup):
    """The real `RolloutGroup` with fake engines."""

    kind = FakeEngine


class FakeTeachers(_Spawning):
    """The real group with fake teachers."""

    kind = FakeTeacher


class FakeLearner:
    """The learner's group; its state is the number of steps it made."""

    def __init__(self, world: World, max_restarts: int) -> None:
        self.world = world
        self.num_restarts = 0
        self.version = 0
        self.is_dead = False
        self.unavailable: set[int] = set()
        self._max_restarts = max_restarts
        self._death = asyncio.Event()

    def kill(self) -> None:
        self.is_dead = True

    async def train_step(self, batch: SampledBatch, policy_version: int) -> list[RankReport] | LostTrajectories:
        assert policy_version == self.version
        await self.world.work("learner")
        if self.is_dead:
            raise ActorDiedError("actor learner-0 died (killed): start again")
        refs = [batch.refs[ref] for ref, _ in batch.rows]
        lost = [
            info.trajectory_id for info, ref in zip(batch.infos, refs, strict=True) if getattr(ref, "is_lost", False)
        ]
        if lost:
            return LostTrajectories(tuple(lost))
        self.version += 1
        self.world.batches.append((policy_version, batch))
        return [RankReport(loss_sum=1.0, weight_sum=1.0, divisor=1.0, num_tokens=5, grad_norm=1.0)]

    async def export(self, version: int) -> tuple[WeightsMeta, list[Any]]:
        assert version == self.version
        return WeightsMeta(version, "checksum", 0), []

    async def restart(self, error: ActorDiedError) -> None:
        if self.num_restarts == self._max_restarts:
            raise error
        self.num_restarts += 1
        self.version, self.is_dead = 0, False

    async def ready(self) -> None:
        """At once."""

    async def save_checkpoint(self, folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps(self.version))

    async def load_checkpoint(self, folder: Path) -> None:
        self.version = json.loads((folder / "state.json").read_text())

    async def save(self, folder: Path) -> None:
        folder.mkdir()


@dataclass
class Run:
    """A controller with its fake actors, and what it told."""

    cfg: RunConfig
    world: World
    folder: Path | None = None
    num_prompts: int = 50
    steps: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    trained: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    rolled_back: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        cfg, limit = self.cfg, self.cfg.faults.max_restarts
        PAYLOADS.clear()
        self.engines = FakeEngines("rollout", cfg.deadline_s, limit)
        self.engines.begin(self.world, cfg.rollout.num_engines)
        self.teachers = FakeTeachers("teacher", cfg.deadline_s, limit)
        self.teachers.begin(self.world, cfg.teacher.num_workers)
        self.learner = FakeLearner(self.world, limit)
        self.store = ReplayStore(StoreConfig.of(cfg), FakePayloads())
        source = PromptSource(
            [Prompt(id=str(i), problem="1+1=") for i in range(self.num_prompts)], 0, cfg.data.epochs or None
        )
        every = cfg.checkpoint.every if self.folder else 0
        checkpoints = Checkpoints(self.folder or Path("none"), every, cfg.checkpoint.keep, {}, dict)
        teachers: Any = self.teachers
        learner: Any = self.learner
        self.controller = Controller(
            cfg,
            Groups(self.engines, teachers, learner, self.store),
            source,
            [],
            Outputs(self._step_done, self._go_back, checkpoints),
        )

    def _step_done(self, step: int, batch: SampledBatch, metrics: Mapping[str, Any]) -> None:
        self.steps.append((step, metrics))
        self.trained.append((step, batch.trajectory_ids))

    def _go_back(self, checkpoint: Checkpoint | None) -> int:
        version = checkpoint.policy_version if checkpoint else 0
        num_redone = len(self.trained) - version
        self.rolled_back.append(version)
        self.steps = [entry for entry in self.steps if entry[0] <= version]
        self.trained = [entry for entry in self.trained if entry[0] <= version]
        return num_redone

    async def train(self, checkpoint: Checkpoint | None = None) -> Run:
        """To the end."""
        await self.controller.train(checkpoint)
        return self

    @property
    def books(self) -> dict[str, int]:
        """The store's ledger."""
        return self.store.ledger()


def config(max_staleness: int, reuse: int, num_steps: int, num_engines: int = 1) -> RunConfig:
    """Three prompts of two samples a step."""
    cfg = RunConfig()
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.num_engines = 3, 2, num_engines
    cfg.replay.max_staleness, cfg.replay.reuse, cfg.num_steps = max_staleness, reuse, num_steps
    cfg.deadline_s = 30
    return cfg


def train(cfg: RunConfig, world: World, **options: Any) -> Run:
    """A whole run."""

    async def run() -> Run:
        return await Run(cfg, world, **options).train()

    return asyncio.run(run())
