"""What `launch/monitoring/` ships: a config that Prometheus takes, and a dashboard that asks only for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_ray.telemetry.exported_series import RUN_LABELS, SERIES

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana_dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
LABELS = {series.exported_name: {*RUN_LABELS, *series.labels} for series in SERIES}
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", [])]
GRID_COLUMNS = 24


def in_prometheus(expression: str) -> str:
    """The expression with Grafana's variables as Grafana would fill them in."""
    return expression.replace("$__rate_interval", "1m").replace("$run", "lsm-tiny-s0-x|opd-tiny-s1-y")


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_prometheus_takes_the_config(promtool: str) -> None:
    done = run(promtool, "check", "config", str(FOLDER / "prometheus.yml"))
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_the_config_reads_what_ray_lists() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_every_expression_parses(promtool: str, tmp_path: Path) -> None:
    """As recording rules, since that is how promtool checks expressions without a server."""
    rules = [{"record": f"panel:{i}", "expr": in_prometheus(expr)} for i, (_, expr) in enumerate(EXPRESSIONS)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = run(promtool, "check", "rules", str(file))
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr
    file.write_text(file.read_text().replace("max by", "max bye", 1))
    assert run(promtool, "check", "rules", str(file)).returncode != 0


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_an_expression_asks_only_for_what_the_run_exports(title: str, expression: str) -> None:
    names = set(re.findall(r"ray_[a-z_]+", expression))
    assert len(names) == 1 and names <= set(LABELS), title
    (name,) = names
    used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    for group in re.findall(r"by \(([^)]*)\)", expression):
        used |= {label.strip() for label in group.split(",")}
    assert used <= LABELS[name], title
    assert '{run=~"$run"' in expression, "not templated by run"
    if name.endswith("_total"):
        assert "rate(" in expression or "sum by" in expression


def test_the_label_values_that_are_asked_for_exist() -> None:
    for _, expression in EXPRESSIONS:
        for name, matchers in re.findall(r"(ray_[a-z_]+)\{([^}]*)\}", expression):
            (series,) = (series for series in SERIES if series.exported_name == name)
            for label, values in re.findall(r'(\w+)(?:=~|!=)"([^"$]+)"', matchers):
                for value in values.split("|"):
                    assert label in series.labels and value in series.keys, (name, label, value)


def test_legends_show_labels_that_survive_the_aggregation() -> None:
    for panel in PANELS:
        for target in panel.get("targets", []):
            (name,) = set(re.findall(r"ray_[a-z_]+", target["expr"]))
            kept = re.search(r"by \(([^)]*)\)", target["expr"])
            labels = {label.strip() for label in kept.group(1).split(",")} if kept else LABELS[name]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


def test_what_the_issue_asks_for_has_a_panel() -> None:
    shown = {name for _, expression in EXPRESSIONS for name in re.findall(r"ray_[a-z_]+", expression)}
    for wanted in (
        *("staleness_steps", "gate_value", "drift_nats", "store_trajectories", "tokens_per_second", "wait_share"),
        *("bottleneck", "loss", "evaluation_avg_at_n", "restarts", "publish_seconds", "policy_version"),
    ):
        assert f"ray_opd_{wanted}" in shown


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids) and all(isinstance(number, int) and number > 0 for number in ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= GRID_COLUMNS
        for column in range(place["x"], place["x"] + place["w"]):
            for line in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((column, line), panel["title"]) == panel["title"]
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_panels_use_the_chosen_data_source_and_known_units() -> None:
    for panel in PANELS:
        if panel["type"] == "row":
            continue
        assert panel["type"] == "timeseries" and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in {"short", "s", "bytes", "percentunit"}
        assert [target["refId"] for target in panel["targets"]] == list("ABCD"[: len(panel["targets"])])
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_the_dashboard_is_templated_by_data_source_and_run() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "run"}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    asked = re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["query"]["query"])
    assert asked is not None and asked.group(1) in LABELS
    assert variables["run"]["includeAll"] and variables["run"]["multi"]


def test_the_readme_names_every_exported_series() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`(ray_opd_[a-z_]+)", text)) == set(LABELS)
    for series in SERIES:
        for label in series.labels:
            assert re.search(rf"`{series.exported_name}\{{[^`]*{label}[^`]*\}}`", text), series.exported_name
