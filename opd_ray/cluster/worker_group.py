"""Groups of Ray actors: creation, names, room on nodes, thread pools, and new actors for those that died."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from opd_ray.cluster.faults import RestartBudget
from opd_ray.cluster.placement import LOOK_S, Placement, place
from opd_ray.cluster.remote_calls import death_is_known, remote_result, start_named
from opd_ray.config.choices import PlacementStrategy
from opd_ray.errors import ActorDiedError, LearnerLostError
from opd_ray.planning.placement import Share

logger = logging.getLogger(__name__)

# Handed on to workers where the driver has them set.
_INHERITED = ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "VLLM_LOGGING_LEVEL")

# Ray hands results under 100 KB to the caller itself: a payload, which has 2.2 KB at least, must not take that way
# through the driver. Metadata of up to some sixty trajectories does, and is no object in Ray's store then.
PAYLOAD_ENV = {"RAY_max_direct_call_object_size": "2048"}

# For workers that run whole models forward and backward: glibc keeps the memory of freed tensors. To have the pages of
# every activation and gradient again takes several percent of a teacher's time, and a third of an optimizer step.
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def worker_env(share: Share) -> dict[str, str]:
    """Environment variables of a worker: its thread pools, and engines that start fast and quietly."""
    threads = str(share.threads)
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Spinning threads of one worker would take the cores from the others.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **PAYLOAD_ENV,
    }
    if share.gpus == 0:
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Compiling the sampler takes 20 s at the first call, and is not faster afterwards.
            "TORCHDYNAMO_DISABLE": "1",
            "DS_ACCELERATOR": "cpu",
        }
    return env | {name: os.environ[name] for name in _INHERITED if name in os.environ}


def vllm_env(share: Share, kv_cache_gib: int, tensor_parallel: int) -> dict[str, str]:
    """More environment variables of a worker that runs a vLLM engine, which may be split over several processes."""
    if share.gpus:
        return {}
    threads = {"OMP_NUM_THREADS": str(max(1, share.threads // tensor_parallel))} if tensor_parallel > 1 else {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)} | threads


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a group's actors are made; `args` has one tuple of constructor arguments for each."""

    actor_class: Any
    args: tuple[tuple[Any, ...], ...]
    options: dict[str, Any]


