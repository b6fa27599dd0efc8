"""CPU seconds and memory of the processes of a run: the driver, Ray's own, the fake actors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

GROUPS = {"ray::": "actors", "raylet/raylet": "raylet", "gcs_server": "gcs"}


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds since their start; `driver_loop` is the driver's main thread alone, where the controller runs."""

    at: float
    cpu_s: dict[str, float]

    def since(self, before: Usage) -> dict[str, float]:
        """CPU seconds between two readings."""
        return {name: self.cpu_s[name] - before.cpu_s.get(name, 0.0) for name in self.cpu_s}


def own_cpu() -> dict[str, float]:
    """CPU seconds of the driver's main thread, whichever thread asks, and of the whole driver."""
    main_thread = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
    return {"driver_loop": time.clock_gettime(main_thread), "driver": time.process_time()}


def _processes() -> Iterator[tuple[str, psutil.Process]]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            for start, name in GROUPS.items():
                if start in command:
                    yield name, process
                    break


class Probe:
    """Looks at the processes that are there now."""

    def __init__(self) -> None:
        self._processes = [*_processes()]

    def usage(self) -> Usage:
        """CPU seconds by group; the driver's with all of its threads."""
        cpu_s = own_cpu()
        for name, process in self._processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                cpu_s[name] = cpu_s.get(name, 0.0) + times.user + times.system
        return Usage(time.monotonic(), cpu_s)

    def memory(self) -> dict[str, float]:
        """MiB by group that would be free without it (for actors: the mean), and how many actors there are."""
        found: dict[str, list[float]] = {}
        for name, process in [("driver", psutil.Process()), *self._processes]:
            with contextlib.suppress(psutil.Error):
                found.setdefault(name, []).append(process.memory_full_info().uss / 2**20)
        actors = found.pop("actors", [0.0])
        sums = {f"{name}_mib": sum(values) for name, values in found.items()}
        return sums | {"actor_mean_mib": sum(actors) / len(actors), "num_actors": float(len(actors))}


def object_store() -> dict[str, float]:
    """MiB and number of objects in this machine's part of Ray's object store."""
    import ray
    from ray._private.internal_api import node_stats

    ask: Any = node_stats
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    stats = ask(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats
    return {"mib": stats.object_store_bytes_used / 2**20, "objects": float(stats.num_local_objects)}
