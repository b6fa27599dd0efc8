"""Ways to watch a run: `metrics.jsonl`, W&B, and a progress bar. No engine is imported here."""

from opd_ray.telemetry.metrics import MetricsWriter, checked_metrics
from opd_ray.telemetry.progress import Progress
from opd_ray.telemetry.sinks import Sink, Sinks, WandbSink

__all__ = ["MetricsWriter", "Progress", "Sink", "Sinks", "WandbSink", "checked_metrics"]
