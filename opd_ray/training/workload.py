"""Load of each group's workers: work goes to the least loaded, and each step tells which group is the bottleneck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Worker:
    """`outstanding` is the cost of its open calls; `since` is when it began to be busy, or was last looked at."""

    outstanding: int = 0
    num_calls: int = 0
    since: float = 0.0
    busy_s: float = 0.0
    is_suspended: bool = False


class GroupLoad:
    """The open calls of one group's workers, and its throughput. A worker is busy while it has an open call."""

    def __init__(self, num_workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._workers = [_Worker() for _ in range(num_workers)]
        self._resumed = asyncio.Event()
        self._looked_at = clock()
        self._call_s = 0.0
        self._tokens = 0

    def least_loaded(self) -> int:
        """The worker with the least outstanding cost, the first of them; a suspended one only where all are."""
        workers = self._workers
        return min(range(len(workers)), key=lambda index: (workers[index].is_suspended, workers[index].outstanding))

    def suspend(self, worker: int) -> bool:
        """Give `worker` no more work; False if it has none already."""
        was_suspended = self._workers[worker].is_suspended
        self._workers[worker].is_suspended = True
        return not was_suspended

    def resume(self, worker: int) -> None:
        """Give `worker` work again."""
        self._workers[worker].is_suspended = False
        self._resumed.set()
        self._resumed = asyncio.Event()

    async def wait_for_worker(self) -> None:
        """Wait until some worker is not suspended."""
        while all(worker.is_suspended for worker in self._workers):
            await self._resumed.wait()

    def begin(self, worker: int, cost: int) -> None:
        """A call of `worker` is open; `cost` is in whatever unit the group's calls are compared by."""
        entry = self._workers[worker]
        if entry.num_calls == 0:
            entry.since = self._clock()
        entry.num_calls += 1
        entry.outstanding += cost

    def end(self, worker: int, cost: int) -> None:
        """A call that began with `cost` has ended."""
        entry = self._workers[worker]
        entry.num_calls -= 1
        entry.outstanding -= cost
        if entry.num_calls == 0:
            entry.busy_s += self._clock() - entry.since

    @contextmanager
    def call(self, worker: int, cost: int) -> Iterator[None]:
        """`begin` and `end` around one call."""
        self.begin(worker, cost)
        try:
            yield
        finally:
            self.end(worker, cost)

    def done(self, call_s: float, tokens: int) -> None:
        """Count a call's own seconds and its response tokens."""
        self._call_s += call_s
        self._tokens += tokens

    def take(self) -> tuple[float, float, int]:
        """Share of the time since the last `take` that its workers were busy (mean), call seconds, and tokens."""
        now = self._clock()
        for entry in self._workers:
            if entry.num_calls:
                entry.busy_s += now - entry.since
                entry.since = now
        elapsed = (now - self._looked_at) * len(self._workers)
        share = sum(entry.busy_s for entry in self._workers) / elapsed if elapsed > 0 else 0.0
        taken = share, self._call_s, self._tokens
        for entry in self._workers:
            entry.busy_s = 0.0
        self._looked_at, self._call_s, self._tokens = now, 0.0, 0
        return taken


def pipeline_metrics(groups: Mapping[str, GroupLoad]) -> dict[str, float]:
    """Metrics of all groups since the last step.

    `pipeline/wait_share/GROUP` is the share of time in which its workers had nothing to do; `pipeline/bottleneck/GROUP`
    is 1 for the group that waited least (its mean over steps: how often it was), 0 for the others.
    """
    metrics: dict[str, float] = {}
    shares = {}
    for role, group in groups.items():
        shares[role], call_s, tokens = group.take()
        metrics[f"pipeline/wait_share/{role}"] = max(0.0, 1.0 - shares[role])
        if call_s:
            metrics[f"time/{role}_busy_s"] = call_s
            metrics[f"{role}/tokens_per_s"] = tokens / call_s
    slowest = max(shares, key=lambda role: shares[role])
    return metrics | {f"pipeline/bottleneck/{role}": float(role == slowest) for role in groups}
