"""A Ray cluster of one node with its dashboard, and a Prometheus beside it; both end with their `with`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS_CONFIG = ROOT / "launch" / "monitoring" / "prometheus.yml"
DISCOVERY_FILE = "prom_metrics_service_discovery.json"
LOOPBACK = "127.0.0.1"
# `ray start --block` gives its node up to 30 s to drain.
_STOP_S = 45.0


@dataclass(frozen=True, slots=True)
class RayHead:
    """The dashboard's `host:port`, the file that lists what can be scraped, and what a driver's environment needs."""

    dashboard: str
    discovery: Path
    environ: Mapping[str, str]

    def actors(self) -> list[dict[str, Any]]:
        """What the dashboard knows of the actors, dead ones included."""
        request = urllib.request.Request(
            f"http://{self.dashboard}/logical/actors", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return list(json.load(answer)["data"]["actors"].values())

    @property
    def token(self) -> str:
        """What the dashboard asks for."""
        return self.environ["RAY_AUTH_TOKEN"]


@contextlib.contextmanager
def ray_head(num_cpus: int, environ: Mapping[str, str] | None = None, start_s: float = 120.0) -> Iterator[RayHead]:
    """A Ray head node of its own with a dashboard on loopback; its temporary folder goes with it.

    Raises `RuntimeError` with the end of its log when it does not come up within `start_s` seconds.
    """
    dashboard_port, client_port = free_ports(2)
    # Ray makes sockets below it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"),
            *(f"--num-cpus={num_cpus}", f"--temp-dir={folder}", "--disable-usage-stats"),
            *("--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"),
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
            f"--ray-client-server-port={client_port}",
        ]
        # A token of its own: a driver that joins a cluster looks for one only where it is told to.
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **(environ or {})}
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with ended(command, env | given, Path(folder) / "head.log") as (process, log):
            found = wait_for(lambda: re.search(r"--address='([^']+)'", log.read_text()), process, log, start_s)
            discovery = Path(folder) / DISCOVERY_FILE
            # The dashboard is listed first, the node's agent, which has the metrics of the actors, a little later.
            wait_for(lambda: len(_targets(discovery)) >= 2, process, log, start_s)
            yield RayHead(f"{LOOPBACK}:{dashboard_port}", discovery, given | {"RAY_ADDRESS": found.group(1)})


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A server at `url`."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query, raises `ValueError` where Prometheus refuses the expression."""
        answer = self.get("/api/v1/query", query=expression)
        if answer["status"] != "success":
            raise ValueError(f"{expression}: {answer.get('error')}")
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def get(self, path: str, **arguments: str) -> dict[str, Any]:
        """A JSON answer of the HTTP API, also one that tells of an error."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(arguments)}", timeout=10) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))


@contextlib.contextmanager
def prometheus(binary: str, discovery: Path, folder: Path, scrape_interval: str = "1s") -> Iterator[Prometheus]:
    """A Prometheus with the shipped config, but for the discovery file and the interval; data go to `folder`."""
    config = yaml.safe_load(PROMETHEUS_CONFIG.read_text())
    config["global"] |= {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval}
    (job,) = config["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": scrape_interval}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        *(binary, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address={LOOPBACK}:{port}",
    ]
    server = Prometheus(f"http://{LOOPBACK}:{port}")
    with ended(command, dict(os.environ), folder / "prometheus.log") as (process, log):
        wait_for(lambda: _is_ready(server), process, log, 30.0)
        yield server


@contextlib.contextmanager
def ended(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process of its own session, asked to end at the end, and killed with its children where it does not."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(env), stdout=out, stderr=out, start_new_session=True)
    try:
        yield process, log
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, within_s: float) -> Any:
    """What `found` returns once it is true; raises `RuntimeError` when the process ended or time is up."""
    deadline = time.monotonic() + within_s
    while not (result := found()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not come up in {within_s:g} s: {log.read_text()[-2000:]}")
        time.sleep(0.2)
    return result


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for entry in sockets:
            entry.bind((LOOPBACK, 0))
        return [int(entry.getsockname()[1]) for entry in sockets]


def _targets(discovery: Path) -> list[str]:
    try:
        return [target for group in json.loads(discovery.read_text()) for target in group["targets"]]
    except (OSError, ValueError):
        return []


def _is_ready(server: Prometheus) -> bool:
    try:
        return bool(server.query("vector(1)"))
    except (OSError, ValueError):
        # Not listening yet, or listening and saying in plain words that it is not ready.
        return False
