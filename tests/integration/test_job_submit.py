"""`launch/submit.sh` against a real Ray cluster: a job to its end, and one that fails; the cluster stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.monitoring_stack import free_ports
from tests.integration.conftest import SHORT_JOB

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head node on this machine's loopback; what a shell needs to talk to it."""
    # Short, as the paths of sockets may have 107 bytes; its own, as a ray.init() elsewhere would join it otherwise.
    folder = Path(tempfile.mkdtemp(prefix="opd-ray-", dir="/tmp"))
    port, agent_port = free_ports(2)
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for key in ("RAY_ADDRESS", "OPD_SCALE", "PYTHONPATH"):
        env.pop(key, None)
    options = ["--node-ip-address=127.0.0.1", "--port=0", f"--dashboard-port={port}", f"--temp-dir={folder}"]
    # The agent that takes jobs has one port by default, which the Ray of other tests in this session may have.
    options += [f"--dashboard-agent-listen-port={agent_port}"]
    options += ["--num-cpus=2", "--disable-usage-stats", "--include-log-monitor=false", "--block"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        wait_for_dashboard(head, env, folder / "head.log")
        yield env
    finally:
        children = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        head.wait(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=20)
        for process in alive:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_dashboard(head: subprocess.Popen[bytes], env: dict[str, str], log: Path) -> None:
    request = urllib.request.Request(
        f"{env['RAY_API_SERVER_ADDRESS']}/api/version", headers={"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"}
    )
    until = time.monotonic() + 120
    while time.monotonic() < until and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"Ray's head did not come up: {log.read_text()[-2000:]}")


def submit(env: dict[str, str], runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "submit.sh"), *SHORT_JOB, *arguments],
        env=env | {"PYTHON": sys.executable, "RUNS_DIR": str(runs), "OPD_SCALE": "tiny"},
        # From another folder, as nothing may depend on where it is called.
        cwd=runs.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_a_job_runs_to_its_end_and_its_log_is_followed(cluster: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = submit(cluster, runs)
    assert done.returncode == 0, done.stdout + done.stderr
    # The run's own words, and Ray's about the job.
    assert "saving the student" in done.stdout or "step 2/2" in done.stdout
    assert "succeeded" in done.stdout
    summary = json.loads((runs / "latest" / "summary.json").read_text())
    assert (summary["experiment"], summary["scale"], summary["steps"]) == ("lsm_block64", "tiny", 2)
    assert (runs / "latest" / "student" / "model.safetensors").is_file()


def test_a_job_that_fails_ends_with_a_code_and_its_reason(cluster: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = submit(cluster, runs, "teacher.top_k=45")
    assert done.returncode == 1
    assert "opd_ray: error: teacher.top_k=45" in done.stdout
    assert not runs.exists() or list(runs.iterdir()) == []
