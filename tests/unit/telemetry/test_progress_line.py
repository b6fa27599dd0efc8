import io
import re

import pytest

from opd_ray.telemetry.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_for_every_tenth() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, clock=lambda: 0.0)
    for done in range(0, 1001, 5):
        line.show("math500: sampling", done, 1000, "answers")
    line.show("math500: sampling", 1000, 1000, "answers")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "math500: sampling: 0 of 1,000 answers, 0:00:00 elapsed"
    assert lines[-1] == "math500: sampling: 1,000 of 1,000 answers, 0:00:00 elapsed"


def test_a_terminal_has_one_bar_for_each_kind_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    now = [0.0]
    stream = Terminal()
    line = ProgressLine(stream, clock=lambda: now[0])
    for done in (0, 25, 50):
        line.show("math500: sampling", done, 100, "answers")
        now[0] += 61.0
    line.show("math500: verifying", 100, 100, "answers")
    line.end()
    # Rows are redrawn in place: what is between two line feeds ends with what stays.
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in stream.getvalue().splitlines()]
    sampled, verified = [row.split("\r")[-1] for row in rows if "answers" in row]
    assert sampled.startswith("math500: sampling ━") and sampled.endswith(
        " 50/100 answers 0:03:03 elapsed, 0:02:02 left"
    )
    assert verified.startswith("math500: verifying ━") and "100/100 answers" in verified
    assert len(sampled) <= 80 and len(verified) <= 80


def test_off_and_a_closed_stream_do_no_harm() -> None:
    stream = io.StringIO()
    ProgressLine(stream, enabled=False).show("a", 1, 1, "answers")
    assert stream.getvalue() == ""
    stream.close()
    ProgressLine(stream).show("a", 1, 1, "answers")
