"""Groups of Ray actors: creation, names, thread pools, deadlines, and what becomes of their errors."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError, RayTaskError

from opd_ray.errors import ActorDiedError, ActorError, DeadlineError, OpdError
from opd_ray.placement import Share

logger = logging.getLogger(__name__)

# Handed on to workers where the driver has them set.
_INHERITED = ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "VLLM_LOGGING_LEVEL")

# For workers that run whole models forward and backward: glibc keeps the memory of freed tensors. To have the pages of
# every activation and gradient anew takes several percent of a teacher's time, and a third of an optimizer step.
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
        # Ray hands results under 100 KB to the caller itself: payload must not take that way through the driver.
        "RAY_max_direct_call_object_size": "1024",
    }
    if share.gpus == 0:
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Compiling the sampler takes 20 s at the first call, and is not faster afterwards.
            "TORCHDYNAMO_DISABLE": "1",
            "DS_ACCELERATOR": "cpu",
        }
    return env | {name: os.environ[name] for name in _INHERITED if name in os.environ}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a group's actors are made; `args` has one tuple of constructor arguments for each."""

    actor_class: Any
    args: tuple[tuple[Any, ...], ...]
    options: dict[str, Any]


class WorkerGroup:
    """Some equal actors; owns their handles, replaces the dead, and ends them.

    `role` is what errors and the dashboard call them; at most `max_restarts` actors are replaced in a run.
    """

    def __init__(self, role: str, deadline_s: float, max_restarts: int = 0) -> None:
        self.role = role
        self.deadline_s = deadline_s
        self.num_restarts = 0
        self.workers: list[Any] = []
        self._max_restarts = max_restarts
        self._recipe: _Recipe | None = None
        self._locks: list[asyncio.Lock] = []

    def start(self, worker_class: type, share: Share, args: Sequence[tuple[Any, ...]], env: dict[str, str]) -> None:
        """Create one actor for each tuple of constructor arguments, named ``<role>-<index>``; returns at once."""
        options = {
            "num_cpus": share.ray_cpus,
            "num_gpus": share.gpus,
            "runtime_env": {"env_vars": worker_env(share) | env},
            "max_restarts": 0,
        }
        self._recipe = _Recipe(ray.remote(worker_class), tuple(args), options)
        self._spawn_all(len(args))

    def _spawn_all(self, num_workers: int) -> None:
        self.workers = [self._spawn(index) for index in range(num_workers)]
        self._locks = [asyncio.Lock() for _ in self.workers]

    def _spawn(self, index: int) -> Any:
        if self._recipe is None:
            raise RuntimeError(f"the group {self.role} was not started: call start first")
        recipe = self._recipe
        return start_named(recipe.actor_class, f"{self.role}-{index}", recipe.options, recipe.args[index])

    async def ready(self) -> None:
        """Wait until every actor has been constructed."""
        await self.all(lambda worker: worker.ping.remote())

    async def all(self, call: Callable[[Any], Any]) -> list[Any]:
        """The results of ``call(worker)`` on every worker, in order."""
        return list(
            await asyncio.gather(*(self.result(call(worker), index) for index, worker in enumerate(self.workers)))
        )

    async def result(self, ref: Any, index: int) -> Any:
        """The value of one call's reference; an error becomes an `OpdError` that names the actor."""
        return await remote_result(ref, f"{self.role}-{index}", self.deadline_s)

    def lock(self, index: int) -> asyncio.Lock:
        """Held by whoever replaces a worker, or changes what it serves with."""
        return self._locks[index]

    async def revive(self, index: int, dead: Any, error: ActorDiedError) -> None:
        """Put a new actor in the place of `dead`, whose death is `error`, once it is prepared to serve.

        Returns at once if that has been done already; raises `error` when the group's restarts are used up.
        """
        async with self.lock(index):
            while self.workers[index] is dead:
                self._count_restart(error)
                self._kill(dead)
                worker = self._spawn(index)
                try:
                    await self.result(worker.ping.remote(), index)
                    await self.prepare(worker, index)
                except ActorDiedError as again:
                    error, dead, self.workers[index] = again, worker, worker
                except BaseException:
                    self._kill(worker)
                    raise
                else:
                    self.workers[index] = worker

    def _count_restart(self, error: ActorDiedError) -> None:
        if self.num_restarts >= self._max_restarts:
            raise ActorDiedError(
                f"{error}; {self.num_restarts} of group {self.role} were replaced before, faults.max_restarts="
                f"{self._max_restarts}: mend the cause, then start again with resume=auto"
            ) from error
        self.num_restarts += 1
        logger.warning("%s; it is replaced (%d of at most %d)", error, self.num_restarts, self._max_restarts)

    async def prepare(self, worker: Any, index: int) -> None:
        """What a new actor needs in the middle of a run before it serves; nothing by default."""

    async def restart(self, error: ActorDiedError) -> None:
        """Put new actors in the place of all, because `error` made the group useless; await `ready` afterwards."""
        self._count_restart(error)
        for worker in self.workers:
            self._kill(worker)
        self._spawn_all(len(self.workers))

    async def stop(self) -> None:
        """Ask all actors to stop what they run."""
        await self.all(lambda worker: worker.stop.remote())

    def shutdown(self) -> None:
        """End all actors."""
        for worker in self.workers:
            self._kill(worker)
        self.workers = []

    def _kill(self, worker: Any) -> None:
        ray.kill(worker, no_restart=True)


def start_named(actor_class: Any, name: str, options: dict[str, Any], args: Sequence[Any], **kwargs: Any) -> Any:
    """Start an actor under `name`, with something added while an actor that died still has it; returns its handle."""
    try:
        return actor_class.options(name=name, **options).remote(*args, **kwargs)
    except ActorAlreadyExistsError:
        return actor_class.options(name=f"{name}-{uuid.uuid4().hex[:4]}", **options).remote(*args, **kwargs)


async def remote_result(ref: Any, actor: str, deadline_s: float | None) -> Any:
    """Await an object reference; `deadline_s` None: as long as it takes.

    Raises the actor's own `OpdError`, `ActorDiedError` when its process ended, `DeadlineError` when it gave no answer,
    and `ActorError` when it failed in any other way.
    """
    try:
        # Not wait_for: before Python 3.12 it can swallow a cancellation that meets the result.
        async with asyncio.timeout(deadline_s):
            return await ref
    except (TimeoutError, GetTimeoutError) as error:
        raise DeadlineError(
            f"actor {actor} gave no answer in {deadline_s:g} s: look at its log in the Ray "
            "dashboard, or raise deadline_s"
        ) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OpdError):
            raise cause from None
        logger.error("actor %s failed:\n%s", actor, error)
        last = str(cause if cause is not None else error).strip().splitlines()
        raise ActorError(
            f"actor {actor} failed with {type(cause).__name__}: {last[-1] if last else ''} "
            "(the traceback is in run.log of the run folder): mend the cause and start again"
        ) from error
    except RayActorError as error:
        raise ActorDiedError(
            f"actor {actor} died ({_death_cause(error)}): look for lack of memory or a crash in the Ray dashboard's "
            "log, and start again"
        ) from error


def _death_cause(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"
