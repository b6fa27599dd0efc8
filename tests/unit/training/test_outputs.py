"""The sinks of a run are those that its config names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from opd_ray.config.choices import WandbMode
from opd_ray.config.schema import TelemetryConfig
from opd_ray.run.folder import RunFolder
from opd_ray.telemetry.metrics import MetricsWriter
from opd_ray.telemetry.progress import Progress
from opd_ray.training import outputs as run_outputs
from opd_ray.training.outputs import RunOutputs


class FakeRayMetrics:
    made: list[FakeRayMetrics] = []

    def __init__(self, run: dict[str, Any]) -> None:
        self.run, self.is_closed = run, False
        self.logged: list[tuple[int, dict[str, float]]] = []
        FakeRayMetrics.made.append(self)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged.append((step, metrics))

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("ray_metrics", [True, False])
def test_ray_gets_the_metrics_where_the_config_says_so(
    ray_metrics: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_outputs, "RayMetricsSink", FakeRayMetrics)
    monkeypatch.setattr(FakeRayMetrics, "made", [])
    folder = RunFolder.create(tmp_path, "run")
    cfg = TelemetryConfig(wandb=WandbMode.disabled, progress=False, ray_metrics=ray_metrics)
    with open(os.devnull, "w") as nowhere, Progress(3, nowhere, False) as progress:
        outputs = RunOutputs(cfg, folder, {"experiment": "lsm", "seed": 3}, progress)
        outputs.log(1, {"learner/lr": 1e-4})
        outputs.close()
    folder.close()
    assert len(MetricsWriter(folder.path).path.read_text().splitlines()) == 1
    assert len(FakeRayMetrics.made) == ray_metrics
    for sink in FakeRayMetrics.made:
        assert {name: sink.run[name] for name in ("run", "experiment", "seed")} == {
            "run": folder.path.name,
            "experiment": "lsm",
            "seed": 3,
        }
        assert sink.logged == [(1, {"learner/lr": 1e-4})] and sink.is_closed
