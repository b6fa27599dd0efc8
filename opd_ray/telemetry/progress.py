"""What a person sees of a run: phases and a progress bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, TextIO

from opd_ray.telemetry.live_view import LiveView
from opd_ray.telemetry.metrics import Metric
from opd_ray.types import Histogram

_RATE_WINDOW = 20
"""Updates over which the time left is estimated."""

_PLAIN_LINES = 10
"""Lines that training leaves on a stream that is not a terminal, about."""

_PASS_AT = re.compile(r"evaluation/pass_at_([0-9]+)")


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
        self._state = ProgressState(total, clock)
        self._view: View | None = None
        if enabled:
            self._view = (LiveView if _is_terminal(stream) else PlainView)(self._state, stream)

    def phase(self, text: str) -> None:
        """Begin a phase; the one before it ends. Its duration is shown."""
        self._end_phase()
        self._state.begin_phase(text)
        self._show(lambda view: view.phase_began(text))

    def update(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Report that `step` steps are done; ends a phase. Figures that `metrics` lacks keep their value.

        The phase that waits for a step ("training") ends without a line of its own.
        """
        if step > (self._state.step or 0):
            self._state.end_phase()
        self._end_phase()
        self._state.update(step, metrics)
        self._show(lambda view: view.updated())

    def close(self) -> None:
        """End the display and leave the cursor below it; closing twice does no harm."""
        self._end_phase()
        self._show(lambda view: view.close())
        self._view = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_phase(self) -> None:
        ended = self._state.end_phase()
        if ended is not None:
            text, seconds = ended
            self._show(lambda view: view.phase_ended(text, seconds))

    def _show(self, show: Callable[[View], None]) -> None:
        if self._view is None:
            return
        try:
            show(self._view)
        except (OSError, ValueError):  # the terminal is gone, the stream is closed
            self._view = None


class ProgressState:
    """What there is to show: steps, times in seconds, and the latest figures as texts."""

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self.total = total
        self.step: int | None = None
        self.phase: tuple[str, float] | None = None
        self._clock = clock
        self._started = clock()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW + 1)
        self._figures: dict[str, float] = {}
        self._pass_at: tuple[int, float] | None = None

    def begin_phase(self, text: str) -> None:
        """Note the phase and when it began."""
        self.phase = (text, self._clock())

    def end_phase(self) -> tuple[str, float] | None:
        """End the phase, if there is one; returns its text and duration in seconds."""
        ended, self.phase = self.phase, None
        return None if ended is None else (ended[0], self._clock() - ended[1])

    def update(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Take the step and the figures in; histograms have no place here."""
        numbers = {key: float(value) for key, value in metrics.items() if not isinstance(value, Histogram)}
        if self.step is not None and step < self.step:
            self._marks.clear()  # steps are done again
        if self.step is None or step != self.step:
            self._marks.append((self._clock(), step))
        self.step = step
        self._figures.update({key: numbers[key] for key in _FIGURES if key in numbers})
        sizes = [int(found.group(1)) for found in map(_PASS_AT.fullmatch, numbers) if found]
        if sizes:
            k = 8 if 8 in sizes else max(sizes)
            self._pass_at = (k, numbers[f"evaluation/pass_at_{k}"])

    @property
    def elapsed_s(self) -> float:
        """Seconds since the display was made."""
        return self._clock() - self._started

    @property
    def phase_s(self) -> float:
        """Seconds since the phase began; 0 without one."""
        return 0.0 if self.phase is None else self._clock() - self.phase[1]

    @property
    def remaining_s(self) -> float | None:
        """Seconds that the steps left will take at the recent pace; None at the first step and at the end."""
        if len(self._marks) < 2 or self.step is None or self.step >= self.total:
            return None
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        pace = (last_s - first_s) / (last - first)
        return max(0.0, pace * (self.total - self.step) - (self._clock() - last_s))

    def figures(self) -> list[str]:
        """The latest figures ("loss 0.0123") in a fixed order; those never reported are left out."""
        shown = {key: _FIGURES[key].format(value) for key, value in self._figures.items()}
        if self._pass_at is not None:
            k, value = self._pass_at
            shown["evaluation"] = f"pass@{k} {value:.3f}"
        return [shown[key] for key in _ORDER if key in shown]

    def times(self) -> str:
        """Time since the start and time left, "1:10 elapsed, 2:00 left"."""
        left = self.remaining_s
        return f"{clock_time(self.elapsed_s)} elapsed" + ("" if left is None else f", {clock_time(left)} left")


_FIGURES = {
    "learner/loss/mean": "loss {:.4f}",
    "replay/staleness/max": "staleness {:.0f}",
    "gate/value/p05": "gate p05 {:.3f}",
    "time/tokens_per_s": "{:,.0f} tokens/s",
}
_ORDER = (
    "learner/loss/mean",
    "evaluation",
    "replay/staleness/max",
    "gate/value/p05",
    "time/tokens_per_s",
)


class View(Protocol):
    """How the state is shown."""

    def phase_began(self, text: str) -> None:
        """Show the beginning of a phase."""

    def phase_ended(self, text: str, seconds: float) -> None:
        """Show how long a phase took."""

    def updated(self) -> None:
        """Show the state after an update."""

    def close(self) -> None:
        """End the display."""


class PlainView:
    """Whole lines without control codes, for files and logs."""

    def __init__(self, state: ProgressState, stream: TextIO) -> None:
        self._state = state
        self._stream = stream
        self._tenth = -1

    def phase_began(self, text: str) -> None:
        """Write that the phase begins, so that a hang shows where it is."""
        self._write(f"{text} ...")

    def phase_ended(self, text: str, seconds: float) -> None:
        """Write how long the phase took."""
        self._write(f"{text}: {seconds:.1f} s")

    def updated(self) -> None:
        """Write a line at the first step and at every tenth of the steps."""
        state = self._state
        if not state.step:
            return
        tenth = state.step * _PLAIN_LINES // max(state.total, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            self._write(", ".join([f"step {state.step}/{state.total}", *state.figures(), state.times()]))

    def close(self) -> None:
        """Nothing to end."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def clock_time(seconds: float) -> str:
    """Format a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except ValueError:  # closed
        return False