class WorkerGroup:
    """Some equal actors; owns their handles and their room, replaces the dead, and ends them.

    `role` is what errors and the dashboard call them; at most `max_restarts` actors are replaced in a run.
    """

    def __init__(self, role: str, deadline_s: float, max_restarts: int = 0) -> None:
        self.role = role
        self.deadline_s = deadline_s
        self.workers: list[Any] = []
        self._restarts = RestartBudget(role, max_restarts)
        self._recipe: _Recipe | None = None
        self._placement: Placement | None = None
        self._replacements: dict[int, asyncio.Task[None]] = {}

    def start(  # noqa: PLR0913  (the public surface)
        self,
        worker_class: type,
        share: Share,
        args: Sequence[tuple[Any, ...]],
        env: dict[str, str],
        strategy: PlacementStrategy = PlacementStrategy.spread,
    ) -> None:
        """Create one actor for each tuple of constructor arguments, named ``<role>-<index>``; returns at once."""
        options = {
            "num_cpus": share.ray_cpus,
            "num_gpus": share.gpus,
            "runtime_env": {"env_vars": worker_env(share) | env},
            "max_restarts": 0,
        }
        self._recipe = _Recipe(ray.remote(worker_class), tuple(args), options)
        self._placement = place(self.role, share, len(args), strategy)
        self._spawn_all(len(args))

    def _spawn_all(self, num_workers: int) -> None:
        self.workers = [self._spawn(index) for index in range(num_workers)]

    def _spawn(self, index: int) -> Any:
        if self._recipe is None:
            raise RuntimeError(f"the group {self.role} was not started: call start first")
        recipe = self._recipe
        options = recipe.options | (self._placement.options(index) if self._placement is not None else {})
        return start_named(recipe.actor_class, f"{self.role}-{index}", options, recipe.args[index])

    async def placed(self) -> None:
        """Wait until every actor has a node; raises `ResourceError` after `deadline_s`."""
        if self._placement is not None:
            await self._placement.wait(self.deadline_s)

    async def ready(self) -> None:
        """Wait until every actor has a node and has been constructed."""
        await self.placed()
        await self.all(lambda worker: worker.ping.remote())

    async def all(self, call: Callable[[Any], Any]) -> list[Any]:
        """The results of ``call(worker)`` on every worker, in order."""
        return list(
            await asyncio.gather(*(self.result(call(worker), index) for index, worker in enumerate(self.workers)))
        )

    async def result(self, ref: Any, index: int) -> Any:
        """The value of one call's reference; an error becomes an `OpdError` that names the actor."""
        return await remote_result(ref, f"{self.role}-{index}", self.deadline_s)

    @property
    def num_restarts(self) -> int:
        """Actors that were replaced in this run."""
        return self._restarts.used

    @property
    def unavailable(self) -> set[int]:
        """Workers that died and are not replaced yet; the group continues with the others."""
        return {index for index, task in self._replacements.items() if not task.done()}

    def replace(self, index: int, dead: Any, error: ActorDiedError) -> asyncio.Future[None]:
        """Begin to put a new actor in the place of `dead`, whose death is `error`; done when it serves.

        Where that was begun already it is the same. Raises `error` when the group's restarts are used up, and what
        ended an earlier attempt.
        """
        task = self._replacements.get(index)
        if task is not None and not task.done():
            return task
        if task is not None and not task.cancelled():
            task.result()
        if self.workers[index] is not dead:
            done = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        self._restarts.spend(error)
        task = asyncio.create_task(self._replaced(index, dead))
        # Nobody may be waiting for it when it fails; whoever comes next is told.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._replacements[index] = task
        return task

    async def restart_worker(self, index: int, dead: Any, error: ActorDiedError) -> None:
        """`replace`, and wait until the new actor is prepared to serve."""
        await asyncio.shield(self.replace(index, dead, error))

    async def someone_serves(self) -> None:
        """Wait while all workers are absent; raises what ends a replacement."""
        while len(self.unavailable) == len(self.workers):
            done, _ = await asyncio.wait(self._replacements.values(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _replaced(self, index: int, dead: Any) -> None:
        while self.workers[index] is dead:
            await death_is_known(dead, self.deadline_s)
            self._kill(dead)
            worker = self._spawn(index)
            try:
                await self._find_room(index)
                await self.result(worker.ping.remote(), index)
                await self.prepare(worker, index)
            except LearnerLostError:
                # There are no weights to give it; with those that come it is tried again.
                self._kill(worker)
                del self._replacements[index]
                raise
            except ActorDiedError as again:
                dead = self.workers[index] = worker
                self._restarts.spend(again)
            except BaseException:
                self._kill(worker)
                raise
            else:
                self.workers[index] = worker

    async def _find_room(self, index: int) -> None:
        """Wait until a new actor has a node: without end while others serve, else for `deadline_s`."""
        if self._placement is None:
            return
        begun: float | None = None
        warned = False
        while not await self._placement.is_placed(index):
            if not warned:
                left = len(self.workers) - len(self.unavailable)
                logger.warning("no node has room for %s-%d: continuing with %d of its group", self.role, index, left)
                warned = True
            if len(self.unavailable) < len(self.workers):
                begun = None
            else:
                begun = begun or time.monotonic()
                if time.monotonic() - begun > self.deadline_s:
                    raise self._placement.no_room(time.monotonic() - begun)
            await asyncio.sleep(LOOK_S)
        if warned:
            logger.warning("%s-%d has a node again", self.role, index)

    async def prepare(self, worker: Any, index: int) -> None:
        """What a new actor needs in the middle of a run before it serves; nothing by default."""

    async def restart(self, error: ActorDiedError) -> None:
        """Put new actors in the place of all, because `error` made the group useless; await `ready` afterwards."""
        self._restarts.spend(error)
        await asyncio.gather(*(death_is_known(worker, self.deadline_s) for worker in self.workers))
        for worker in self.workers:
            self._kill(worker)
        self._spawn_all(len(self.workers))

    async def stop(self) -> None:
        """Ask all actors to stop what they run."""
        await self.all(lambda worker: worker.stop.remote())

    def shutdown(self) -> None:
        """End all actors, and give back their room."""
        for task in self._replacements.values():
            task.cancel()
        for worker in self.workers:
            self._kill(worker)
        self.workers = []
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    def _kill(self, worker: Any) -> None:
        ray.kill(worker, no_restart=True)
