"""Payloads written and read by Ray tasks, several at once, on the nodes that hold them.

The driver hands out references and paths and gets checksums back: payload bytes never pass it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.experimental
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_ray.cluster.remote_calls import remote_result
from opd_ray.cluster.worker_group import PAYLOAD_ENV
from opd_ray.errors import ActorDiedError, CheckpointError, PayloadLostError
from opd_ray.replay.payload_io import PayloadFile, read_payload, write_payload

PAYLOADS_PER_TASK = 32
_TASKS_PER_NODE = 2
_NAME = "payload-task"


class RayPayloads:
    """The `PayloadIO` of a run; a task that gives no answer in `deadline_s` ends it with `DeadlineError`."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        # Without CPUs of their own: the actors of a run hold all of them.
        self._write: Any = ray.remote(num_cpus=0, max_retries=1)(_write)
        env = {"env_vars": PAYLOAD_ENV}
        self._read: Any = ray.remote(num_cpus=0, max_retries=1, runtime_env=env)(_read)

    async def write(self, refs: Sequence[Any], paths: Sequence[Path]) -> list[str | None]:
        """See `PayloadIO.write`."""
        nodes = await asyncio.to_thread(_nodes_of, refs)
        permits = asyncio.Semaphore(_TASKS_PER_NODE * max(1, len(set(nodes.values()))))
        checksums: list[str | None] = [None] * len(refs)

        async def write_some(places: list[int], node: str | None) -> None:
            async with permits:
                found = await self._write_on(node, [refs[i] for i in places], [paths[i] for i in places])
            for place, checksum in zip(places, found, strict=True):
                checksums[place] = checksum

        try:
            async with asyncio.TaskGroup() as tasks:
                for node in sorted(set(nodes.values()), key=str):
                    places = [place for place in range(len(refs)) if nodes[place] == node]
                    for start in range(0, len(places), PAYLOADS_PER_TASK):
                        tasks.create_task(write_some(places[start : start + PAYLOADS_PER_TASK], node))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return checksums

    async def _write_on(self, node: str | None, refs: list[Any], paths: list[Path]) -> list[str | None]:
        """Checksums of payloads that are on one node; of several, the lost ones are found one by one."""
        strategy = NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT"
        task = self._write.options(scheduling_strategy=strategy).remote([str(path) for path in paths], *refs)
        try:
            checksums: list[str | None] = await remote_result(task, _NAME, self._deadline_s)
        except (PayloadLostError, ActorDiedError):
            if len(refs) == 1:
                return [None]
            single = zip(refs, paths, strict=True)
            return [(await self._write_on(node, [ref], [path]))[0] for ref, path in single]
        except RayError as error:
            raise CheckpointError(
                f"payloads cannot be written by a Ray task ({type(error).__name__}): start again"
            ) from error
        await asyncio.to_thread(_require_visible, paths)
        return checksums

    async def read(self, files: Sequence[PayloadFile]) -> list[Any]:
        """See `PayloadIO.read`; the payloads are spread over the nodes."""
        permits = asyncio.Semaphore(_TASKS_PER_NODE * len(ray.nodes()))  # type: ignore[no-untyped-call]

        async def read_some(part: Sequence[PayloadFile]) -> list[Any]:
            async with permits:
                options = {"num_returns": 1 + len(part), "scheduling_strategy": "SPREAD"}
                checked, *refs = self._read.options(**options).remote(part)
                try:
                    await remote_result(checked, _NAME, self._deadline_s)
                except PayloadLostError as error:
                    raise CheckpointError(str(error)) from error
                except RayError as error:
                    raise CheckpointError(
                        f"payloads cannot be read by a Ray task ({type(error).__name__}): start again"
                    ) from error
                return list(refs)

        parts = [files[start : start + PAYLOADS_PER_TASK] for start in range(0, len(files), PAYLOADS_PER_TASK)]
        found = await asyncio.gather(*(read_some(part) for part in parts))
        return [ref for refs in found for ref in refs]

    def read_later(self, files: Sequence[PayloadFile]) -> list[Any]:
        """See `PayloadIO.read_later`."""
        return [self._read.options(num_returns=2).remote([file])[1] for file in files]


def _write(paths: list[str], *payloads: Any) -> list[str]:
    return [write_payload(payload, Path(path)) for path, payload in zip(paths, payloads, strict=True)]


def _read(files: Sequence[PayloadFile]) -> tuple[Any, ...]:
    return len(files), *(read_payload(file) for file in files)


def _nodes_of(refs: Sequence[Any]) -> dict[int, str | None]:
    """By place, the id of a node that holds the payload; None where Ray knows none."""
    if not refs:
        return {}
    places: dict[Any, dict[str, Any]] = ray.experimental.get_object_locations(list(refs))
    return {place: next(iter(places.get(ref, {}).get("node_ids", [])), None) for place, ref in enumerate(refs)}


def _require_visible(paths: Sequence[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{missing[0]} was written on another node and is not seen here: choose a runs_dir on storage that all "
            "nodes share under the same path"
        )
