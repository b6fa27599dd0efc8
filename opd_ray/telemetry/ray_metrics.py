"""A run's metrics as Ray's own custom metrics, for its dashboard, Prometheus and Grafana (`exported_series`)."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_ray.telemetry.exported_series import POLICY_VERSION, RUN_LABELS, SERIES, Kind, Series
from opd_ray.telemetry.metrics import Metric, checked_metrics
from opd_ray.types import Histogram

REPEAT_S = 1.0
"""Seconds between repetitions of all gauges; Ray exports once a second at most."""

logger = logging.getLogger("opd_ray")


class RayMetricsSink:
    """Hands numbers to `ray.util.metrics`; Ray's agent on this node serves them to Prometheus.

    Ray forgets a gauge that was not set for two export intervals (20 s), which a step or an evaluation can outlast; so
    a thread sets all of them again until `close`. Counters stay with the agent. Monitoring can never end a run: at its
    first failure the sink logs one warning and turns itself off.

    Args:
        run: values of `RUN_LABELS`.
        series: what is exported.
        repeat_s: seconds between repetitions.
    """

    def __init__(self, run: Mapping[str, Any], series: Sequence[Series] = SERIES, repeat_s: float = REPEAT_S) -> None:
        self._series = tuple(series)
        self._instruments: dict[str, Instrument] = {}
        # The places of a metric key are looked up once.
        self._places: dict[str, list[tuple[str, dict[str, str]]]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._guard("start", lambda: self._start({label: str(run[label]) for label in RUN_LABELS}))
        threading.Thread(target=self._keep_repeating, args=(repeat_s,), name="ray-metrics", daemon=True).start()

    @property
    def is_on(self) -> bool:
        """False after a failure or `close`."""
        return not self._ended.is_set()

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Export the metrics that have a series. A gauge without a finite value goes."""
        if self.is_on:
            values = checked_metrics(metrics)
            numbers = {key: value for key, value in values.items() if not isinstance(value, Histogram)}
            self._guard("log", lambda: self._export(step, numbers))

    def repeat(self) -> None:
        """Set all gauges again."""
        self._guard("repeat", self._repeat_all)

    def close(self) -> None:
        """Export nothing more; Ray lets the gauges go."""
        self._ended.set()

    def _start(self, run: dict[str, str]) -> None:
        # Late, so that the other sinks can be imported without Ray.
        from ray.util import metrics as ray_metrics

        makers = {
            Kind.gauge: (ray_metrics.Gauge, Instrument),
            Kind.added: (ray_metrics.Counter, Added),
            Kind.count: (ray_metrics.Counter, Count),
        }
        for series in self._series:
            make, instrument = makers[series.kind]
            made = make(series.name, series.help, tag_keys=(*RUN_LABELS, *series.labels))
            made.set_default_tags(run)
            self._instruments[series.name] = instrument(made)

    def _export(self, step: int, numbers: Mapping[str, float]) -> None:
        self._instruments[POLICY_VERSION].take(float(step), {})
        for key, value in numbers.items():
            if key not in self._places:
                self._places[key] = self._places_of(key)
            for name, labels in self._places[key]:
                self._instruments[name].take(value, labels)

    def _places_of(self, key: str) -> list[tuple[str, dict[str, str]]]:
        found = ((series.name, series.labels_of(key)) for series in self._series)
        return [(name, labels) for name, labels in found if labels is not None]

    def _repeat_all(self) -> None:
        for instrument in self._instruments.values():
            instrument.repeat()

    def _keep_repeating(self, repeat_s: float) -> None:
        while not self._ended.wait(repeat_s):
            self.repeat()

    def _guard(self, action: str, call: Callable[[], object]) -> None:
        try:
            with self._lock:
                call()
        except Exception as error:  # noqa: BLE001  (whatever Ray raises, the run continues)
            self._ended.set()
            logger.warning(
                "Ray metrics are off for the rest of the run, they failed to %s: %s: %s",
                action,
                type(error).__name__,
                " ".join(str(error).split()),
            )


class Instrument:
    """A gauge: shows the last values, by labels."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self._last: dict[tuple[str, ...], tuple[float, dict[str, str]]] = {}

    def take(self, value: float, labels: dict[str, str]) -> None:
        """Take one value in; where it is not finite, the gauge is not shown."""
        place = tuple(labels.values())
        if math.isfinite(value):
            self._last[place] = value, labels
            self._made.set(value, labels)
        else:
            self._last.pop(place, None)

    def repeat(self) -> None:
        """Show again what was shown."""
        for value, labels in self._last.values():
            self._made.set(value, labels)


class Added(Instrument):
    """A counter that is raised by each value."""

    def take(self, value: float, labels: dict[str, str]) -> None:
        """Add the value; Ray refuses zero and less."""
        if math.isfinite(value) and value > 0:
            self._made.inc(value, labels)

    def repeat(self) -> None:
        """Counters stay."""


class Count(Added):
    """A counter that follows a count; where that falls (a run was taken back), it counts on from there."""

    def take(self, value: float, labels: dict[str, str]) -> None:
        """Add what the count has grown by."""
        place = tuple(labels.values())
        before, _ = self._last.get(place, (0.0, labels))
        self._last[place] = value, labels
        super().take(value - before, labels)
