"""Trained tokens/s against TRL's GKD on the same work, and at the tiny size seconds to the same held-out avg@8.

``python -m benchmarks.bench_vs_trl --size tiny``
``python -m benchmarks.bench_vs_trl --size smollm2 --student FOLDER --teacher FOLDER --data gsm8k_train.jsonl``

TRL runs in the environment that ``bash launch/oracles.sh`` makes (`--trl-python`), opd_ray by its command. Student,
teacher, prompts (ids and order), trajectories a step, token limit, temperature 1, precision (float32), optimizer and
learning rate are the same; TRL samples and trains in turns (`lmbda=1`) and takes the reverse KL over the whole
vocabulary (`beta=1`), opd_ray overlaps the two within the staleness bound and takes LSM over the teacher's top K.
Tokens are response tokens in a loss; each trajectory is used once (`replay.reuse=1`), so that none counts twice. The
first steps are left out, and as many of the last as opd_ray samples ahead: in between it samples what it trains.

Runs of the two take turns. Start-up is not part of tokens/s and stands by itself; a clock for quality is that of runs
without evaluation, as evaluation between steps would let opd_ray's engines run ahead for free. `cpu_s_per_step` is
less disturbed by other work on the machine than wall seconds are.

The last line printed is the record as JSON; `--out` adds it to a file that holds both sizes. Exit code 1 when a check
fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import check, machine, spread
from benchmarks.trl_sides import ROOT, Run, TrlOptions, make_config, run_ours, run_trl
from opd_ray.config.checks import announcements
from opd_ray.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Size:
    """A size's work (`shared`), how opd_ray runs it (`ours`), and what is to be reached."""

    shared: tuple[str, ...]
    ours: tuple[str, ...]
    steps: int
    warmup: int
    target: str
    evaluate_every: int = 0


SIZES = {
    "tiny": Size(
        shared=(
            "scale=tiny",
            "rollout.prompts_per_step=8",
            "rollout.samples_per_prompt=4",
            "rollout.max_response_tokens=160",
            "rollout.top_p=1.0",
        ),
        ours=("replay.max_staleness=4", "rollout.num_engines=1", "learner.num_ranks=1"),
        steps=120,
        warmup=10,
        target=">= 1.0",
        evaluate_every=10,
    ),
    "smollm2": Size(
        shared=(
            "scale=smollm2",
            "rollout.prompts_per_step=2",
            "rollout.samples_per_prompt=8",
            "rollout.max_response_tokens=128",
            "rollout.top_p=1.0",
            "student.dtype=float32",
            "teacher.dtype=float32",
            # GKD's teacher sees what the student sees.
            "teacher.template=chat",
            "evaluation.path=''",
        ),
        ours=(
            "replay.max_staleness=2",
            "rollout.num_engines=1",
            "learner.num_ranks=1",
            "rollout.max_num_seqs=48",
            # Room for the samples of a prompt in one microbatch.
            "learner.tokens_per_microbatch=2304",
        ),
        steps=14,
        warmup=4,
        target=">= 2.5",
    ),
}


def side(runs: Sequence[Run], window: slice) -> dict[str, Any]:
    """Figures of one side's runs: tokens/s of whole runs and of single steps, start-up, and where the time goes."""
    counted = [run.steps[window] for run in runs]
    seconds = [second for run in runs for second in run.step_seconds()[window]]
    steps = [step for part in counted for step in part]
    roles = sorted({role for run in runs for role in run.cpu_s_per_step(window)})
    cpu = {role: statistics.median(run.cpu_s_per_step(window).get(role, 0.0) for run in runs) for role in roles}
    return {
        "trained_tokens_per_s": spread([run.tokens_per_s(window) for run in runs]),
        "trained_tokens_per_s_of_a_step": spread(
            [step.tokens / second for step, second in zip(steps, seconds, strict=True)]
        ),
        "step_s": spread(seconds),
        "tokens_per_step": statistics.mean(step.tokens for step in steps),
        "startup_s": spread([run.startup_s for run in runs]),
        "cpu_s_per_step": cpu | {"all": sum(cpu.values())},
        "medians": {
            key: statistics.median(step.details[key] for step in steps if key in step.details)
            for key in sorted({key for step in steps for key in step.details})
        },
    }


