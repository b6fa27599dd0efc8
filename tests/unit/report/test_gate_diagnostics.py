import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_ray.errors import DataError
from opd_ray.report.gate_diagnostics import drift_map, main, read_diagnostics
from opd_ray.types import Histogram

EDGES = (0.0, 0.01, 0.1, 1.0, 10.0, 12.0)


def histogram(*counts: float, edges: Sequence[float] = EDGES) -> dict[str, Any]:
    return {"edges": list(edges), "counts": list(counts)}


def full_record(step: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "gate/measured_share": 1.0,
        "gate/drift_abs/measured_p50": 0.01,
        "gate/drift_abs/measured_p95": 0.2,
        "gate/drift_abs/histogram": histogram(1, 4, 2, step, 0),
        "gate/engine_mismatch/rms": 0.003,
        "gate/value/min": 0.2,
        "gate/value/p05": 0.5,
        "gate/value/mean": 0.9,
        "gate/effective_sample_share": 0.95,
        "gate/weight/histogram": histogram(1, 0, 5, 20, 0, edges=(0.0, 1e-300, 1e-3, 0.9, 1.1, 1.3)),
        "gate/kl_correlation/pearson": -0.3,
        "support/student_mass/mean": 0.9,
        "support/student_mass/p05": 0.6,
        "support/overlap_ratio/mean": 0.7,
        "support/alarm": float(step % 2),
    }
    for number in range(10):
        record[f"gate/weight_share/position_{number}"] = 0.1 + (number - 4.5) / 100
        record[f"gate/token_share/position_{number}"] = 0.1
        record[f"learner/kl/position_{number}"] = number / 10
    for number in range(12):
        record[f"gate/weight_share/staleness_{number}"] = record[f"gate/token_share/staleness_{number}"] = 1 / 12
    return record


