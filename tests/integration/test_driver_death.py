"""SIGKILL of the driver at every stage of a run: the same command resumes, and ends as an unbroken run does."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration.test_command import SHORT, descendants, losses, run_folder, start

pytestmark = pytest.mark.integration

PROBLEMS = ["evaluation.num_problems=4", "evaluation.samples_per_problem=4", "evaluation.teacher=false"]


def folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.iterdir() if path.name != "latest") if runs.is_dir() else []


def has_file(pattern: str) -> Callable[[Path], bool]:
    return lambda runs: any(any(folder.glob(pattern)) for folder in folders(runs))


def has_log(text: str) -> Callable[[Path], bool]:
    def found(runs: Path) -> bool:
        logs = [folder / "run.log" for folder in folders(runs)]
        return any(text in log.read_text() for log in logs if log.exists())

    return found


def has_steps(count: int) -> Callable[[Path], bool]:
    def found(runs: Path) -> bool:
        files = [folder / "metrics.jsonl" for folder in folders(runs)]
        return any(file.read_text().count("learner/loss/mean") >= count for file in files if file.exists())

    return found


# In the order of a run; from the third on there is a checkpoint to resume from.
STAGES: list[tuple[str, Callable[[Path], bool]]] = [
    ("starting the groups", has_log("starting engines")),
    ("evaluating before", has_log("evaluating the student before")),
    ("training", has_steps(3)),
    ("writing a checkpoint", has_file("checkpoints/.step-*.partial/*")),
    ("training again", has_steps(6)),
    ("evaluating after", has_log("evaluating the student after")),
    ("saving", has_log("saving the student")),
]


def kill_at(process: subprocess.Popen[str], runs: Path, is_there: Callable[[Path], bool]) -> list[psutil.Process]:
    """Kill the driver as soon as it is at a stage; returns what it leaves behind."""
    until = time.monotonic() + 200
    while not is_there(runs):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)
    left = descendants(process)
    process.kill()
    process.communicate(timeout=60)
    return left


def test_the_same_command_resumes_wherever_the_driver_was_killed(tmp_path: Path, killed: list[psutil.Process]) -> None:
    args = [*SHORT, *PROBLEMS, "num_steps=7", "checkpoint.every=2"]
    unbroken = start(*args, f"runs_dir={tmp_path / 'unbroken'}")
    _, err = unbroken.communicate(timeout=280)
    assert unbroken.returncode == 0, err
    runs = tmp_path / "killed"
    for _, is_there in STAGES:
        # A stage that was passed before the last death is reached again at once: resuming is killed as well.
        killed += kill_at(start(*args, f"runs_dir={runs}"), runs, is_there)
    num_lines = len((folders(runs)[-1] / "trained.jsonl").read_text().splitlines())
    process = start(*args, f"runs_dir={runs}")
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert "from step 6" in err and num_lines == 7
    assert "1 steps after step 6 had no checkpoint yet and are done again" in err
    # Runs that were killed before their first checkpoint are left as they were.
    finished = [
        folder for folder in folders(runs) if json.loads((folder / "status.json").read_text())["status"] == "finished"
    ]
    (folder,) = finished
    assert losses(folder) == losses(run_folder(tmp_path / "unbroken"))
    assert (folder / "trained.jsonl").read_text() == (run_folder(tmp_path / "unbroken") / "trained.jsonl").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("faults/redone_steps", 0) for row in rows) >= 1
