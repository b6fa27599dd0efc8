"""Part `tiny` of `bench_pipeline`: runs of the real command, each as its own process, and what their steps tell."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import check

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("rollout", "teacher", "learner")
# Of these a run tells one value a publication, of the others one a step.
PUBLICATION = ("time/publish_s", "publish/bytes", "publish/standstill_s/max", "publish/aborted_tokens")
STOP_S = 30.0

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs between the runs."""

    max_staleness: int
    on_new_weights: str = "partial"

    @property
    def name(self) -> str:
        """How the record calls it."""
        return f"staleness_{self.max_staleness}_{self.on_new_weights}"

    @property
    def overrides(self) -> list[str]:
        """What the command is told."""
        return [f"replay.max_staleness={self.max_staleness}", f"rollout.on_new_weights={self.on_new_weights}"]


VARIANTS = (*(Variant(bound) for bound in (0, 1, 2, 4)), Variant(2, "finish"), Variant(2, "abort"))
QUICK_VARIANTS = (Variant(0), Variant(2))


@dataclass(frozen=True, slots=True)
class TinyOptions:
    """How the runs are made; of `steps` the first `warmup` are not counted."""

    experiment: str
    steps: int
    warmup: int
    repeats: int
    overrides: tuple[str, ...]


def measure(options: TinyOptions, variants: Sequence[Variant], folder: Path) -> dict[str, Any]:
    """Runs of all variants, in turns, as figures by variant."""
    windows: dict[Variant, list[list[Row]]] = {variant: [] for variant in variants}
    for repeat in range(options.repeats):
        for variant in variants:
            rows = run(options, variant, folder / f"{variant.name}-{repeat}")
            windows[variant].append(steady(rows, variant, options.warmup))
            sys.stderr.write(f"tiny {variant.name}: {_rate(windows[variant][-1]):.0f} tokens/s\n")
    found = {variant.name: variant_figures(parts) for variant, parts in windows.items()}
    base = found[variants[0].name]["trained_tokens_per_s"]
    for figures in found.values():
        figures["ratio_to_first"] = figures["trained_tokens_per_s"] / base
    return found


def checks(found: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The bound must hold in every run, and only `abort` may throw tokens away."""
    made = []
    for variant in variants:
        figures = found[variant.name]
        title, bound = f"tiny/{variant.name}/staleness_max", f"<= {variant.max_staleness}"
        made.append(check(title, figures["staleness"]["max"], bound))
        if variant.on_new_weights != "abort":
            aborted = figures["publication"]["publish/aborted_tokens"]["sum"]
            made.append(check(f"tiny/{variant.name}/aborted_tokens", aborted, "<= 0"))
    return made


def run(options: TinyOptions, variant: Variant, folder: Path) -> list[Row]:
    """One run of the command; the metrics of its steps. A failure ends the benchmark with the run's last lines."""
    command = [
        sys.executable,
        "-m",
        "opd_ray.main",
        f"+experiment={options.experiment}",
        "scale=tiny",
        f"num_steps={options.steps}",
        "replay.reuse=1",
        *variant.overrides,
        "evaluation.path=''",
        "logger=none",
        "resume=never",
        "telemetry.progress=false",
        f"runs_dir={folder}",
        *options.overrides,
    ]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)}
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    with log.open("w") as output, _process(command, os.environ | quiet, output) as process:
        code = process.wait()
    if code:
        raise SystemExit("\n".join([*log.read_text().splitlines()[-15:], f"{variant.name} failed with code {code}"]))
    metrics = next(folder.glob("*/metrics.jsonl")).read_text().splitlines()
    return [row for row in map(json.loads, metrics) if "learner/loss/mean" in row]


@contextmanager
def _process(command: Sequence[str], env: Mapping[str, str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            # The command ends its actors and its Ray itself, if it is given the time.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def steady(rows: Sequence[Row], variant: Variant, warmup: int) -> list[Row]:
    """The steps in which all groups have work, each with the seconds since the one before as `step_s`.

    Left out are the warm-up and the last steps, for which nothing new is sampled any more.
    """
    timed: list[Row] = [
        {**row, "step_s": row["time"] - before["time"]} for before, row in zip(rows, rows[1:], strict=False)
    ]
    kept = timed[max(0, warmup - 1) : len(timed) - variant.max_staleness]
    if not kept:
        raise SystemExit(f"{variant.name}: {len(rows)} steps leave none after {warmup} of warm-up: give more --steps")
    return kept


def _rate(rows: Sequence[Row]) -> float:
    return float(sum(row["learner/tokens/loss"] for row in rows) / sum(row["step_s"] for row in rows))


def variant_figures(windows: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Figures of one variant over the steady steps of its runs."""
    rows = [row for window in windows for row in window]
    rates = [row["learner/tokens/loss"] / row["step_s"] for row in rows]
    return {
        # Of whole windows: steps come in bursts, so that single ones say less.
        "trained_tokens_per_s": statistics.median(_rate(window) for window in windows),
        "trained_tokens_per_s_of_a_step": quartiles(rates),
        "step_s": quartiles([row["step_s"] for row in rows]),
        "tokens_per_step": statistics.mean(row["learner/tokens/loss"] for row in rows),
        "wait_share": {role: _mean(rows, f"pipeline/wait_share/{role}") for role in ROLES},
        "bottleneck_share": {role: _mean(rows, f"pipeline/bottleneck/{role}") for role in ROLES},
        "busy_s": {role: _mean(rows, f"time/{role}_busy_s") for role in ROLES},
        "staleness": {
            "mean": _mean(rows, "replay/staleness/mean"),
            "max": max(row["replay/staleness/max"] for row in rows),
        },
        "publication": {
            key: quartiles(values) | {"sum": sum(values)}
            for key in PUBLICATION
            if (values := [row[key] for row in rows if key in row])
        },
    }


def _mean(rows: Sequence[Row], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return statistics.mean(values) if values else 0.0


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": first, "q3": third, "min": min(values), "max": max(values), "n": len(values)}
