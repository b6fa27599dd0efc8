"""The progress display of a run and of an evaluation: drawn by rich on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Tasks
from rich.table import Column
from rich.text import Text

from opd_ray.telemetry.metrics import Metric
from opd_ray.types import Histogram

_PACE_WINDOW_S = 3600.0
"""The time left follows the pace of this time; steps that take longer have no estimate."""

_REFRESHES_PER_S = 4
_PLAIN_LINES = 10
_PASS_AT = re.compile(r"evaluation/pass_at_([0-9]+)")

# In the order in which they are shown; `evaluation` is pass@k.
_FIGURES = {
    "learner/loss/mean": "loss {:.4f}",
    "evaluation": "{}",
    "replay/staleness/max": "staleness {:.0f}",
    "gate/value/p05": "gate p05 {:.3f}",
    "time/tokens_per_s": "{:,.0f} tokens/s",
}


class Progress:
    """Shows phases (``starting engines``), then a bar of `total` optimizer steps with the latest figures.

    On a terminal the display stays at its place, and what is written to ``sys.stdout`` or ``sys.stderr``
    scrolls above it. Elsewhere (CI, a file) there is one plain line for every tenth of the steps. A stream
    that fails turns the display off, never the run. Use it as a context manager, or call `close`.

    Args:
        total: optimizer steps of the run.
        stream: where to show it.
        enabled: False shows nothing at all.
        clock: seconds, monotonic.
    """

    def __init__(
        self, total: int, stream: TextIO, enabled: bool = True, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = _tasks(_counted_columns(), clock)
        self._steps.add_task("step", total=total, visible=False)
        (self._run,) = self._steps.tasks
        spinner = SpinnerColumn("dots" if (stream.encoding or "").lower().startswith("utf") else "line")
        # A column that wraps: a long phase keeps its link and its seconds on a narrow terminal.
        text = TextColumn("{task.description}  {task.elapsed:.0f} s", table_column=Column())
        self._phases = _tasks([spinner, text], clock, expand=False)
        self._phase: TaskID | None = None
        self._figures: dict[str, str] = {}
        self._tenths = _Tenths()
        self._screen = _Screen(stream, enabled, self._draw)

    def phase(self, text: str) -> None:
        """Begin a phase; the one before it ends. Its duration is shown."""
        self._end_phase()
        self._phase = self._phases.add_task(text, total=None)
        self._screen.begin(text)

    def update(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Report that `step` steps are done; ends a phase. Figures that `metrics` lacks keep their value.

        The phase that waits for a step ("training") ends without a line of its own.
        """
        is_first = not self._run.visible
        self._end_phase(is_shown=step <= self._run.completed)
        self._steps.update(self._run.id, completed=step, visible=True)
        self._figures.update(_figures(metrics))
        if is_first:
            self._screen.redraw()
        if step and self._tenths.reached(step, self._run.total or 0):
            texts = [f"step {step}/{self._run.total:.0f}", *self._ordered_figures(), _times(self._run)]
            self._screen.plain(", ".join(texts))

    def close(self) -> None:
        """End the display and leave the cursor below it; closing twice does no harm."""
        self._end_phase()
        self._screen.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_phase(self, is_shown: bool = True) -> None:
        if self._phase is None:
            return
        (ended,) = self._phases.tasks
        self._phases.remove_task(self._phase)
        self._phase = None
        if is_shown:
            self._screen.end(ended.description, ended.elapsed or 0.0)
        else:
            self._screen.redraw()

    def _ordered_figures(self) -> list[str]:
        return [self._figures[key] for key in _FIGURES if key in self._figures]

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._run.visible:
            parts += [self._steps, Text("  ".join(self._ordered_figures()), no_wrap=True, overflow="ellipsis")]
        if self._phase is not None:
            parts.append(self._phases)
        return Group(*parts)


