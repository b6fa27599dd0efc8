"""Groups of Ray actors: creation, names, thread pools, deadlines, and what becomes of their errors."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from opd_ray.errors import ActorError, OpdError
from opd_ray.placement import Share

logger = logging.getLogger(__name__)

# Handed on to workers where the driver has them set.
_INHERITED = ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "VLLM_LOGGING_LEVEL")


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


class WorkerGroup:
    """Some equal actors; owns their handles and ends them. `role` is what errors and the dashboard call them."""

    def __init__(self, role: str, deadline_s: float) -> None:
        self.role = role
        self.deadline_s = deadline_s
        self.workers: list[Any] = []

    def start(self, worker_class: type, share: Share, args: Sequence[tuple[Any, ...]], env: dict[str, str]) -> None:
        """Create one actor for each tuple of constructor arguments, named ``<role>-<index>``; returns at once."""
        actor_class: Any = ray.remote(worker_class)
        for index, worker_args in enumerate(args):
            options = {
                "name": f"{self.role}-{index}",
                "num_cpus": share.ray_cpus,
                "num_gpus": share.gpus,
                "runtime_env": {"env_vars": worker_env(share) | env},
                "max_restarts": 0,
            }
            self.workers.append(actor_class.options(**options).remote(*worker_args))

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

    async def stop(self) -> None:
        """Ask all actors to stop what they run."""
        await self.all(lambda worker: worker.stop.remote())

    def shutdown(self) -> None:
        """End all actors."""
        for worker in self.workers:
            ray.kill(worker, no_restart=True)
        self.workers = []


async def remote_result(ref: Any, actor: str, deadline_s: float) -> Any:
    """Await an object reference; raises the actor's own `OpdError`, or `ActorError` when it died, failed or hung."""
    try:
        # Not wait_for: before Python 3.12 it can swallow a cancellation that meets the result.
        async with asyncio.timeout(deadline_s):
            return await ref
    except (TimeoutError, GetTimeoutError) as error:
        raise ActorError(
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
        raise ActorError(
            f"actor {actor} died ({_death_cause(error)}): look for lack of memory or a crash in the Ray dashboard's "
            "log, and start again"
        ) from error


def _death_cause(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"
