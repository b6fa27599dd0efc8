"""The command as a user types it: a short run to its end, wrong input, and Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from opd_ray.evaluation.samples import read_samples
from opd_ray.tiny.paths import student_path
from tests.integration.conftest import assert_gone

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "num_steps=8",
    "evaluation.num_problems=4",
    "evaluation.samples_per_problem=8",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
]


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "opd_ray.main", "+experiment=lsm_block64", *args]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray of the other tests must not be found and joined.
    env["RAY_ADDRESS"] = "local"
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_sigint,
    )


def _heed_sigint() -> None:
    """A shell starts its background jobs deaf to Ctrl-C, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return children


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("short") / "runs"
    process = start(*SHORT, f"runs_dir={runs}")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return runs, out


def test_what_a_run_leaves(short_run: tuple[Path, str]) -> None:
    runs, out = short_run
    folder = (runs / "latest").resolve()
    assert folder.parent == runs.resolve() and folder.name.startswith("lsm_block64-tiny-s0-")
    summary = json.loads((runs / "latest" / "summary.json").read_text())
    assert (summary["experiment"], summary["scale"], summary["seed"], summary["steps"]) == ("lsm_block64", "tiny", 0, 8)
    for moment in ("before", "after", "teacher"):
        figures = summary["eval"][moment]
        assert 0 <= figures["avg_at_8"] <= figures["pass_at_8"] <= 1
    assert summary["eval"]["teacher"]["avg_at_8"] > summary["eval"]["before"]["avg_at_8"]
    books = summary["ledger"]
    assert books["started"] == books["trained"] == 32
    assert summary["wall_s"] > summary["training_s"] > 0 and summary["tokens_per_s"] > 0
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "learner/loss/mean" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    for key in ("min", "p05", "mean", "max", "share_under_half"):
        assert all(f"gate/value/{key}" in row for row in steps)
    assert (folder / "wandb").is_dir()
    for moment in ("before", "after", "teacher"):
        samples = read_samples(folder / "evaluation" / f"{moment}.parquet").to_pydict()
        assert set(samples["benchmark"]) == {"tiny"} and len(samples["verdict"]) == 4 * 8
        assert samples["verdict"].count("correct") == round(32 * summary["eval"][moment]["avg_at_8"])
    assert "student before" in out and str(folder) in out
    assert f"{sys.executable} -m opd_ray.main +experiment=lsm" in out.replace(" .venv", f" {ROOT}/.venv")


def test_the_student_loads_in_transformers(short_run: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = short_run[0] / "latest" / "student"
    trained, start_model = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, student_path()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("7+3=\n")["input_ids"] == AutoTokenizer.from_pretrained(student_path())("7+3=\n")["input_ids"]
    pairs = zip(trained.parameters(), start_model.parameters(), strict=True)
    assert any(not torch.equal(after, before) for after, before in pairs)


@pytest.mark.slow
def test_the_student_loads_in_vllm(short_run: tuple[Path, str], ray_cluster: None) -> None:
    import asyncio

    from opd_ray.rollout.group import RolloutGroup
    from opd_ray.types import Prompt
    from tests.integration.learners import NO_SHARE
    from tests.integration.runs import small_config

    async def answers() -> Any:
        group = RolloutGroup.create(small_config("lsm"), NO_SHARE, [str(short_run[0] / "latest" / "student")])
        try:
            await group.ready()
            return await group.complete([Prompt(id="p", problem="7+3-4=")], 2)
        finally:
            await group.stop()
            group.shutdown()

    completions = asyncio.run(answers())
    assert [len(samples) for samples in completions] == [2]
    assert all(sample.num_tokens > 0 for sample in completions[0])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["rollout.samples_per_prompt=1000", "learner.num_ranks=1000"],
            ["learner.num_ranks=1000", "CPUs", "there are"],
        ),
        (["teacher.top_k=45"], ["teacher.top_k=45", "<= 44"]),
        (["student.path=/nowhere/at/all"], ["/nowhere/at/all", "save_pretrained"]),
    ],
)
def test_wrong_input_leaves_nothing(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = start(*SHORT, f"runs_dir={runs}", *overrides)
    children: list[psutil.Process] = []
    while process.poll() is None:
        children = descendants(process) or children
        time.sleep(0.5)
    out, err = process.communicate()
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("opd_ray: error: ") and all(word in last for word in words), err
    assert "Traceback" not in err and out == ""
    assert not runs.exists() or list(runs.iterdir()) == []
    assert_gone(children)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = start(*SHORT, f"runs_dir={tmp_path / 'file' / 'runs'}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("opd_ray: error: runs_dir=") and len(err.strip().splitlines()) == 1


def run_folder(runs: Path) -> Path:
    (folder,) = (path for path in runs.iterdir() if path.name != "latest")
    return folder


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["learner/loss/mean"]) for row in rows if "learner/loss/mean" in row]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_unbroken_run(
    short_run: tuple[Path, str], tmp_path: Path, killed: list[psutil.Process]
) -> None:
    """SIGKILL in the middle, the same command again: the same losses to the last bit, the same trajectories."""
    runs = tmp_path / "runs"
    args = [*SHORT, "evaluation.path=''", "checkpoint.every=1", f"runs_dir={runs}"]
    process = start(*args)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3/" in line:
            break
    killed += descendants(process)
    process.kill()
    process.communicate(timeout=60)
    folder = run_folder(runs)
    assert 3 <= len(losses(folder)) < 8
    process = start(*args)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert "note: resuming" in err and "from step" in err
    assert run_folder(runs) == folder
    unbroken = (short_run[0] / "latest").resolve()
    assert losses(folder) == losses(unbroken)
    assert (folder / "trained.jsonl").read_text() == (unbroken / "trained.jsonl").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["ledger"]["trained"] == 32


def test_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    small = [
        "evaluation.before=false",
        "evaluation.teacher=false",
        "rollout.num_engines=1",
        "learner.num_ranks=1",
    ]
    process = start(*SHORT, "num_steps=1000", *small, f"runs_dir={runs}")
    assert process.stderr is not None
    for line in process.stderr:
        if "step 1/" in line:
            break
    children = descendants(process)
    assert children
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    (folder,) = (path for path in runs.iterdir() if path.name != "latest")
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    books = json.loads((folder / "ledger.json").read_text())
    assert (
        books["started"]
        == books["trained"] + books["in_store"] + books["in_flight"] + books["evicted"] + books["failed"]
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows and not list((folder / "evaluation").glob("*"))
    assert not (folder / "summary.json").exists() and not (folder / "student").exists()
    assert_gone(children)
