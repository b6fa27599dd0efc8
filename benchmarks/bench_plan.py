"""How near the planner's numbers are: short real runs, and the peak memory of each process against what was predicted.

``python -m benchmarks.bench_plan [--scales tiny smollm2] [--student FOLDER] [--data FILE.jsonl] [--out FILE.json]``

Measured is the peak of a process's private memory (RssAnon of /proc/PID/status, read every 0.2 s) over the whole run.
Predicted is `opd_ray.planning` for the same config, with responses of full length; pages of libraries and of Ray's
object store are shared and left out on both sides. smollm2 needs a model folder and GSM8K (conf/README.md, Scales).
The last line printed is the record as JSON. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from benchmarks.machine import check, finish, machine
from opd_ray.cluster.probe import this_machine
from opd_ray.main import conf_dir
from opd_ray.plan import PlanConfig
from opd_ray.planning.amounts import expected
from opd_ray.planning.model_files import read_shape
from opd_ray.planning.whole_plan import make_plan
from opd_ray.training.sources import model_path

MIB = 2**20
EVERY_S = 0.2
ROLES = {"ray::RolloutWorker": "rollout", "ray::LearnerWorker": "learner", "ray::TeacherWorker": "teacher"}
REST = "driver, store and Ray"
COMMON = ["+experiment=lsm_block64", "telemetry.wandb=disabled", "resume=never", "checkpoint.every=0"]


def overrides(scale: str, args: argparse.Namespace) -> list[str]:
    """The command's arguments for a short run of a scale."""
    if scale == "tiny":
        return [*COMMON, "num_steps=6", "evaluation.num_problems=16", "evaluation.every=0", "evaluation.teacher=false"]
    model = [f"student.path={args.student}", f"teacher.path={args.student}", f"data.path={args.data}"]
    return [*COMMON, f"scale={scale}", *model, "num_steps=2", "evaluation.path=''"]


def predicted(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """MiB of each amount of one worker, by role."""
    ConfigStore.instance().store(name="run_schema", node=PlanConfig)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg: Any = OmegaConf.to_object(compose("run", list(arguments)))
    student, teacher = (read_shape(model_path(path)) for path in (cfg.student.path, cfg.teacher.path))
    needs = make_plan(cfg, student, teacher, this_machine()).needs
    return {
        need.role: {"all": expected(need.host) / MIB} | {a.name: a.expected / MIB for a in need.host}
        for need in needs.workers
    }


def private_mib(process: psutil.Process) -> tuple[str, float]:
    """Role of a process, and its private memory."""
    line = " ".join(process.cmdline())
    role = next((role for start, role in ROLES.items() if line.startswith(start)), REST)
    for entry in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if entry.startswith("RssAnon:"):
            return role, int(entry.split()[1]) / 1024
    return role, 0.0


def measured(arguments: Sequence[str]) -> dict[str, list[float]]:
    """Peak MiB of each process by role during one run; of the rest, the median of their sum.

    While actors start, their processes have no name yet and count as the rest.
    """
    peaks: dict[str, dict[int, float]] = {role: {} for role in ROLES.values()}
    rests = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "opd_ray.main", *arguments, f"runs_dir={folder}"]
        # A Ray of its own, whatever else runs on the machine.
        run = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {"RAY_ADDRESS": "local"})
        root = psutil.Process(run.pid)
        while run.poll() is None:
            rest = 0.0
            for process in [root, *root.children(recursive=True)]:
                try:
                    role, mib = private_mib(process)
                except (psutil.Error, OSError):
                    continue
                if role == REST:
                    rest += mib
                else:
                    peaks[role][process.pid] = max(mib, peaks[role].get(process.pid, 0.0))
            rests.append(rest)
            time.sleep(EVERY_S)
        if run.returncode:
            raise SystemExit(f"the run failed with exit code {run.returncode}: {' '.join(command)}")
    return {role: sorted(values.values()) for role, values in peaks.items()} | {REST: [statistics.median(rests)]}


def compare(scale: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of a scale, and their ratios."""
    arguments = overrides(scale, args)
    plan, found = predicted(arguments), measured(arguments)
    ratios = {role: plan[role]["all"] / max(found[role]) for role in plan}
    # Paths of this machine are no part of the record.
    shown = [text.split("=")[0] + "=..." if "path=" in text and "=''" not in text else text for text in arguments]
    return {"arguments": shown, "predicted_mib": plan, "measured_mib": found, "predicted_over_measured": ratios}


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", nargs="+", choices=["tiny", "smollm2"], default=["tiny"])
    parser.add_argument("--student", help="folder of the student, for smollm2")
    parser.add_argument("--data", help="GSM8K as JSONL, for smollm2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {scale: compare(scale, args) for scale in args.scales}
    checks = []
    for scale, sides in found.items():
        for role, ratio in sides["predicted_over_measured"].items():
            checks.append(check(f"{scale}/{role}/predicted_over_measured", ratio, "<= 1.3"))
            checks.append(check(f"{scale}/{role}/predicted_over_measured", ratio, ">= 0.77"))
    record = {"benchmark": "plan", "machine": machine(), "scales": found, "checks": checks}
    return finish(record, args.out)


if __name__ == "__main__":
    sys.exit(main())
