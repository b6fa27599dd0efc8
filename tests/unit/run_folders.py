"""Run folders with known answers, as the training command leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

GATES: dict[str, dict[str, Any]] = {
    "lsm": {"gate": {"kind": "off"}},
    "lsm_block64": {"gate": {"kind": "block"}},
    "lsm_block64_shuffle": {"gate": {"kind": "block", "control": "shuffle"}},
    "lsm_tis": {"gate": {"kind": "tis", "normalize": "none"}},
    "opd": {"objective": {"kind": "opd"}, "gate": {"kind": "off"}},
    "opd_block64": {"objective": {"kind": "opd"}, "gate": {"kind": "block"}},
    "opd_newline": {"objective": {"kind": "opd"}, "gate": {"kind": "newline"}},
}
VERDICTS = ("correct", "wrong", "no_answer", "unparseable", "timeout")


def config(experiment: str, seed: int, changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "experiment": experiment,
        "scale": "tiny",
        "seed": seed,
        "runs_dir": "runs",
        "data": {"path": "tiny:train", "fields": {}},
        "replay": {"reuse": 2, "max_staleness": 0},
        "teacher": {"support": "teacher_topk"},
        "objective": {"kind": "lsm", "mask_rules": []},
        "gate": {"kind": "off", "tau": 1.0, "normalize": "step", "control": "none", "block_size": 64},
        "telemetry": {"progress": True},
    }
    for part in (GATES.get(experiment, {}), changes or {}):
        for key, value in part.items():
            found[key] = {**found[key], **value} if isinstance(value, Mapping) else value
    return found


def write_run(
    runs: Path,
    experiment: str,
    seed: int,
    *,
    changes: Mapping[str, Any] | None = None,
    status: str = "finished",
    stamp: str = "20260101-000000",
    folder: str | None = None,
) -> Path:
    """A run folder without samples."""
    run = runs / (folder or f"{experiment}-tiny-s{seed}-{stamp}")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config(experiment, seed, changes)))
    (run / "status.json").write_text(
        json.dumps({"status": status, "error": "it broke" if status == "failed" else None})
    )
    if status == "finished":
        summary = {"steps": 40, "wall_s": 100.0 + seed, "training_s": 80.0, "tokens_per_s": 1000.0 + seed, "eval": {}}
        (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(experiment, seed)))
    return run


def metrics(experiment: str, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, len(experiment)])
    lines = []
    for step in range(1, 41):
        line = {
            "step": step,
            "time": 1.0,
            "learner/loss/mean": 0.3 * np.exp(-step / 15) + 0.01 * rng.random(),
            "learner/tokens/loss": 5000.0,
            "replay/staleness/mean": float((step + 1) % 2),
            "replay/staleness/max": float((step + 1) % 2),
        }
        if "lsm" != experiment != "opd":
            drift = 0.02 * np.exp(-step / 20) * (1 + 0.2 * rng.random()) * ((step + 1) % 2)
            line |= {
                "gate/measured_share": float((step + 1) % 2),
                "gate/value/p05": float(np.exp(-3 * drift)),
                "gate/effective_sample_share": 1 - drift / 10,
                "gate/drift_abs/measured_p50": drift,
                "gate/drift_abs/measured_p95": 4 * drift,
            }
        if step % 10 == 0:
            line["evaluation/avg_at_8"] = 0.8 - 0.5 * np.exp(-step / 15) + 0.02 * rng.standard_normal()
        lines.append(line)
    return lines


def write_samples(
    file: Path, correct: Mapping[str, Any], num_samples: int = 8, header: Mapping[str, Any] | None = None
) -> None:
    """`correct`: benchmark to `[P]` right samples of each problem, or to problem ids and those."""
    rows = []
    for benchmark, counts in correct.items():
        named = counts if isinstance(counts, Mapping) else {f"{benchmark}-{p}": c for p, c in enumerate(counts)}
        for index, (problem, right) in enumerate(named.items()):
            for sample in range(num_samples):
                verdict = "correct" if sample < right else VERDICTS[1 + (index + sample) % 4]
                rows.append((benchmark, problem, index, sample, verdict))
    benchmarks, problems, indices, samples, verdicts = zip(*rows, strict=True)
    length = len(rows)
    table = pa.table(
        {
            "benchmark": list(benchmarks),
            "problem_id": list(problems),
            "problem_index": pa.array(indices, pa.int32()),
            "sample": pa.array(samples, pa.int32()),
            "response": ["a response"] * length,
            "num_tokens": pa.array([100] * length, pa.int32()),
            "finish_reason": ["length" if verdict == "no_answer" else "stop" for verdict in verdicts],
            "extracted": pa.array(["1"] * length, pa.string()),
            "reference": ["1"] * length,
            "verdict": list(verdicts),
        },
        metadata={b"opd_ray": json.dumps(header or {}).encode()},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_after(run: Path, correct: Mapping[str, Any], num_samples: int = 8) -> None:
    write_samples(run / "evaluation" / "after.parquet", correct, num_samples)


def draw_correct(chance: float, seed: int, experiment: str, num_problems: int = 64, spread: float = 0.02) -> Any:
    """`[P]` right ones of 8, drawn with chances that differ by problem and, by `spread`, by seed."""
    hardness = np.random.default_rng(7).normal(0, 0.15, num_problems)
    rng = np.random.default_rng([seed, *experiment.encode()])
    return rng.binomial(8, np.clip(chance + hardness + rng.normal(0, spread), 0, 1))


def write_study(runs: Path, chances: Mapping[str, float], seeds: int = 5, **changes: Any) -> None:
    """Runs of several variants with samples, by their chance of a right answer."""
    for experiment, chance in chances.items():
        for seed in range(seeds):
            run = write_run(runs, experiment, seed, changes=changes)
            write_after(run, {"tiny": draw_correct(chance, seed, experiment)})
