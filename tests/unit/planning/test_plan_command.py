"""The verb: the same arguments as training, a table, and one line where a number does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opd_ray.cluster import probe as cluster_probe
from opd_ray.cluster.machine import read_machine
from opd_ray.main import conf_dir

ROOT = Path(__file__).resolve().parents[3]
LINE = ["+experiment=lsm_block64", "scale=qwen3_1p7b"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd_ray.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_papers_line_is_planned_without_a_gpu_or_a_hub() -> None:
    done = run(*LINE, "+hardware=8xa800_80g")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("1,720,574,976 parameters", "masters, moments", "KV cache for 32 sequences", "teacher -> store"):
        assert words in done.stdout
    assert "learner x 2, rollout x 4, teacher x 2" in done.stdout
    assert done.stdout.endswith("\nit fits\n")


def test_what_does_not_fit_is_one_line_and_exit_code_1() -> None:
    done = run(*LINE, "+hardware=8xrtx4090_24g", "learner.num_ranks=1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("opd_ray: error: learner needs at least 26.6 GiB a GPU")
    assert "there are 23.5 GiB: set learner.num_ranks=2" in line
    assert "does not fit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hardware.nodes=1"], "hardware.cpus_per_node=0"),
        (["+hardware=8xa800_80g", "student.path=tiny:nothing"], "tiny:nothing"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: str) -> None:
    done = run(*LINE, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("opd_ray: error: ")
    assert words in line


def test_every_hardware_file_can_be_planned_for() -> None:
    names = sorted(path.stem for path in (conf_dir() / "hardware").glob("*.yaml"))
    assert names == ["8xa800_80g", "8xrtx4090_24g"]
    for name in names:
        assert run("+experiment=opd", "scale=tiny", f"+hardware={name}").returncode == 0


def test_this_machine_is_read() -> None:
    machine = read_machine()
    assert 0 < machine.free <= machine.memory
    assert machine.cpus >= 1
    (node,) = cluster_probe.this_machine().nodes
    assert (node.memory, node.cpus) == (machine.memory, machine.cpus)


def test_the_memory_of_gpus_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '81559\\n24564\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (node,) = cluster_probe.this_machine().nodes
    assert (node.gpus, node.gpu_bytes) == (2, 24564 * 2**20)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert read_machine().gpus == ()


def test_the_cluster_that_training_would_join_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster_probe.running_cluster() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    assert cluster_probe.running_cluster() == "127.0.0.1:6379"
    for address, found in (("10.0.0.1:6379", "10.0.0.1:6379"), ("local", None)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster_probe.running_cluster() == found
