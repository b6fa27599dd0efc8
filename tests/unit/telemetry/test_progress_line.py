import io

from opd_ray.telemetry.progress_line import ProgressLine


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
    assert lines[0] == "math500: sampling: 0 of 1,000 answers (0:00)"
    assert lines[-1] == "math500: sampling: 1,000 of 1,000 answers (0:00)"


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    now = [0.0]
    stream = Terminal()
    line = ProgressLine(stream, clock=lambda: now[0])
    for done in (0, 50, 100):
        now[0] += 61.0
        line.show("tiny: sampling", done, 100, "answers")
    line.show("tiny: verifying", 100, 100, "answers")
    line.end()
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.endswith("\n")
    assert "50 of 100 answers (1:01)" in text and text.count("\r") == 4


def test_off_and_a_closed_stream_do_no_harm() -> None:
    stream = io.StringIO()
    ProgressLine(stream, enabled=False).show("a", 1, 1, "answers")
    assert stream.getvalue() == ""
    stream.close()
    ProgressLine(stream).show("a", 1, 1, "answers")
