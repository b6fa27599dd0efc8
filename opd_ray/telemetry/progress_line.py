"""One line that says how far a long piece of work is: rewritten in place on a terminal, now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

_TENTHS = 10
_REFRESH_S = 0.2


class ProgressLine:
    """``math500: 120 of 4,000 answers (0:31)``, on `stream`; a stream that fails turns it off, never the work."""

    def __init__(self, stream: TextIO, enabled: bool = True, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._enabled = enabled
        self._clock = clock
        self._what = ""
        self._began = self._shown_at = clock()
        self._tenth = -1
        self._width = 0

    def show(self, what: str, done: int, total: int, unit: str) -> None:
        """`done` of `total` units of `what` are done; another `what` begins a new line."""
        now = self._clock()
        if what != self._what:
            self.end()
            self._what, self._began, self._tenth = what, now, -1
        tenth = done * _TENTHS // max(total, 1)
        in_place = self._is_terminal()
        due = now - self._shown_at >= _REFRESH_S if in_place else tenth > self._tenth
        if not due and done < total or tenth == self._tenth == _TENTHS:
            return
        self._tenth, self._shown_at = tenth, now
        minutes, seconds = divmod(int(now - self._began), 60)
        text = f"{what}: {done:,} of {total:,} {unit} ({minutes}:{seconds:02})"
        self._write(f"\r{text:<{self._width}}" if in_place else f"{text}\n")
        self._width = len(text) if in_place else 0

    def end(self) -> None:
        """Leave the cursor below the line."""
        if self._width:
            self._write("\n")
        self._width, self._what = 0, ""

    def _is_terminal(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    def _write(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone, the stream is closed
            self._enabled = False
