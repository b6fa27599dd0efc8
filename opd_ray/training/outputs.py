"""Files and sinks that a run writes while it trains: `metrics.jsonl`, `trained.jsonl`, W&B, the progress bar.

A resumed or taken-back run cuts its files back to where they stood at the checkpoint, so that each step stands once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_ray.config.schema import TelemetryConfig
from opd_ray.replay.batch import SampledBatch
from opd_ray.run.folder import RunFolder
from opd_ray.run.trajectory_records import RECORDS_FOLDER, drop_after
from opd_ray.storage.json_lines import JsonLines
from opd_ray.telemetry.metrics import MetricsWriter
from opd_ray.telemetry.progress import Progress
from opd_ray.telemetry.ray_metrics import RayMetricsSink
from opd_ray.telemetry.sinks import Sink, Sinks, WandbSink
from opd_ray.types import Histogram

TRAINED_FILE = "trained.jsonl"


class RunOutputs:
    """The sinks of one run; `trained.jsonl` has id, use and staleness of every trajectory of every step."""

    def __init__(
        self, cfg: TelemetryConfig, folder: RunFolder, config_values: Mapping[str, Any], progress: Progress
    ) -> None:
        self._dump_folder = folder.path / RECORDS_FOLDER
        self._metrics = MetricsWriter(folder.path)
        self._trained = JsonLines(folder.path / TRAINED_FILE)
        wandb = WandbSink(cfg.wandb, cfg.wandb_project, folder.path.name, config_values, folder.path)
        sinks: list[Sink] = [self._metrics, wandb]
        if cfg.ray_metrics:
            sinks.append(RayMetricsSink({**config_values, "run": folder.path.name}))
        self._sinks = Sinks(sinks)
        self._progress = progress

    def log(self, step: int, metrics: Mapping[str, float | Histogram]) -> None:
        """Hand metrics of a policy version to all sinks."""
        self._sinks.log(step, metrics)
        self._progress.update(step, metrics)

    def step_done(self, step: int, batch: SampledBatch, metrics: Mapping[str, float | Histogram]) -> None:
        """One optimizer step led to policy version `step`."""
        self._trained.append(
            {
                "step": step,
                "trajectory_ids": list(batch.trajectory_ids),
                "uses": [info.num_uses for info in batch.infos],
                "staleness": [info.staleness for info in batch.infos],
            }
        )
        self.log(step, metrics)

    def notes(self) -> dict[str, int]:
        """Where the files stand, for a checkpoint."""
        return {"metrics_bytes": self._metrics.lines.num_bytes, "trained_bytes": self._trained.num_bytes}

    def roll_back_to(self, notes: Mapping[str, Any], step: int) -> int:
        """Drop what was written after `notes` were taken, at policy version `step`; returns the number of steps."""
        self._metrics.lines.cut(int(notes["metrics_bytes"]))
        num_dropped = self._trained.cut(int(notes["trained_bytes"]))
        drop_after(self._dump_folder, step)
        self._progress.update(step, {})
        return num_dropped

    def close(self) -> None:
        """Finish all sinks."""
        self._trained.close()
        self._sinks.close()