class ProgressLine:
    """One bar, ``math500: sampling ... 120/4000 answers``; a stream that fails turns it off, never the work."""

    def __init__(self, stream: TextIO, enabled: bool = True, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._enabled = enabled
        self._clock = clock
        self._screen: _Screen | None = None
        self._tasks = _tasks([], clock)
        self._tenths = _Tenths()

    def show(self, what: str, done: int, total: int, unit: str) -> None:
        """`done` of `total` units of `what` are done; another `what` begins a new line."""
        if self._screen is None or [what] != [task.description for task in self._tasks.tasks]:
            self.end()
            self._tasks = _tasks(_counted_columns(TextColumn(unit)), self._clock)
            self._tasks.add_task(what, total=total)
            self._tenths = _Tenths()
            self._screen = _Screen(self._stream, self._enabled, self._tasks.get_renderable)
        (task,) = self._tasks.tasks
        self._tasks.update(task.id, completed=done)
        if self._tenths.reached(done, total):
            self._screen.plain(f"{what}: {done:,} of {total:,} {unit}, {_times(task)}")

    def end(self) -> None:
        """Leave the cursor below the line."""
        if self._screen is not None:
            self._screen.close()
        self._screen = None


class _Screen:
    """A display that rich redraws on a terminal, whole lines on another stream, nothing when off or broken."""

    def __init__(self, stream: TextIO, enabled: bool, draw: Callable[[], RenderableType]) -> None:
        self._stream = stream
        self._is_on = enabled
        self._live: Live | None = None
        if enabled and _is_terminal(stream):
            console = Console(file=stream, force_terminal=True, highlight=False, emoji=False, markup=False)
            self._live = Live(
                console=console,
                get_renderable=draw,
                refresh_per_second=_REFRESHES_PER_S,
                # Only what leads to a terminal anyway: a redirected stdout keeps its file.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            with self._off_when_broken():
                self._live.start()

    def plain(self, line: str) -> None:
        """Write a line where nothing is redrawn."""
        if self._live is None and self._is_on:
            with self._off_when_broken():
                self._stream.write(line + "\n")
                self._stream.flush()

    def redraw(self) -> None:
        """Draw at once. To be called when the number of rows changes, before anything is written above them."""
        if self._live is not None and self._is_on:
            with self._off_when_broken():
                self._live.refresh()

    def begin(self, phase: str) -> None:
        """Show at once that a phase begins, so that a hang shows where it is."""
        self.plain(f"{phase} ...")
        self.redraw()

    def end(self, phase: str, seconds: float) -> None:
        """Leave a line with the duration of a phase, above what is redrawn."""
        self.plain(f"{phase}: {seconds:.1f} s")
        self.redraw()
        if self._live is not None and self._is_on:
            with self._off_when_broken():
                self._live.console.print(Text.assemble(phase, (f"  {seconds:.1f} s", "dim")))

    def close(self) -> None:
        """Draw the last state and release the terminal."""
        if self._live is not None and self._is_on:
            with self._off_when_broken():
                self._live.stop()
        self._is_on = False

    @contextmanager
    def _off_when_broken(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the terminal is gone, the stream is closed
            self._is_on = False


class _Tenths:
    """Tells when the first unit and each further tenth of the work is reached."""

    def __init__(self) -> None:
        self._shown = -1

    def reached(self, done: float, total: float) -> bool:
        """Whether `done` of `total` is a tenth that was not seen before."""
        tenth = int(done * _PLAIN_LINES // max(total, 1))
        is_new = tenth > self._shown
        self._shown = max(self._shown, tenth)
        return is_new


def _tasks(columns: list[ProgressColumn], clock: Callable[[], float], expand: bool = True) -> Tasks:
    """Rich's state and table of tasks; what draws them is the `Live` of a `_Screen`."""
    return Tasks(*columns, get_time=clock, speed_estimate_period=_PACE_WINDOW_S, auto_refresh=False, expand=expand)


def _counted_columns(*units: ProgressColumn) -> list[ProgressColumn]:
    left = [TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), *units]
    return [*left, TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")]


def _times(task: Task) -> str:
    """Time since the start and time left, "0:01:10 elapsed, 0:02:00 left"."""
    left = None if task.finished else task.time_remaining
    elapsed = f"{timedelta(seconds=int(task.elapsed or 0))} elapsed"
    return elapsed if left is None else f"{elapsed}, {timedelta(seconds=int(left))} left"


def _figures(metrics: Mapping[str, Metric]) -> dict[str, str]:
    """The figures that have a place here, as texts; histograms have none."""
    numbers = {key: float(value) for key, value in metrics.items() if not isinstance(value, Histogram)}
    found = {key: text.format(numbers[key]) for key, text in _FIGURES.items() if key in numbers}
    sizes = [int(match.group(1)) for match in map(_PASS_AT.fullmatch, numbers) if match]
    if sizes:
        k = 8 if 8 in sizes else max(sizes)
        found["evaluation"] = f"pass@{k} {numbers[f'evaluation/pass_at_{k}']:.3f}"
    return found


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except ValueError:  # closed
        return False
