"""Reads what a machine has: memory, what of it is free, and the memory of its GPUs. Runs on any node, as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_QUERY_S = 10.0
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes; `gpus` has the memory of each GPU, and is empty where there are none or nvidia-smi is missing."""

    memory: int
    free: int
    cpus: int
    gpus: tuple[int, ...]


def read_machine() -> Machine:
    """This machine's numbers; a container's limit counts as its memory."""
    pages = os.sysconf("SC_PAGE_SIZE")
    memory = os.sysconf("SC_PHYS_PAGES") * pages
    for file in _CGROUP_LIMITS:
        memory = min(memory, _limit(Path(file), memory))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(memory, min(memory, _available(memory)), cpus, _gpu_memory())


def _limit(file: Path, default: int) -> int:
    try:
        text = file.read_text().strip()
    except OSError:
        return default
    return int(text) if text.isdecimal() else default


def _available(default: int) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return default
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else default


def _gpu_memory() -> tuple[int, ...]:
    # nvidia-smi sees all GPUs, whatever CUDA_VISIBLE_DEVICES Ray has set for a task without any.
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run(
            [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * _MIB for line in done.stdout.split() if line.isdecimal())
