"""A number of bytes with where it comes from, and the needs of one worker as a list of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

GIB = 2**30


class Origin(Enum):
    """How far a number can be trusted."""

    measured = "measured"  # read off hardware, or off a process by benchmarks/bench_plan.py
    computed = "computed"  # follows from shapes and settings
    assumed = "assumed"  # a guess, or a setting taken as if it were used to the full


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes that one thing takes.

    `expected` is what a run with responses of full length takes. `least` is what it takes whatever it meets, and is
    never above `expected`: a refusal counts nothing else. `how` says in words where the bytes come from.
    """

    name: str
    expected: float
    least: float
    origin: Origin
    how: str

    @classmethod
    def certain(cls, name: str, num_bytes: float, how: str) -> Amount:
        """Bytes that are there in every run."""
        return cls(name, num_bytes, num_bytes, Origin.computed, how)

    @classmethod
    def possible(cls, name: str, num_bytes: float, how: str, origin: Origin = Origin.computed) -> Amount:
        """Bytes that depend on what the run meets, 0 at the least."""
        return cls(name, num_bytes, 0.0, origin, how)


@dataclass(frozen=True, slots=True)
class WorkerNeed:
    """What one worker takes: `device` on its GPU (nothing without one), `host` in its node's memory.

    It may take `device_share` of a GPU's memory, and takes `filling` of what its needs leave of that. `actions` are
    what lowers the need, most effective first.
    """

    role: str
    count: int
    gpus: float
    cpus: float
    device: tuple[Amount, ...] = ()
    host: tuple[Amount, ...] = ()
    actions: str = ""
    notes: tuple[str, ...] = ()
    device_share: float = 1.0
    filling: tuple[Amount, ...] = ()


def expected(amounts: Iterable[Amount]) -> float:
    """Sum of the expected bytes."""
    return sum(amount.expected for amount in amounts)


def least(amounts: Iterable[Amount]) -> float:
    """Sum of the least bytes."""
    return sum(amount.least for amount in amounts)


def gib(num_bytes: float) -> str:
    """Bytes in GiB with one decimal; smaller ones in MiB or KiB."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB" if num_bytes else "0"
