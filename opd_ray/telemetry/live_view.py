"""The progress display on a terminal, drawn with rich."""

from __future__ import annotations

import sys
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_REFRESHES_PER_S = 4


class LiveState(Protocol):
    """What the display reads each time it is drawn (`progress.ProgressState`)."""

    total: int
    step: int | None
    phase: tuple[str, float] | None

    @property
    def phase_s(self) -> float:
        """Seconds since the phase began."""

    def figures(self) -> list[str]:
        """The latest figures as texts."""

    def times(self) -> str:
        """Time since the start and time left."""


class LiveView:
    """A bar with figures below it and a spinner beside a phase, redrawn in place four times a second."""

    def __init__(self, state: LiveState, stream: TextIO) -> None:
        self._state = state
        self._console = Console(file=stream, force_terminal=True, highlight=False, emoji=False, markup=False)
        ascii_only = not self._console.encoding.lower().startswith("utf")
        self._spinner = Spinner("line" if ascii_only else "dots", style="cyan")
        self._closed = False
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=_REFRESHES_PER_S,
            # Only what leads to a terminal anyway: a redirected stdout keeps its file.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def phase_began(self, text: str) -> None:
        """Show the phase at once."""
        self._live.refresh()

    def phase_ended(self, text: str, seconds: float) -> None:
        """Leave a line above the display, from which the phase goes."""
        self._live.refresh()
        self._console.print(Text.assemble(text, (f"  {seconds:.1f} s", "dim")))

    def updated(self) -> None:
        """Nothing to do: the state is read at the next refresh."""

    def close(self) -> None:
        """Draw the last state and release the terminal."""
        self._closed = True
        self._live.stop()

    def _draw(self) -> RenderableType:
        state = self._state
        parts: list[RenderableType] = []
        if state.step is not None:
            parts += [
                self._bar(state.step),
                Text("  ".join(state.figures()), no_wrap=True, overflow="ellipsis"),
            ]
        if state.phase is not None and not self._closed:
            self._spinner.update(text=Text.assemble(state.phase[0], (f"  {state.phase_s:.0f} s", "dim")))
            parts.append(self._spinner)
        return Group(*parts)

    def _bar(self, step: int) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        total = self._state.total
        label = Text(f"step {step:>{len(str(total))}}/{total}", style="bold")
        grid.add_row(label, ProgressBar(total=total, completed=step), Text(self._state.times()))
        return grid
