"""What the Ray sink exports: names, labels, counters, and that its failures stay its own."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from opd_ray.telemetry import Sink
from opd_ray.telemetry.exported_series import RUN_LABELS, SERIES, Kind
from opd_ray.telemetry.ray_metrics import RayMetricsSink
from opd_ray.types import Histogram

ROOT = Path(__file__).resolve().parents[3]
RUN = {"run": "lsm-tiny-s3-x", "experiment": "lsm", "seed": 3}
SHOWN = {"run": "lsm-tiny-s3-x", "experiment": "lsm", "seed": "3"}


class FakeRay:
    """`ray.util.metrics` as far as it is used, with its rules: known tags only, all of them, counters rise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.error: Exception | None = None
        self.was_set = threading.Event()
        world = self

        class Instrument:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                assert re.fullmatch(r"[a-z][a-z0-9_]*", name) and description
                self.name, self.tag_keys = name, tag_keys
                self.defaults: dict[str, str] = {}

            def set_default_tags(self, tags: dict[str, str]) -> None:
                assert all(isinstance(value, str) for value in tags.values())
                self.defaults = tags

            def place(self, tags: Mapping[str, str]) -> tuple[str, frozenset[tuple[str, str]]]:
                if world.error:
                    raise world.error
                given = self.defaults | dict(tags)
                assert set(given) == set(self.tag_keys)
                return self.name, frozenset(given.items())

        class Gauge(Instrument):
            def set(self, value: float, tags: Mapping[str, str]) -> None:
                world.values[self.place(tags)] = value
                world.was_set.set()

        class Counter(Instrument):
            def inc(self, value: float, tags: Mapping[str, str]) -> None:
                assert value > 0
                place = self.place(tags)
                world.values[place] = world.values.get(place, 0.0) + value

        monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
        monkeypatch.setattr("ray.util.metrics.Counter", Counter)

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of a series by its own labels, in the order of their names."""
        found = {}
        for (series, tags), value in self.values.items():
            labels = dict(tags)
            if series == name:
                assert {label: labels.pop(label) for label in RUN_LABELS} == SHOWN
                found[tuple(labels[label] for label in sorted(labels))] = value
        return found


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return FakeRay(monkeypatch)


def test_a_step_reaches_its_series(fake_ray: FakeRay) -> None:
    sink: Sink = RayMetricsSink(RUN, repeat_s=3600)
    sink.log(
        7,
        {
            "replay/staleness/max": 4.0,
            "replay/staleness/mean": 2.5,
            "replay/in_flight": 3,
            "replay/ready": 32,
            "gate/value/p05": 0.84,
            "rollout/tokens_per_s": 1007.0,
            "learner/tokens_per_s": 10102.0,
            "pipeline/bottleneck/learner": 1.0,
            "pipeline/wait_share/rollout": 0.8,
            "time/publish_s": 0.035,
            "time/learner_forward_s": 0.25,
            "faults/restarts/learner": 0.0,
            "evaluation/avg_at_8": 0.5,
        },
    )
    assert fake_ray.of("opd_policy_version") == {(): 7.0}
    assert fake_ray.of("opd_staleness_steps") == {("max",): 4.0, ("mean",): 2.5}
    assert fake_ray.of("opd_store_trajectories") == {("in_flight",): 3.0, ("ready",): 32.0}
    assert fake_ray.of("opd_gate_value") == {("p05",): 0.84}
    assert fake_ray.of("opd_tokens_per_second") == {("rollout",): 1007.0, ("learner",): 10102.0}
    assert fake_ray.of("opd_bottleneck") == {("learner",): 1.0}
    assert fake_ray.of("opd_wait_share") == {("rollout",): 0.8}
    assert fake_ray.of("opd_publish_seconds") == {(): 0.035}
    assert fake_ray.of("opd_learner_seconds") == {("forward",): 0.25}
    assert fake_ray.of("opd_restarts") == {("learner",): 0.0}
    assert fake_ray.of("opd_evaluation_avg_at_n") == {("8",): 0.5}


def test_a_gauge_keeps_what_a_later_step_does_not_tell(fake_ray: FakeRay) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    sink.log(0, {"evaluation/avg_at_8": 0.5, "learner/lr": 1e-4})
    sink.log(1, {"learner/lr": 2e-4})
    assert fake_ray.of("opd_evaluation_avg_at_n") == {("8",): 0.5}
    assert fake_ray.of("opd_learning_rate") == {(): 2e-4}
    assert fake_ray.of("opd_policy_version") == {(): 1.0}


def test_what_has_no_series_is_left_out(fake_ray: FakeRay) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    sink.log(1, {"learner/kl/position_3": 1.0, "gate/drift_abs/staleness_12": 1.0, "some/new/metric": 1.0})
    sink.log(1, {"gate/value/histogram": Histogram((0.0, 1.0), (5.0,))})
    assert {name for name, _ in fake_ray.values} == {"opd_policy_version"}
    assert sink.is_on


def test_tokens_are_added_up(fake_ray: FakeRay) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    for tokens in (100.0, 0.0, math.nan, 23.0):
        sink.log(1, {"learner/tokens/loss": tokens})
    assert fake_ray.of("opd_trained_tokens_total") == {(): 123.0}


def test_trajectories_follow_the_ledger_and_count_on_after_it_was_taken_back(fake_ray: FakeRay) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    for trained, stale in ((8, 0), (16, 1), (8, 1), (8, 1), (24, 3)):
        sink.log(
            1,
            {
                "replay/ledger/started": 40,
                "replay/ledger/trained": trained,
                "replay/ledger/evicted": stale,
                "replay/ledger/evicted/stale": stale,
                "replay/ledger/failed": 0,
            },
        )
    # 8 trained ones were done twice; no total stands beside its parts.
    assert fake_ray.of("opd_trajectories_total") == {("trained", ""): 16.0 + 16.0, ("evicted", "stale"): 3.0}


def test_what_is_no_number_is_not_shown_any_more(fake_ray: FakeRay) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    sink.log(1, {"learner/lr": 1e-4, "learner/grad_norm": 2.0})
    sink.log(2, {"learner/lr": math.nan})
    fake_ray.values.clear()
    sink.repeat()
    assert fake_ray.of("opd_learning_rate") == {}
    assert fake_ray.of("opd_grad_norm") == {(): 2.0}
    assert sink.is_on


def test_gauges_are_repeated_and_counters_are_not(fake_ray: FakeRay) -> None:
    """Ray lets a gauge go that is not set again."""
    sink = RayMetricsSink(RUN, repeat_s=0.01)
    sink.log(3, {"evaluation/avg_at_8": 0.5, "learner/tokens/loss": 10.0, "replay/ledger/trained": 4.0})
    fake_ray.values.clear()
    fake_ray.was_set.clear()
    assert fake_ray.was_set.wait(timeout=30)
    sink.close()
    assert fake_ray.of("opd_policy_version") == {(): 3.0}
    assert fake_ray.of("opd_trained_tokens_total") == fake_ray.of("opd_trajectories_total") == {}


def test_a_failure_of_the_repetition_ends_it_with_one_warning(
    fake_ray: FakeRay, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "opd_ray"):
        sink = RayMetricsSink(RUN, repeat_s=3600)
        sink.log(1, {"learner/lr": 1.0})
        fake_ray.error = RuntimeError("gone")
        sink.repeat()
        assert not sink.is_on
        sink.log(2, {"learner/lr": 1.0})
    assert len(caplog.records) == 1 and "failed to repeat: RuntimeError: gone" in caplog.text


def test_a_failure_is_one_warning_and_the_end_of_the_sink(fake_ray: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    fake_ray.error = RuntimeError("no\nagent")
    with caplog.at_level(logging.WARNING, "opd_ray"):
        sink.log(1, {"learner/lr": 1.0})
        sink.log(2, {"learner/lr": 2.0})
        sink.close()
    assert [record.getMessage() for record in caplog.records] == [
        "Ray metrics are off for the rest of the run, they failed to log: RuntimeError: no agent"
    ]
    assert fake_ray.values == {} and not sink.is_on


def test_a_failure_at_the_start_is_one_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("refused")

    monkeypatch.setattr("ray.util.metrics.Gauge", refuse)
    with caplog.at_level(logging.WARNING, "opd_ray"):
        sink = RayMetricsSink(RUN, repeat_s=3600)
        sink.log(1, {"learner/lr": 1.0})
    assert not sink.is_on and len(caplog.records) == 1 and "failed to start" in caplog.text


def test_a_metric_that_is_none_is_the_callers_fault(fake_ray: FakeRay) -> None:
    with pytest.raises(ValueError, match="must be role/quantity"):
        RayMetricsSink(RUN, repeat_s=3600).log(1, {"Loss": 1.0})


def test_after_close_nothing_is_exported(fake_ray: FakeRay) -> None:
    sink = RayMetricsSink(RUN, repeat_s=3600)
    sink.close()
    sink.log(1, {"learner/lr": 1.0})
    assert fake_ray.values == {}


def test_names_follow_prometheus() -> None:
    names = [series.name for series in SERIES]
    assert len(set(names)) == len(names)
    for series in SERIES:
        assert re.fullmatch(r"opd_[a-z_]+", series.name) and series.help.endswith(".")
        assert (series.kind is not Kind.gauge) == series.name.endswith("_total")
        assert not set(series.labels) & {*RUN_LABELS, "le", "quantile", "job", "instance"}
        # Units are spelled out: seconds and bytes stand at the end of a name, and in no other form.
        assert not re.search(r"_(s|ms|sec|kb|mb)$", series.name)
        if re.search(r"_s(/|$)", series.keys.replace("tokens_per_s", "")):
            assert series.name.endswith("_seconds"), series


def test_a_key_feeds_one_series_at_most() -> None:
    text = (ROOT / "benchmarks" / "results" / "quickstart.json").read_text()
    keys = set(re.findall(r'"([a-z0-9_]+(?:/[a-z0-9_]+)+)"', text))
    assert "gate/drift_abs/max" in keys
    keys |= {"replay/ledger/trained", "replay/in_flight", "time/step_s", "time/learner_step_s", "gate/tau"}
    for key in keys:
        assert sum(series.labels_of(key) is not None for series in SERIES) <= 1, key


def test_label_values_are_bounded() -> None:
    """A number of a position or of a staleness is in no label; n and k come from the config."""
    free = [series for series in SERIES if re.search(r"\[|\\d|\\w|\*|\+", series.keys)]
    assert {series.name for series in free} == {
        "opd_trajectories_total",
        "opd_evaluation_avg_at_n",
        "opd_evaluation_pass_at_k",
    }


def test_without_ray_running_it_harms_nothing() -> None:
    """A process of its own, since Ray's metrics are of the process; the real API takes every series."""
    code = (
        "from opd_ray.telemetry.ray_metrics import RayMetricsSink\n"
        "sink = RayMetricsSink({'run': 'r', 'experiment': 'e', 'seed': 0})\n"
        "sink.log(1, {'replay/staleness/max': 4.0, 'replay/ledger/trained': 4.0, 'learner/tokens/loss': 9.0})\n"
        "assert sink.is_on\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