def quality(runs: Sequence[Run], graded: Run, target: float) -> dict[str, Any]:
    """When a side first reached `target`: the step of the graded run, by the median clock of the others."""
    by_step = {
        step: {"avg_at_8": value, "training_s": statistics.median(run.seconds_to(step) for run in runs)}
        for step, value in sorted(graded.quality.items())
    }
    reached = next((step for step, value in sorted(graded.quality.items()) if step and value >= target), None)
    found: dict[str, Any] = {"step": reached, "training_s": None, "with_startup_s": None, "by_step": by_step}
    if reached is not None:
        found["training_s"] = by_step[reached]["training_s"]
        found["with_startup_s"] = found["training_s"] + statistics.median(run.startup_s for run in runs)
    return found


class Bench:
    """Runs of both sides in a folder that goes away, or stays where the caller wants it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        size = SIZES[args.size]
        steps = args.steps or size.steps
        models = [
            f"{name}.path={path}" for name, path in (("student", args.student), ("teacher", args.teacher)) if path
        ]
        data = [f"data.path={args.data.resolve()}"] if args.data else []
        self.size = size
        self.shared = [f"+experiment={args.experiment}", *size.shared, f"num_steps={steps}", *models, *data]
        self.ours = [*size.ours, "replay.reuse=1", *args.set]
        # At the end nothing is sampled for steps that will not come: the last ones have the machine for themselves.
        ahead = self.config().replay.max_staleness + 1
        self.window = slice(min(size.warmup, steps // 2), max(steps // 2 + 1, steps - ahead))
        self.trl = TrlOptions(args.trl_python, args.trl_threads, args.trl_accumulation, args.trl_wait_policy)
        self._folder = folder
        self._count = 0

    def config(self, *overrides: str) -> RunConfig:
        """The config of opd_ray's side."""
        return make_config([*self.shared, *self.ours, *overrides])

    def run_trl(self, evaluate_every: int = 0) -> Run:
        """One run of TRL's side."""
        return self._noted("trl", run_trl(self.trl, self.config(), self._next(), evaluate_every))

    def run_ours(self, overrides: Sequence[str] = (), evaluate_every: int = 0) -> Run:
        """One run of opd_ray's side."""
        every = [*self.shared, *self.ours, *overrides]
        return self._noted("opd_ray", run_ours(every, self._next(), evaluate_every))

    def _next(self) -> Path:
        self._count += 1
        return self._folder / f"run-{self._count}"

    def _noted(self, name: str, run: Run) -> Run:
        rate = run.tokens_per_s(self.window)
        sys.stderr.write(f"{name}: {rate:.0f} tokens/s, start-up {run.startup_s:.0f} s, {len(run.steps)} steps\n")
        return run


def facts(cfg: RunConfig, bench: Bench, trl: Run) -> dict[str, Any]:
    """What both sides work on, and how each is set."""
    return {
        "student": Path(cfg.student.path).name,
        "teacher": Path(cfg.teacher.path).name,
        "prompts": Path(cfg.data.path).name,
        "trajectories_per_step": cfg.trajectories_per_step,
        "max_response_tokens": cfg.rollout.max_response_tokens,
        "temperature": cfg.rollout.temperature,
        "precision": {"engine": cfg.student.dtype.name, "teacher": cfg.teacher.dtype.name, "learner": "float32"},
        "steps": cfg.num_steps,
        "counted_steps": [bench.window.start + 1, bench.window.stop],
        "learner": {
            "lr": cfg.learner.lr,
            "lr_schedule": cfg.learner.lr_schedule.name,
            "beta2": cfg.learner.beta2,
            "weight_decay": cfg.learner.weight_decay,
            "grad_clip": cfg.learner.grad_clip,
        },
        "loss": {"trl": "reverse KL, whole vocabulary", "opd_ray": f"{cfg.experiment}, top {cfg.teacher.top_k}"},
        "opd_ray": [text for text in (*bench.size.shared, *bench.ours) if "path" not in text],
        "opd_ray_notes": announcements(cfg),
        "trl": trl.about,
    }


