"""A multirun as a user types it: real runs in one process and one folder, killed and typed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    "-m",
    "+experiment=lsm",
    "teacher.top_k=4,5",
    "num_steps=4",
    "evaluation.path=''",
    "checkpoint.every=1",
    "rollout.num_engines=1",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "learner.num_ranks=1",
]


def start(runs: Path) -> subprocess.Popen[str]:
    # A Ray that somebody started on this machine must not be joined.
    env = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    env |= {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "opd_ray.main", *COMMAND, f"runs_dir={runs}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stderr is not None
    yield from process.stderr


def num_head_nodes(process: subprocess.Popen[str]) -> int:
    children = psutil.Process(process.pid).children(recursive=True)
    return sum(child.name() == "gcs_server" for child in children)


def status(folder: Path) -> Any:
    return json.loads((folder / "status.json").read_text())["status"]


def run_folders(multirun: Path) -> list[Path]:
    return sorted((path for path in multirun.glob("lsm-*")), key=lambda path: path.stat().st_ctime)


@pytest.mark.timeout(600)
def test_a_multirun_that_is_killed_and_typed_again(tmp_path: Path, killed: list[psutil.Process]) -> None:
    runs = tmp_path / "runs"
    process = start(runs)
    seen = []
    for line in lines(process):
        seen.append(line)
        if "job 2 of the multirun" in line:
            # Each job has had a Ray of its own, which is gone.
            assert num_head_nodes(process) == 0
        if "step 2/" in line and any("job 2 of" in earlier for earlier in seen):
            break
    killed += psutil.Process(process.pid).children(recursive=True)
    assert num_head_nodes(process) == 1
    process.kill()
    process.communicate(timeout=60)
    (multirun,) = (runs / "multirun").iterdir()
    first, second = folders = sorted(multirun.glob("lsm-*"))
    assert (status(first), status(second)) == ("finished", "running")
    assert [path.name for path in runs.iterdir()] == ["multirun"]

    process = start(runs)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert f"opd_ray: note: skipped, {first} is complete" in err
    assert f"{second.name} from step" in err
    assert sorted(multirun.glob("lsm-*")) == folders
    assert [status(folder) for folder in folders] == ["finished", "finished"]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "learner/loss/mean" in row] == [1, 2, 3, 4]
        assert (folder / "student" / "model.safetensors").is_file()
    # What one run says stands in no other run's log, and each has a W&B run of its own.
    assert (first / "run.log").read_text().count("saving the student") == 1
    assert len(list(first.glob("wandb/offline-run-*"))) == 1
    assert os.readlink(multirun / "latest") == second.name
