import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from opd_ray.errors import DataError
from opd_ray.report.learning_curve import _drift_levels, main, read_series, smoothed


def write_run(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_series_by_key_without_nulls_and_histograms_later_values_win(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "time": 5.0, "learner/loss/mean": 0.5, "gate/value/p05": None},
        {"step": 2, "time": 6.0, "learner/loss/mean": 0.4, "gate/weight/histogram": {"edges": [0, 1], "counts": [1]}},
        {"step": 2, "time": 7.0, "learner/loss/mean": 0.3, "evaluation/avg_at_8": 1},
    ]
    series = read_series(write_run(tmp_path, records) / "metrics.jsonl")
    assert series == {"learner/loss/mean": {1: 0.5, 2: 0.3}, "evaluation/avg_at_8": {2: 1.0}}


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"loss": 1}\n', '{"step": null}\n'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a/b": 1}\n' + text)
    with pytest.raises(DataError, match="line 2: not a JSON object with a step"):
        read_series(tmp_path / "metrics.jsonl")


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "x.png")]) == 1
    write_run(tmp_path, [])
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("opd_ray: error: ") for line in errors)
    assert "give a run folder" in errors[0] and "no metrics yet" in errors[1]


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert main([str(write_run(tmp_path, [{"step": 1, "a/b": 1.0}])), "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0]) == pytest.approx([1.0, (0.8 * 1 + 2) / 1.8])
    assert smoothed([]) == []


def test_drift_is_ordered_by_staleness_as_a_number() -> None:
    keys = ["staleness_10", "staleness_2", "p95", "staleness_0"]
    assert _drift_levels({f"gate/drift_abs/{key}": {} for key in keys}) == [0, 2, 10]


@pytest.mark.parametrize("keys", ["all", "loss only"])
def test_draws_a_picture(tmp_path: Path, keys: str) -> None:
    pytest.importorskip("matplotlib")
    record = {
        "learner/loss/mean": 0.5,
        "gate/value/p05": 0.9,
        "gate/drift_abs/staleness_1": 0.1,
        "evaluation/avg_at_8": 0.5,
    }
    if keys == "loss only":
        record = {"learner/loss/mean": 0.5}
    write_run(tmp_path, [{"step": step, **record} for step in range(5)])
    (tmp_path / "summary.json").write_text('{"eval": {"teacher": {"avg_at_8": 0.9}}}')
    out = tmp_path / "curve.png"
    assert main([str(tmp_path), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