def measure(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """All runs, as one record."""
    size, window = bench.size, bench.window
    variants: dict[str, list[str]] = {}
    for text in args.variant:
        name, *overrides = text.split()
        variants[name] = overrides
    trl: list[Run] = []
    ours: list[Run] = []
    others: dict[str, list[Run]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        trl.append(bench.run_trl())
        ours.append(bench.run_ours())
        for name, overrides in variants.items():
            others[name].append(bench.run_ours(overrides))
    figures: dict[str, Any] = {"trl": side(trl, window), "opd_ray": side(ours, window)}
    figures["variants"] = {name: {"overrides": variants[name], **side(runs, window)} for name, runs in others.items()}
    ratio = _median_ratio(ours, trl, lambda run: run.tokens_per_s(window))
    figures["ratio"] = ratio
    figures["ratio_cpu"] = figures["trl"]["cpu_s_per_step"]["all"] / figures["opd_ray"]["cpu_s_per_step"]["all"]
    checks = [check(f"{args.size}/trained_tokens_ratio_to_trl", ratio, size.target)]
    if size.evaluate_every and not args.no_quality:
        found = {
            "trl": quality(trl, bench.run_trl(size.evaluate_every), args.target_avg),
            "opd_ray": quality(ours, bench.run_ours(evaluate_every=size.evaluate_every), args.target_avg),
        }
        figures["quality"] = {"target_avg_at_8": args.target_avg, **found}
        seconds = [found[name]["training_s"] for name in ("trl", "opd_ray")]
        # A side that never reaches it takes for ever.
        faster = (seconds[0] or float("inf")) / seconds[1] if seconds[1] else 0.0
        checks.append(check(f"{args.size}/seconds_to_avg_at_8_of_trl_over_ours", min(faster, 1e9), size.target))
    return {
        "benchmark": "vs_trl",
        "size": args.size,
        "machine": machine(),
        "workload": facts(bench.config(), bench, trl[0]),
        "figures": figures,
        "checks": checks,
    }


def _median_ratio(ours: Sequence[Run], trl: Sequence[Run], figure: Callable[[Run], float]) -> float:
    """The median over pairs of runs that stood next to each other."""
    return statistics.median(figure(mine) / figure(theirs) for mine, theirs in zip(ours, trl, strict=True))


def add_to(file: Path, record: dict[str, Any]) -> None:
    """Put the record in its size's place in `file`, which keeps the other size."""
    sizes: dict[str, Any] = json.loads(file.read_text())["sizes"] if file.is_file() else {}
    sizes[record["size"]] = {key: value for key, value in record.items() if key not in ("benchmark", "size")}
    checks = [item for part in sizes.values() for item in part["checks"]]
    file.write_text(json.dumps({"benchmark": "vs_trl", "sizes": sizes, "checks": checks}, indent=1) + "\n")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--student", help="folder; the tiny size has an embedded one")
    parser.add_argument("--teacher", help="folder; the tiny size has an embedded one")
    parser.add_argument("--data", type=Path, help="JSONL with problem and solution; the tiny size makes its own")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of a run, 0 = the size's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--experiment", default="lsm", help="opd_ray's loss, see conf/experiment")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="config keys; TRL follows shared ones"
    )
    parser.add_argument(
        "--variant", action="append", default=[], metavar="'NAME KEY=VALUE ...'", help="opd_ray once more, set so"
    )
    parser.add_argument("--no-quality", action="store_true", help="leave out seconds to the same avg@8")
    parser.add_argument("--target-avg", type=float, default=0.7, help="the avg@8 to reach")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-oracles/bin/python")
    parser.add_argument("--trl-threads", type=int, default=2)
    parser.add_argument("--trl-accumulation", type=int, default=1, help="parts that TRL cuts a step's batch into")
    parser.add_argument("--trl-wait-policy", default="ACTIVE", choices=["ACTIVE", "PASSIVE"], help="of OpenMP threads")
    parser.add_argument("--keep", type=Path, help="folder for what the runs write; else it is removed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.trl_python.is_file():
        parser.error(f"{args.trl_python} is missing: bash launch/extra_environment.sh oracles, or --trl-python")
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as scratch:
        record = measure(args, Bench(args, args.keep or Path(scratch)))
    if args.out is not None:
        add_to(args.out, record)
    print(json.dumps(record))
    return 0 if all(item["ok"] for item in record["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