def write_run(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_numbers_and_histograms_by_key_later_values_win(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "time": 5.0, "gate/value/p05": None, "learner/loss/mean": 1.0},
        {"step": 2, "gate/value/p05": 0.5, "gate/drift_abs/histogram": histogram(1, 0, 0, 0, 0)},
        {"step": 2, "gate/value/p05": 0.25, "gate/drift_abs/histogram": histogram(2, 0, 0, 0, 0)},
    ]
    found = read_diagnostics(write_run(tmp_path, records) / "metrics.jsonl")
    assert found.numbers == {"gate/value/p05": {2: 0.25}}
    assert found.histograms == {"gate/drift_abs/histogram": {2: Histogram(EDGES, (2.0, 0.0, 0.0, 0.0, 0.0))}}


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, [{"step": 1, "gate/value/p05": 0.5}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "gate/val')
    assert read_diagnostics(tmp_path / "metrics.jsonl").numbers == {"gate/value/p05": {1: 0.5}}


def test_means_are_over_the_second_half_of_the_run(tmp_path: Path) -> None:
    records = [
        {
            "step": step,
            "gate/weight_share/staleness_10": 0.1 * step,
            "gate/token_share/staleness_10": 0.5,
            "gate/weight_share/staleness_2": 0.5,
            "gate/token_share/staleness_2": 0.5,
            "gate/weight/histogram": histogram(step, 1, 0, 0, 0),
        }
        for step in range(1, 5)
    ]
    found = read_diagnostics(write_run(tmp_path, records) / "metrics.jsonl")
    assert found.weight_ratio("staleness") == pytest.approx({2: 1.0, 10: 0.7})
    assert list(found.weight_ratio("staleness")) == [2, 10]
    assert found.weight_ratio("position") == {}
    assert found.late_histogram("gate/weight/histogram") == Histogram(EDGES, (7.0, 2.0, 0.0, 0.0, 0.0))
    assert found.late_histogram("gate/value/histogram") is None
    assert found.late_mean("gate/value/p05") is None


def test_steps_in_which_all_was_fresh_show_no_gate(tmp_path: Path) -> None:
    records = [
        {
            "step": step,
            "gate/measured_share": share,
            "gate/value/p05": 0.5,
            "gate/weight/histogram": histogram(1, 0, 0, 0, 0),
            "gate/engine_mismatch/rms": 0.1,
            "support/entropy/mean": 1.0,
        }
        for step, share in enumerate([0.0, 0.5, 1.0])
    ]
    found = read_diagnostics(write_run(tmp_path, records) / "metrics.jsonl").of_gated_steps()
    assert {key: list(values) for key, values in found.numbers.items()} == {
        "gate/measured_share": [1, 2],
        "gate/value/p05": [1, 2],
        "gate/engine_mismatch/rms": [0, 1, 2],
        "support/entropy/mean": [0, 1, 2],
    }
    assert list(found.histograms["gate/weight/histogram"]) == [1, 2]


def test_the_map_of_drift_shows_shares_of_the_rows_in_use() -> None:
    found = drift_map(
        {
            1: Histogram(EDGES, (1.0, 3.0, 0.0, 0.0, 0.0)),
            2: Histogram(EDGES, (0.0,) * 5),  # nothing was measured
            3: Histogram(EDGES, (0.0, 5.0, 5.0, 0.0, 0.0)),
        }
    )
    assert found is not None
    steps, edges, shares = found
    assert steps == pytest.approx([0.5, 2.0, 3.5])
    assert edges == pytest.approx([0.01 / 10**0.2, 0.01, 0.1, 1.0, 10.0])  # one row more than in use
    assert shares == pytest.approx(np.array([[0.25, 0.75, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]))


def test_the_map_of_a_long_run_averages_steps() -> None:
    found = drift_map({step: Histogram((0.0, 0.1, 1.0), (1.0, float(step % 2))) for step in range(3000)})
    assert found is not None
    assert found[2].shape == (150, 2) and found[2] == pytest.approx(np.tile([0.75, 0.25], (150, 1)))


def test_without_measured_segments_there_is_no_map() -> None:
    assert drift_map({}) is None
    assert drift_map({1: Histogram(EDGES, (0.0,) * 5)}) is None


@pytest.mark.parametrize("value", [{"edges": [0, 1]}, {"edges": [0, 1], "counts": [1, 2]}, {"edges": 3, "counts": 1}])
def test_a_broken_histogram_is_named(tmp_path: Path, value: Any) -> None:
    write_run(tmp_path, [{"step": 7, "gate/weight/histogram": value}])
    with pytest.raises(DataError, match="step 7, gate/weight/histogram"):
        read_diagnostics(tmp_path / "metrics.jsonl")


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.png")
    assert main([str(tmp_path / "none"), "--out", out]) == 1
    assert main([str(write_run(tmp_path / "empty", [])), "--out", out]) == 1
    assert main([str(write_run(tmp_path / "other", [{"step": 1, "time/step_s": 1.0}])), "--out", out]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("opd_ray: error: ") for line in errors)
    assert "give a run folder" in errors[0] and all("no diagnostics" in line for line in errors[1:])
    assert not Path(out).exists()


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    run = write_run(tmp_path, [{"step": 1, "gate/value/p05": 1.0}])
    assert main([str(run), "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "gate/value", "gate/drift", "gate/w", "gate/engine", "learner/kl", "support/"])
@pytest.mark.parametrize("num_steps", [1, 6])
def test_draws_whatever_part_there_is(tmp_path: Path, part: str, num_steps: int) -> None:
    pytest.importorskip("matplotlib")
    records = [
        {"step": step, **{key: value for key, value in full_record(step).items() if key.startswith(part)}}
        for step in range(num_steps)
    ]
    out = tmp_path / "gate.png"
    assert main([str(write_run(tmp_path, records)), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_draws_a_run_whose_segments_were_all_fresh(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": step, **full_record(step), "gate/measured_share": 0.0} for step in range(3)]
    assert main([str(write_run(tmp_path, records)), "--out", str(tmp_path / "gate.png")]) == 0


def test_draws_steps_without_any_drift_or_weight(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [
        {
            "step": step,
            "gate/drift_abs/measured_p50": 0.0,
            "gate/drift_abs/measured_p95": 0.0,
            "gate/drift_abs/histogram": histogram(3, 0, 0, 0, 0),
            "gate/weight/histogram": histogram(4, 0, 0, 0, 0),
        }
        for step in range(3)
    ]
    assert main([str(write_run(tmp_path, records)), "--out", str(tmp_path / "gate.png")]) == 0
