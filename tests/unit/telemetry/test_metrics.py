import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd_ray.errors import RunFolderError
from opd_ray.telemetry import MetricsWriter, checked_metrics
from opd_ray.types import Histogram

ROOT = Path(__file__).resolve().parents[3]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_readable_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    before = time.time()
    writer.log(1, {"learner/loss/mean": 0.5, "replay/staleness/max": 2})
    first = lines(tmp_path)
    writer.log(2, {"learner/loss/mean": 0.25})
    writer.close()
    assert [set(record) for record in lines(tmp_path)] == [
        {"step", "time", "learner/loss/mean", "replay/staleness/max"},
        {"step", "time", "learner/loss/mean"},
    ]
    assert first[0]["step"] == 1 and first[0]["learner/loss/mean"] == 0.5
    assert before - 0.01 <= first[0]["time"] <= time.time() + 0.01


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"a/b": float("nan"), "a/c": float("inf"), "a/d": float("-inf"), "a/e": 1e308})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [lines(tmp_path)[0][key] for key in ("a/b", "a/c", "a/d", "a/e")] == [None, None, None, 1e308]


@pytest.mark.parametrize("key", ["loss", "a/", "/a", "a//b", "A/b", "a/B c", "a/b\n", "", "eval/pass@8"])
def test_keys_are_checked(tmp_path: Path, key: str) -> None:
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="role/quantity"):
        writer.log(1, {"a/b": 1.0, key: 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_values_are_checked() -> None:
    np = pytest.importorskip("numpy")
    checked = checked_metrics({"a/b": np.float32(0.5), "a/c": 3, "a/d": True})
    assert checked == {"a/b": 0.5, "a/c": 3.0, "a/d": 1.0}
    assert all(type(value) is float for value in checked.values())
    with pytest.raises(ValueError, match=r"a/b must be a number or a histogram, got \[1\]"):
        checked_metrics({"a/b": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize("size", [1, 100, 70_000, 200_000])
def test_opening_again_drops_a_broken_last_line_and_goes_on(tmp_path: Path, size: int) -> None:
    whole = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b"{" * size)
    MetricsWriter(tmp_path).log(3, {"a/b": 1})
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3]


def test_a_file_that_is_only_a_broken_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"{" * 70_000)
    MetricsWriter(tmp_path).log(1, {"a/b": 1})
    assert len(lines(tmp_path)) == 1


def test_a_kill_cuts_the_last_line_at_most(tmp_path: Path) -> None:
    code = (
        "import itertools, pathlib, sys\n"
        "from opd_ray.telemetry.metrics import MetricsWriter\n"
        "writer = MetricsWriter(pathlib.Path(sys.argv[1]))\n"
        "for step in itertools.count():\n"
        "    writer.log(step, {f'role/quantity_{i}/mean': i for i in range(200)})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    path = tmp_path / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    MetricsWriter(tmp_path).log(-1, {"a/b": 1.0})
    *steps, last = [record["step"] for record in lines(tmp_path)]
    assert steps == list(range(len(steps))) and last == -1
    assert len(steps) > 10


def test_a_full_disk_is_one_clear_line_and_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"a/b": 1.0})
    real_write = os.write

    def half_then_full(fd: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data[:-5])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(RunFolderError, match="metrics.jsonl: No space left on device"):
        writer.log(2, {"a/b": 1.0})
    monkeypatch.undo()
    writer.log(3, {"a/b": 1.0})
    assert [record["step"] for record in lines(tmp_path)] == [1, 3]


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No such file or directory"):
        MetricsWriter(tmp_path / "none")


def test_closing_twice_does_no_harm_and_a_closed_writer_says_so(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(RunFolderError, match="closed"):
        writer.log(1, {"a/b": 1.0})


# histograms


def test_a_histogram_is_edges_and_counts(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"a/b": Histogram((0.0, 1.0, 10.0), (3.0, 0.0)), "a/c": 1.0})
    writer.log(2, {"a/b": Histogram(tuple(np.array([0, 1, 2])), tuple(np.array([1, 2])))})
    writer.close()
    assert lines(tmp_path)[0]["a/b"] == {"edges": [0.0, 1.0, 10.0], "counts": [3.0, 0.0]}
    assert lines(tmp_path)[1]["a/b"] == {"edges": [0.0, 1.0, 2.0], "counts": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("edges", "counts", "message"),
    [
        ((0.0, 1.0), (1.0, 2.0), "a/b has 2 edges and 2 counts"),
        ((0.0,), (), "a/b has 1 edges and 0 counts"),
        (tuple(map(float, range(514))), (1.0,) * 513, "513 counts; give 1 to 512 counts"),
        ((0.0, 0.0), (1.0,), "do not rise"),
        ((1.0, 0.0), (1.0,), "do not rise"),
        ((0.0, float("inf")), (1.0,), "not finite"),
        ((float("nan"), 1.0), (1.0,), "not finite"),
        ((0.0, 1.0), (-1.0,), "negative or not finite"),
        ((0.0, 1.0), (float("nan"),), "negative or not finite"),
    ],
)
def test_what_is_no_histogram_is_refused(
    tmp_path: Path, edges: tuple[float, ...], counts: tuple[float, ...], message: str
) -> None:
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=message):
        writer.log(1, {"a/b": Histogram(edges, counts)})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
