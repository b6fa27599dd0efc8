"""Turns a finished run folder into one JSON record with machine, versions, figures and checks.

``python -m benchmarks.record_run runs/latest --out benchmarks/results/NAME.json [--check "wall_s<=300" ...]``

The last line printed is the record without its table of steps. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, spread

# What a reader of the record wants to see of every step.
STEP_KEYS = (
    "time/step_s",
    "time/wait_for_batch_s",
    "time/learner_busy_s",
    "time/publish_s",
    "time/rollout_busy_s",
    "time/teacher_busy_s",
    "time/tokens_per_s",
    "rollout/tokens_per_s",
    "teacher/tokens_per_s",
    "learner/tokens_per_s",
    "learner/loss/mean",
    "learner/kl_to_teacher/mean",
    "learner/grad_norm",
    "replay/staleness/max",
    "gate/drift_abs/mean",
    "gate/drift_abs/max",
    "gate/value/min",
    "gate/value/p05",
    "gate/value/mean",
    "gate/value/share_under_half",
    "gate/effective_sample_share",
    "gate/engine_mismatch/mean",
    "gate/engine_mismatch/rms",
)
COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Spread of each step metric (zeros of turns not taken left out), and single figures of the run."""
    found: dict[str, Any] = {}
    for key in STEP_KEYS:
        values = [row[key] for row in rows if row.get(key) is not None]
        if key.endswith(("_busy_s", "publish_s")):
            values = [value for value in values if value > 1e-4]
        if values:
            found[key] = spread(values)
    found["steps"] = summary["steps"]
    found["wall_s"] = summary["wall_s"]
    found["training_s"] = summary["training_s"]
    found["tokens_per_s"] = summary["tokens_per_s"]
    for moment, figures_of in summary["eval"].items():
        for key, value in (figures_of or {}).items():
            if key.startswith(("avg_at", "pass_at_8")):
                found[f"{moment}/{key}"] = value
    before, after, teacher = (found.get(f"{moment}/avg_at_8") for moment in ("before", "after", "teacher"))
    if before is not None and after is not None and teacher is not None and teacher > before:
        found["gap_closed"] = (after - before) / (teacher - before)
    return found


def check(text: str, found: dict[str, Any]) -> dict[str, Any]:
    """One check such as ``wall_s<=300``; a figure with a spread is judged by its median."""
    match = re.fullmatch(r"([\w/]+)(<=|>=)([-\d.e]+)", text)
    if match is None or match.group(1) not in found:
        raise SystemExit(f"check {text!r} is not FIGURE<=NUMBER or FIGURE>=NUMBER of {sorted(found)}")
    name, comparison, target = match.groups()
    value = found[name]["median"] if isinstance(found[name], dict) else found[name]
    return {
        "name": name,
        "value": value,
        "target": comparison + target,
        "ok": COMPARISONS[comparison](value, float(target)),
    }


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="append", default=[])
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text())
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "learner/loss/mean" in row]
    found = figures(steps, summary)
    record = {
        "benchmark": f"{summary['experiment']}-{summary['scale']}-s{summary['seed']}",
        "machine": machine(),
        "figures": found,
        "ledger": summary["ledger"],
        "checks": [check(text, found) for text in args.check],
    }
    table = [{"step": row["step"], **{key: row[key] for key in STEP_KEYS if key in row}} for row in steps]
    args.out.write_text(json.dumps({**record, "steps": table}, indent=1) + "\n")
    print(json.dumps(record))
    return 0 if all(item["ok"] for item in record["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
