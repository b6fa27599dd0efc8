r"""Symbolic comparison of answers with math-verify, in processes that can be killed.

An answer is hostile until proved otherwise: ``9^{9^{9^9}}`` keeps a processor busy for ever, inside C code that no
Python exception reaches. So each answer has a budget of processor time and memory, in a process (`verifier_worker`)
that dies where it is overrun and is replaced; the answer then counts as `timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from opd_ray.errors import VerifierError
from opd_ray.evaluation.verdict import Verdict
from opd_ray.evaluation.verifier_worker import MEMORY, READY

Pair = tuple[str, str]
"""A given answer and its reference."""

MAX_ANSWER_CHARS = 10_000
"""Longer answers are not handed to the parser; the longest reference of the benchmarks in `conf/` has 60 characters."""

START_S = 120.0
"""Longest wait for a process to be ready, seconds."""

ANSWERS_PER_PROCESS = 500
"""A process is replaced after so many answers: computer algebra keeps what it has seen in memory."""

_WORKER = Path(__file__).with_name("verifier_worker.py")
_MAX_LINE = 1 << 20
_PATIENCE = 4.0


@dataclass(frozen=True, slots=True)
class Verification:
    """How answers are verified: processes at a time; seconds of processor time and bytes of memory for an answer."""

    num_workers: int = 2
    budget_s: float = 5.0
    max_bytes: int = 1 << 30


async def verify(
    pairs: Iterable[Pair], settings: Verification, on_done: Callable[[Pair], None] | None = None
) -> dict[Pair, Verdict]:
    """The verdict of each different pair: `correct`, `wrong`, `unparseable` or `timeout`.

    Processes live as long as the call: however it ends, none is left. The time of a pair is bounded by four times its
    budget, of which a machine with nothing else to do uses one. `on_done` is told each pair as it is done.

    Raises:
        VerifierError: a process does not start.
    """
    waiting = deque(dict.fromkeys(pairs))
    verdicts: dict[Pair, Verdict] = {}

    async def serve() -> None:
        async with _Place(settings) as place:
            while waiting:
                pair = waiting.popleft()
                verdicts[pair] = await place.verdict(pair)
                if on_done is not None:
                    on_done(pair)

    try:
        # It cancels each place once, and waits: a second cancellation would meet a place that is ending its process.
        async with asyncio.TaskGroup() as places:
            for _ in range(min(settings.num_workers, len(waiting))):
                places.create_task(serve())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return verdicts


class _Place:
    """Room for one process, which is started when it is needed; leaving it ends the process."""

    def __init__(self, settings: Verification) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._num_answers = 0

    async def __aenter__(self) -> _Place:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._end()

    async def verdict(self, pair: Pair) -> Verdict:
        """One pair's verdict; a process that does not survive it is replaced before the next one."""
        if max(map(len, pair)) > MAX_ANSWER_CHARS:
            return Verdict.unparseable
        if self._process is None or self._num_answers >= ANSWERS_PER_PROCESS:
            await self._end()
            await self._start()
        self._num_answers += 1
        word = await self._ask(pair)
        if word in ("", MEMORY):
            await self._end()
            return Verdict.timeout
        return Verdict(word)

    async def _start(self) -> None:
        settings = self._settings
        # -P: the folder of the script is no place to import from. A session of its own: Ctrl-C is not for it.
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-P", str(_WORKER), str(settings.budget_s), str(settings.max_bytes)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                limit=_MAX_LINE,
            )
        )
        try:
            self._process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Half a start cannot be ended; a whole one can.
            self._process = await starting
            raise
        except OSError as error:
            raise VerifierError(f"the answer verifier does not start ({error}): make room and start again") from error
        self._num_answers = 0
        if (word := await self._line(START_S)) != READY:
            reason = word or "it says nothing"
            raise VerifierError(f"the answer verifier does not start ({reason[:200]}): make math-verify run here")

    async def _ask(self, pair: Pair) -> str:
        """The process's answer; "" where it died or gave none in time."""
        if self._process is None or self._process.stdin is None:
            return ""
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps(pair).encode() + b"\n")
            await self._process.stdin.drain()
        # The process ends itself when its own time is used up; the wall clock is for machines with other work.
        return await self._line(_PATIENCE * self._settings.budget_s)

    async def _line(self, seconds: float) -> str:
        if self._process is None or self._process.stdout is None:
            return ""
        try:
            async with asyncio.timeout(seconds):
                return (await self._process.stdout.readline()).decode().strip()
        except (TimeoutError, ConnectionError):
            return ""

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            # Not process.kill(), which may take its exit code away from asyncio's own watcher.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        # Its pipes are seen to their end: what is left of them would complain when the event loop closes.
        if process.stdin is not None and process.stdout is not None:
            process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await process.stdout.read()
                await process.stdin.wait_closed()
        await process.wait()
