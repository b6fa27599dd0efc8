"""CPU seconds of a process and its descendants by role, sampled from /proc while it runs (Linux)."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Ray calls an actor's process "ray::Class" or "ray::Class.method"; after an engine's start, vLLM may add to it.
_ACTOR = re.compile(r"ray::(\w+)")


class CpuClock:
    """Samples every `interval_s` seconds until `stop`; `seconds_between` then tells who worked how long."""

    def __init__(self, root: int, interval_s: float = 1.0) -> None:
        self._root = root
        self._interval_s = interval_s
        self._samples: list[tuple[float, dict[int, float]]] = []
        self._roles: dict[int, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self._thread.join()

    def seconds_between(self, begun: float, ended: float) -> dict[str, float]:
        """CPU seconds of each role between two wall clocks (`time.time`), to the nearest samples."""
        inside = [seconds for moment, seconds in self._samples if begun <= moment <= ended]
        if len(inside) < 2:
            return {}
        found: dict[str, float] = defaultdict(float)
        for process, role in self._roles.items():
            values = [seconds[process] for seconds in inside if process in seconds]
            if len(values) > 1:
                found[role] += values[-1] - values[0]
        return dict(found)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._samples.append((time.time(), self._sample()))

    def _sample(self) -> dict[int, float]:
        children: dict[int, list[int]] = defaultdict(list)
        seconds: dict[int, float] = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            children[int(fields[1])].append(int(folder.name))
            seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
        family, waiting = {}, [self._root]
        while waiting:
            process = waiting.pop()
            if process in seconds:
                family[process] = seconds[process]
                self._name(process)
            waiting += children[process]
        return family

    def _name(self, process: int) -> None:
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return
        actor = _ACTOR.match(command)
        if actor is not None and actor.group(1) != "IDLE":
            self._roles[process] = actor.group(1)
        else:
            self._roles.setdefault(process, "driver" if process == self._root else "ray")
