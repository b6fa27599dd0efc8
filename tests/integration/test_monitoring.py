"""A tiny run, watched by a real Prometheus with the shipped config through Ray's own metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.monitoring_stack import Prometheus, RayHead, prometheus, ray_head
from opd_ray.telemetry.exported_series import SERIES, Kind
from tests.unit.test_monitoring import EXPRESSIONS, in_prometheus

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
BINARY = shutil.which("prometheus")
NUM_STEPS = 5
# Ray hands metrics on once a second instead of every ten, so that a short run is seen.
QUICK = {"RAY_metrics_report_interval_ms": "1000", "RAY_USAGE_STATS_ENABLED": "0"}
ARGS = [
    *("+experiment=lsm_block64", "seed=3", f"num_steps={NUM_STEPS}", "evaluation.path=''"),
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "gate.block_size=16", "learner.lr=1e-2"),
    *("learner.warmup_steps=0", "learner.num_ranks=1", "telemetry.wandb=disabled", "telemetry.progress=false"),
]
# What a gated run of the tiny scale without evaluation and without checkpoints does not tell.
ABSENT = {
    "opd_checkpoint_seconds",
    *("opd_evaluation_avg_at_n", "opd_evaluation_pass_at_k", "opd_evaluation_truncated_share"),
}


@dataclass
class Watched:
    """A finished run, its metrics by line, what Prometheus has of it, and the actors that Ray's dashboard lists."""

    folder: Path
    rows: list[dict[str, Any]]
    server: Prometheus
    actors: set[str]

    def last(self, key: str) -> float:
        """The last value of a metric."""
        return float(next(row[key] for row in reversed(self.rows) if key in row))

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        """Last values of a series by its own labels."""
        (series,) = (series for series in SERIES if series.exported_name == name)
        found = self.server.query(f'last_over_time({name}{{run="{self.folder.name}"}}[10m])')
        return {
            tuple(item["metric"].get(label, "") for label in series.labels): float(item["value"][1]) for item in found
        }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if BINARY is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("monitoring")
    runs = folder / "runs"
    with ray_head(2, QUICK) as head, prometheus(BINARY, head.discovery, folder) as server:
        run_watched(head, server, runs)
        actors = {actor["name"] for actor in head.actors()}
        run_folder = (runs / "latest").resolve()
        rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        yield Watched(run_folder, rows, server, actors)


def run_watched(head: RayHead, server: Prometheus, runs: Path) -> None:
    """Run the command to its end, and wait until Prometheus has seen it."""
    command = [sys.executable, "-m", "opd_ray.main", *ARGS, f"runs_dir={runs}"]
    env = {**os.environ, **head.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        out, _ = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, out
    # The last step's values leave with the process and are scraped within the second after.
    eventually(lambda: server.query(f"last_over_time(ray_opd_policy_version[10m]) == {NUM_STEPS}"))


def eventually(found: Callable[[], Any], within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (result := found()):
        assert time.monotonic() < deadline, "Prometheus did not see the end of the run"
        time.sleep(0.5)
    return result


def test_every_series_of_the_run_is_there_and_no_other(watched: Watched) -> None:
    found = watched.server.get("/api/v1/label/__name__/values")["data"]
    ours = {name for name in found if name.startswith("ray_opd_")}
    assert ours == {series.exported_name for series in SERIES if series.name not in ABSENT}


def test_every_series_says_whose_it_is(watched: Watched) -> None:
    for item in watched.server.query('last_over_time({__name__=~"ray_opd_.+"}[10m])'):
        labels: Mapping[str, str] = item["metric"]
        assert (labels["run"], labels["experiment"], labels["seed"]) == (watched.folder.name, "lsm_block64", "3")
        assert labels["job"] == "ray" and labels["SessionName"].startswith("session_")


def test_gauges_show_the_last_step(watched: Watched) -> None:
    """Float by float what `metrics.jsonl` has."""
    compared = 0
    for series in SERIES:
        if series.kind is not Kind.gauge or not series.keys:
            continue
        values = watched.series(series.exported_name)
        for key in {key for row in watched.rows for key in row}:
            labels = series.labels_of(key)
            if labels is not None:
                assert values[tuple(labels.values())] == pytest.approx(watched.last(key), rel=1e-9), key
                compared += 1
    assert compared > 50
    assert watched.series("ray_opd_policy_version") == {(): NUM_STEPS}


def test_counters_are_the_sums(watched: Watched) -> None:
    tokens = sum(row.get("learner/tokens/loss", 0.0) for row in watched.rows)
    assert watched.series("ray_opd_trained_tokens_total") == {(): tokens}
    outcomes = watched.series("ray_opd_trajectories_total")
    assert outcomes[("trained", "")] == watched.last("replay/ledger/trained") > 0
    assert watched.last("replay/ledger/started") >= watched.last("replay/ledger/trained")


def test_the_values_are_plausible(watched: Watched) -> None:
    assert watched.series("ray_opd_staleness_steps")[("max",)] in (0.0, 1.0)
    assert all(0 <= value <= 1 for value in watched.series("ray_opd_wait_share").values())
    assert sum(watched.series("ray_opd_bottleneck").values()) == 1
    speeds = watched.series("ray_opd_tokens_per_second")
    assert set(speeds) == {("rollout",), ("teacher",), ("learner",)} and min(speeds.values()) > 0
    assert set(watched.series("ray_opd_restarts").values()) == {0.0}
    assert watched.series("ray_opd_gate_value")[("max",)] >= watched.series("ray_opd_gate_value")[("min",)] > 0


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_every_panel_is_an_expression_that_prometheus_answers(watched: Watched, title: str, expression: str) -> None:
    """Asked over the whole run, as Grafana does; panels of what the run has show something."""
    now = time.time()
    asked = in_prometheus(expression).replace("lsm-tiny-s0-x|opd-tiny-s1-y", watched.folder.name)
    answer = watched.server.get("/api/v1/query_range", query=asked, start=f"{now - 300}", end=f"{now}", step="1")
    assert answer["status"] == "success", answer
    is_absent = any(f"ray_{name}" in expression for name in ABSENT) or title == "Trajectories lost"
    assert is_absent != bool(answer["data"]["result"]), title


def test_the_dashboard_lists_the_groups_by_name(watched: Watched) -> None:
    assert {"rollout-0", "teacher-0", "learner-0"} <= watched.actors


def test_after_the_run_its_gauges_go_and_its_counters_stay(watched: Watched) -> None:
    run = f'{{run="{watched.folder.name}"}}'
    eventually(lambda: not watched.server.query(f"ray_opd_loss{run}"), within_s=30.0)
    assert watched.server.query(f"ray_opd_trained_tokens_total{run}")
