import json
from pathlib import Path
from typing import Any

import pytest

from opd_ray.comparison import run_figures
from opd_ray.comparison.record import Curve, Spread
from opd_ray.comparison.run_figures import RunFigures, curves_of, figures_of, read_figures
from opd_ray.comparison.run_record import RunRecord
from opd_ray.errors import DataError


def run_with(folder: Path, lines: list[dict[str, Any]], summary: dict[str, Any] | None = None) -> RunRecord:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunRecord(folder, {}, "finished", None, summary or {})


def test_cost_comes_from_the_summary_and_tokens_from_the_steps(tmp_path: Path) -> None:
    lines = [{"step": step, "learner/tokens/loss": 100.0} for step in (1, 2, 3)]
    summary = {"steps": 3, "training_s": 2.5, "wall_s": None, "tokens_per_s": 7}
    found = read_figures(run_with(tmp_path, lines, summary)).figures
    assert found == {"steps": 3.0, "training_s": 2.5, "tokens_per_s": 7.0, "loss_tokens": 300.0}


def test_gate_figures_are_of_the_late_steps_that_measured_drift(tmp_path: Path) -> None:
    lines = [
        {"step": s, "gate/measured_share": float(s % 2), "gate/value/p05": 0.5 + s / 100 if s % 2 else 1.0}
        for s in range(1, 9)
    ]
    found = read_figures(run_with(tmp_path, lines))
    # Steps 1, 3, 5, 7 measured; the second half is 5 and 7.
    assert found.figures["gate/value/p05"] == pytest.approx(0.56)
    assert found.series["gate/value/p05"] == pytest.approx({1: 0.51, 3: 0.53, 5: 0.55, 7: 0.57})


def test_staleness_and_loss(tmp_path: Path) -> None:
    lines = [
        {"step": s, "learner/loss/mean": 2.0, "replay/staleness/mean": s / 2, "replay/staleness/max": s, "a/b": 1}
        for s in (1, 2, 3)
    ]
    found = read_figures(run_with(tmp_path, lines))
    assert found.figures == {"replay/staleness/mean": 1.0, "replay/staleness/max": 3.0}
    assert found.series["learner/loss/mean"] == pytest.approx({1: 2.0, 2: 2.0, 3: 2.0})
    assert set(found.series) == {"learner/loss/mean", "replay/staleness/mean"}


def test_the_evaluation_curve_is_avg_at_n(tmp_path: Path) -> None:
    lines = [{"step": s, "evaluation/avg_at_8": s / 10, "evaluation/pass_at_8": 1.0} for s in (0, 4)]
    assert read_figures(run_with(tmp_path, lines)).series == {"evaluation": {0: 0.0, 4: 0.4}}


def test_a_run_without_metrics_has_its_summary(tmp_path: Path) -> None:
    assert read_figures(RunRecord(tmp_path, {}, "finished", None, {"steps": 3})) == RunFigures({"steps": 3.0}, {})
    assert read_figures(run_with(tmp_path, [], {"steps": 3})) == RunFigures({"steps": 3.0}, {})


def test_broken_metrics_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("no\n")
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        read_figures(RunRecord(tmp_path, {}, "finished"))


def test_figures_and_curves_over_the_runs_that_have_them() -> None:
    runs = [RunFigures({"a": 1.0}, {"x": {1: 1.0, 2: 4.0}}), RunFigures({"a": 4.0, "b": 2.0}, {"x": {1: 3.0}})]
    assert figures_of([run.figures for run in runs]) == {"a": Spread(2.5, 1.0, 4.0), "b": Spread(2.0, 2.0, 2.0)}
    assert curves_of(runs) == {"x": Curve([1, 2], [2.0, 4.0], [1.0, 4.0], [3.0, 4.0])}


def test_long_curves_are_thinned_and_keep_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_figures, "_MAX_POINTS", 5)
    [curve] = curves_of([RunFigures({}, {"x": {step: 0.0 for step in range(1, 1002)}})]).values()
    assert curve.steps == [1, 251, 501, 751, 1001]
