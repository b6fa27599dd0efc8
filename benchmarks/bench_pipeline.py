"""The asynchronous pipeline: what overlap brings, what the system adds to a step, and what new weights cost.

``python -m benchmarks.bench_pipeline [--parts tiny stages publication] [--quick] [--out FILE]``

- `tiny`: the real command at the tiny scale, every trajectory used once, with `replay.max_staleness` 0, 1, 2 and 4, and
  at 2 with `rollout.on_new_weights` partial, finish and abort: trained tokens/s, how long each group waits and which is
  the slow one, the staleness met, and what the publications cost.
- `stages`: the real controller and store with an engine, a teacher and a learner that only sleep, each equally long:
  the time of a step over that of a stage, by staleness bound.
- `publication`: weights of a model of 135 M parameters in float32 from the learner to the engines, part by part, while
  the engines rest and while they decode.

The last line printed is the record as JSON. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import pipeline_publication, pipeline_runs, pipeline_stages
from benchmarks.machine import finish, machine
from benchmarks.pipeline_runs import QUICK_VARIANTS, VARIANTS, TinyOptions
from benchmarks.pipeline_stages import StageWork

PARTS = ("tiny", "stages", "publication")
BOUNDS, QUICK_BOUNDS = (0, 1, 2, 3, 4), (2,)


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this benchmark's own."""
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def run_tiny(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs of the real command."""
    options = TinyOptions(args.experiment, args.steps, args.warmup, args.repeats, tuple(args.set))
    variants = QUICK_VARIANTS if args.quick else VARIANTS
    found = pipeline_runs.measure(options, variants, folder)
    return {"workload": asdict(options), "figures": found, "checks": pipeline_runs.checks(found, variants)}


def run_stages(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Actors that sleep."""
    work = StageWork(stage_s=args.stage_s)
    bounds = QUICK_BOUNDS if args.quick else BOUNDS
    with local_ray():
        found = asyncio.run(pipeline_stages.measure(work, bounds, args.stage_steps))
    workload = asdict(work) | {"steps": args.stage_steps}
    return {"workload": workload, "figures": found, "checks": pipeline_stages.checks(found, bounds)}


def run_publication(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Weights of a larger model."""
    model = args.student or pipeline_publication.save_random_model(folder / "random-135m")
    with local_ray():
        found = asyncio.run(pipeline_publication.measure(model, args.engines, args.rounds))
    workload = {"model": Path(model).name, "engines": args.engines, "sequences": pipeline_publication.SEQUENCES}
    return {"workload": workload, "figures": found, "checks": []}


RUN = {"tiny": run_tiny, "stages": run_stages, "publication": run_publication}


def arguments() -> argparse.Namespace:
    """The command line; `--quick` changes what was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="less of everything: a check under two minutes")
    parser.add_argument("--experiment", default="lsm", help="tiny: see conf/experiment")
    parser.add_argument("--steps", type=int, help="tiny: optimizer steps of a run (26, quick 10)")
    parser.add_argument("--warmup", type=int, help="tiny: first steps that are not counted (6, quick 3)")
    parser.add_argument("--repeats", type=int, default=1, help="tiny: runs of each variant")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="tiny: config keys")
    parser.add_argument("--stage-s", type=float, default=0.5, help="stages: seconds of a stage")
    parser.add_argument("--stage-steps", type=int, help="stages: optimizer steps of a run (20, quick 14)")
    parser.add_argument("--student", help="publication: model folder; default a random one")
    parser.add_argument("--engines", type=int, default=1, help="publication: rollout engines")
    parser.add_argument("--rounds", type=int, help="publication: publications of each kind (5, quick 2)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name, usual, quick in (("steps", 26, 10), ("warmup", 6, 3), ("stage_steps", 20, 14), ("rounds", 5, 2)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    return args


def main() -> int:
    """Command line; returns the exit code."""
    args = arguments()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # So that a kind word ends what was started; Ray does the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pipeline-") as scratch:
        for name in args.parts:
            begun = time.monotonic()
            parts[name] = RUN[name](args, Path(scratch))
            parts[name]["wall_s"] = time.monotonic() - begun
            sys.stderr.write(f"{name}: done in {parts[name]['wall_s']:.0f} s\n")
    checks = [item for part in parts.values() for item in part.pop("checks")]
    record = {"benchmark": "pipeline", "machine": machine(), **parts, "checks": checks}
    return finish(record, args.out)


if __name__ == "__main__":
    sys.exit(main())
