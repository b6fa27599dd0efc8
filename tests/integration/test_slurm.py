"""`launch/slurm.sbatch` under a real Slurm, whose daemons the test starts on loopback in a folder of its own.

Its two nodes are this machine twice, so that the script's way to several nodes is walked too.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.monitoring_stack import free_ports
from tests.integration.conftest import SHORT_JOB

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
# No accounting, no cgroups, no systemd: processes are followed by /proc.
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
PlugStackConfig={folder}/plugstack.conf
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def find(daemon: str) -> str | None:
    return shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A Slurm of two nodes; what a shell needs to submit to it."""
    if missing := [daemon for daemon in DAEMONS if find(daemon) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (Debian, Ubuntu: apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="opd-slurm-", dir="/tmp"))
    for name in ("state", "spool-n1", "spool-n2", "home"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    # Ports and folders of a job are named after its number.
    first_job = random.randrange(10_000, 60_000)
    controller_port, *node_ports = free_ports(3)
    text = CONF.format(
        folder=folder,
        user=getpass.getuser(),
        host=socket.gethostname(),
        cpus=os.cpu_count(),
        controller_port=controller_port,
        ports=node_ports,
        first_job=first_job,
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "plugstack.conf").touch()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM", "OPD_", "PYTHON"))}
    # A home of its own: Ray keeps its token there.
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "HOME": str(folder / "home"), "PYTHON": sys.executable}
    env |= {"HEAD_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log", "--num-threads=10"]
    # Forced, as it does not like the rights of a folder that nobody else may enter.
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}{len(daemons)}.log").open("wb") as log:
                daemon = [str(find(command[0])), *command[1:]]
                daemons.append(subprocess.Popen(daemon, env=env, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        wait_until_idle(env, folder)
        yield env
    finally:
        end_jobs(env)
        for process in reversed(daemons):
            process.terminate()
        for process in daemons:
            process.wait(timeout=60)
        for path in (folder, *(Path(f"/tmp/opd_ray-{first_job + number}") for number in range(2))):
            shutil.rmtree(path, ignore_errors=True)


def end_jobs(env: dict[str, str]) -> None:
    """End what a failed test left: a job's processes outlive Slurm's daemons."""
    subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=env, capture_output=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        queued = subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True)
        if not queued.stdout.strip():
            return
        time.sleep(0.5)


def wait_until_idle(env: dict[str, str], folder: Path) -> None:
    until = time.monotonic() + 60
    state = ""
    while time.monotonic() < until:
        shown = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True)
        state = shown.stdout.strip()
        if state == "idle":
            return
        time.sleep(0.5)
    logs = {path.name: path.read_text(errors="replace")[-1000:] for path in folder.glob("*.log")}
    pytest.fail(f"Slurm's node is not ready but {state!r}: {logs}")


def sbatch(env: dict[str, str], log: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = ["sbatch", "--wait", f"--output={log}", *options, "launch/slurm.sbatch", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def taken_dashboard_port() -> Iterator[None]:
    """Somebody on this machine has the port that Ray's dashboard takes if it is told of none."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # Somebody really has it.
            listener.bind(("127.0.0.1", 8265))
            listener.listen()
        yield


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("taken_dashboard_port")
def test_a_slurm_job_on_two_nodes_trains_to_its_end(slurm: dict[str, str], tmp_path: Path) -> None:
    runs, log = tmp_path / "runs", tmp_path / "job.log"
    job = sbatch(slurm, log, *SHORT_JOB, f"runs_dir={runs}", options=("--nodes=2",))
    out, _ = job.communicate(timeout=500)
    said = log.read_text() if log.exists() else out
    assert job.returncode == 0, said
    assert "2 node(s), OPD_SCALE=tiny" in said
    summary = json.loads((runs / "latest" / "summary.json").read_text())
    assert (summary["experiment"], summary["scale"], summary["steps"]) == ("lsm_block64", "tiny", 2)
    wait_until_idle(slurm, tmp_path)


def test_a_slurm_job_near_its_time_limit_ends_well(slurm: dict[str, str], tmp_path: Path) -> None:
    """Slurm's warning (SIGTERM to the script) ends the run as Ctrl-C does."""
    runs, log = tmp_path / "runs", tmp_path / "job.log"
    job = sbatch(slurm, log, *SHORT_JOB, "num_steps=5000", "checkpoint.every=1", f"runs_dir={runs}")
    until = time.monotonic() + 200
    while time.monotonic() < until and not list(runs.glob("*/checkpoints/step-*")):
        assert job.poll() is None, log.read_text()
        time.sleep(0.5)
    queued = subprocess.run(["squeue", "--noheader", "--format=%i"], env=slurm, capture_output=True, text=True)
    subprocess.run(["scancel", "--batch", "--signal=TERM", queued.stdout.strip()], env=slurm, check=True)
    job.communicate(timeout=100)
    assert job.returncode == 130, log.read_text()
    (folder,) = (path for path in runs.iterdir() if path.name != "latest")
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert "the same command resumes from step" in log.read_text()
    wait_until_idle(slurm, tmp_path)
