import io
import re
import sys

import pytest

from opd_ray.telemetry import Progress
from opd_ray.types import Histogram

METRICS = {
    "learner/loss/mean": 0.01234,
    "evaluation/pass_at_8": 0.78125,
    "replay/staleness/max": 2.0,
    "gate/value/p05": 0.9414,
    "time/tokens_per_s": 5123.4,
    "learner/grad_norm/mean": 7.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def train(progress: Progress, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, METRICS)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# not a terminal


def test_a_line_for_every_tenth_of_the_steps_without_control_codes() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream, clock=clock) as progress:
        train(progress, clock, range(1, 101))
    written = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in written] == [f"step {n}/100" for n in (1, *range(10, 101, 10))]
    assert written[5] == (
        "step 50/100, loss 0.0123, pass@8 0.781, staleness 2, gate p05 0.941, 5,123 tokens/s, "
        "0:00:50 elapsed, 0:00:50 left"
    )
    assert written[-1].endswith("0:01:40 elapsed")  # nothing left
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


@pytest.mark.parametrize(
    ("total", "steps"),
    [
        (1, [1]),
        (4, [1, 2, 3, 4]),
        (15, [1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15]),
        (250, [1, *range(25, 251, 25)]),
    ],
)
def test_short_and_long_runs(total: int, steps: list[int]) -> None:
    stream, clock = io.StringIO(), Clock()
    train(Progress(total, stream, clock=clock), clock, range(1, total + 1))
    assert [int(n) for n in re.findall(r"^step (\d+)/", stream.getvalue(), re.MULTILINE)] == steps


def test_phases_have_their_durations() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10, stream, clock=clock) as progress:
        progress.phase("starting engines")
        clock.now += 12.34
        progress.phase("evaluating student")
        clock.now += 3
        progress.update(0, {"evaluation/pass_at_8": 0.5})
        progress.phase("training")
        clock.now += 1
        progress.update(1, {"learner/loss/mean": 0.5})
        progress.phase("evaluating teacher")
        clock.now += 2
    assert stream.getvalue().splitlines() == [
        "starting engines ...",
        "starting engines: 12.3 s",
        "evaluating student ...",
        "evaluating student: 3.0 s",
        "training ...",
        "step 1/10, loss 0.5000, pass@8 0.500, 0:00:16 elapsed",
        "evaluating teacher ...",
        "evaluating teacher: 2.0 s",
    ]


def test_figures_keep_their_last_value_and_metrics_without_a_place_are_left_out() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(2, stream, clock=clock)
    progress.update(1, METRICS)
    progress.update(2, {"learner/loss/mean": float("nan"), "gate/value/p05": Histogram((0.0, 1.0), (7.0,))})
    assert "loss nan, pass@8 0.781" in stream.getvalue()
    assert "7" not in stream.getvalue().replace("0.781", "")


def test_another_number_of_samples_shows_its_own_pass_at_k() -> None:
    stream = io.StringIO()
    Progress(1, stream).update(1, {"evaluation/pass_at_1": 0.1, "evaluation/pass_at_4": 0.4})
    assert "pass@4 0.400" in stream.getvalue()
    stream = io.StringIO()
    Progress(1, stream).update(1, {"evaluation/pass_at_8": 0.8, "evaluation/pass_at_16": 0.9})
    assert "pass@8 0.800" in stream.getvalue()


def test_time_left_follows_the_recent_pace_and_a_resumed_run_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(10_000, stream, clock=clock)
    train(progress, clock, range(5001, 5041), seconds=100.0)
    assert stream.getvalue().splitlines()[0].endswith(" elapsed")  # of one step there is no pace
    train(progress, clock, range(5041, 8001), seconds=2.0)
    assert stream.getvalue().splitlines()[-1].endswith(", 1:06:40 left")  # 2,000 steps of 2 s


def test_steps_that_are_done_again_keep_an_estimate() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, stream, clock=clock)
    train(progress, clock, range(1, 51))
    progress.update(20, {})
    train(progress, clock, range(21, 71))
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()][-2:] == ["step 60/100", "step 70/100"]
    assert stream.getvalue().splitlines()[-1].endswith("0:01:40 elapsed, 0:00:30 left")


def test_two_reports_of_one_step_are_one_line() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(10, stream, clock=clock)
    train(progress, clock, range(1, 4))
    progress.update(3, {"evaluation/pass_at_8": 0.5})
    assert len(stream.getvalue().splitlines()) == 3


def test_off_shows_nothing() -> None:
    stream = io.StringIO()
    with Progress(1, stream, enabled=False) as progress:
        progress.phase("starting engines")
        progress.update(1, METRICS)
    assert stream.getvalue() == ""


def test_a_stream_that_fails_turns_the_display_off_not_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed):
        with Progress(2, stream) as progress:
            progress.phase("starting engines")
            progress.update(1, METRICS)
            progress.update(2, METRICS)


# a terminal


def test_a_terminal_gets_a_bar_within_80_columns_and_its_cursor_back(terminal: Terminal) -> None:
    clock = Clock()
    with Progress(100, terminal, clock=clock) as progress:
        progress.phase("starting engines")
        clock.now += 5
        progress.phase("training")
        train(progress, clock, range(1, 51))
        progress.phase("evaluating student")
    written = terminal.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # shown again after it was hidden
    rows = plain(written).splitlines()
    assert "starting engines  5.0 s" in rows
    assert max(len(row) for row in rows) <= 80
    last_bar = [row for row in rows if row.startswith("step")][-1]
    assert last_bar.startswith("step ━") and last_bar.endswith(" 50/100 0:00:55 elapsed, 0:00:50 left")
    figures = [row.rstrip() for row in rows if row.startswith("loss")][-1]
    assert figures == "loss 0.0123  pass@8 0.781  staleness 2  gate p05 0.941  5,123 tokens/s"
    assert "evaluating student  0.0 s" in rows
    assert not any("engines" in row for row in rows[rows.index("starting engines  5.0 s") + 1 :])


def test_a_narrow_terminal_keeps_one_row_a_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    clock = Clock()
    with Progress(100, terminal, clock=clock) as progress:
        train(progress, clock, range(1, 51))
    rows = plain(terminal.getvalue()).splitlines()
    assert max(len(row) for row in rows) <= 40
    assert [row[:4] for row in rows] == ["step", "loss"] * 2  # drawn at the first step and at the end
    assert rows[-1].rstrip().endswith("…")


def test_a_long_phase_wraps_and_loses_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    clock = Clock()
    progress = Progress(100, terminal, clock=clock)
    progress.phase("starting engines (Ray dashboard: http://127.0.0.1:8265)")
    rows = [row.strip() for row in plain(terminal.getvalue()).splitlines()]
    progress.close()
    assert max(map(len, rows)) <= 40 and " ".join(rows).endswith("http://127.0.0.1:8265)  0 s")
    assert rows[0][1:].strip().startswith("starting engines")  # after the spinner


def test_an_exception_gives_the_cursor_back(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(100, terminal) as progress:
        progress.phase("starting engines")
        raise KeyboardInterrupt
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_a_redirected_stdout_is_left_alone(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Progress(100, terminal):
        sys.stdout.write("for the file\n")
    assert file.getvalue() == "for the file\n"
    assert "for the file" not in terminal.getvalue()


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    Progress(1, terminal).update(1, METRICS)
    assert "\x1b" not in terminal.getvalue() and terminal.getvalue().startswith("step 1/1")
