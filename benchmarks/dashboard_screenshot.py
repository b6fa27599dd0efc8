"""Pictures of a tiny run being watched: the Actors page of Ray's dashboard, and what each group waited, in Prometheus.

    python -m benchmarks.dashboard_screenshot --out FOLDER

writes ``dashboard.png`` and ``prometheus.png`` (1280 x 800) to FOLDER; two minutes on two cores. Needs Debian's
packages `chromium`, `chromium-driver` and `prometheus`, and selenium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from benchmarks.monitoring_stack import ROOT, Prometheus, RayHead, ended, prometheus, ray_head, wait_for

SIZE = (1280, 800)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
# The cookie that the dashboard's own log-in form sets (Ray 2.60).
TOKEN_COOKIE = "ray-authentication-token"
TRAIN = (
    *("-m", "opd_ray.main", "+experiment=lsm_block64", "replay=overlap", "num_steps=400", "evaluation.path=''"),
    *("telemetry.wandb=disabled", "telemetry.progress=false"),
)
ACTORS = ("rollout-0", "teacher-0", "learner-0")
GRAPH = "max by (group) (ray_opd_wait_share)"
RUN_S, WATCHED_S, PAGE_S = 240.0, 45.0, 30.0


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(
        description="Take pictures of Ray's dashboard and of Prometheus during a tiny run."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the two PNG files")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver", "prometheus")}
    if missing := [name for name, path in programs.items() if path is None]:
        parser.error(f"{', '.join(missing)}: not installed (Debian: chromium, chromium-driver, prometheus)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quick = {"RAY_metrics_report_interval_ms": "1000"}
        with (
            ray_head(2, quick) as head,
            prometheus(str(programs["prometheus"]), head.discovery, folder) as server,
            running(head, server, folder),
            browser(programs, folder) as driver,
        ):
            shoot_actors(driver, head, out / "dashboard.png")
            time.sleep(WATCHED_S)
            shoot_waits(driver, server, out / "prometheus.png")


@contextmanager
def running(head: RayHead, server: Prometheus, folder: Path) -> Iterator[None]:
    """The tiny run from its first step on, interrupted at the end as by Ctrl-C."""
    command = [sys.executable, *TRAIN, f"runs_dir={folder / 'runs'}"]
    env = {**os.environ, **head.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with ended(command, env, folder / "run.log") as (process, log):
        wait_for(lambda: server.query("ray_opd_policy_version > 0"), process, log, RUN_S)
        yield
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


@contextmanager
def browser(programs: dict[str, str | None], folder: Path) -> Iterator[webdriver.Chrome]:
    """A headless Chromium that knows no host but this one."""
    options = Options()
    options.binary_location = str(programs["chromium"])
    for flag in (*FLAGS, f"--window-size={SIZE[0]},{SIZE[1]}", f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    # The window's size has a frame in it; the page's is what a picture shows.
    size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield driver
    finally:
        driver.quit()


def shoot_actors(driver: webdriver.Chrome, head: RayHead, file: Path) -> None:
    """Log in by the cookie, and wait until the page names all groups."""
    address = f"http://{head.dashboard}/"
    driver.get(address)
    driver.add_cookie({"name": TOKEN_COOKIE, "value": head.token, "path": "/"})
    driver.get(f"{address}#/actors")
    driver.refresh()
    until(lambda: all(name in text(driver) for name in ACTORS), PAGE_S, "the actors' names on the page")
    time.sleep(2.0)
    driver.execute_script(
        "const cell = [...document.querySelectorAll('td')].find(cell => cell.innerText.trim() === 'learner-0');"
        "if (cell) window.scrollTo(0, cell.getBoundingClientRect().top - 380)"
    )
    time.sleep(1.0)
    driver.save_screenshot(str(file))


def shoot_waits(driver: webdriver.Chrome, server: Prometheus, file: Path) -> None:
    """Prometheus' own graph of what each group waited in the last minute."""
    asked = {"g0.expr": GRAPH, "g0.tab": "0", "g0.range_input": "1m"}
    driver.get(f"{server.url}/graph?{urllib.parse.urlencode(asked)}")
    until(lambda: "rollout" in text(driver), PAGE_S, "the series on the page")
    time.sleep(2.0)
    driver.save_screenshot(str(file))


def text(driver: webdriver.Chrome) -> str:
    """What the page shows as text."""
    return str(driver.execute_script("return document.body.innerText"))


def until(found: Callable[[], Any], within_s: float, what: str) -> None:
    """Wait; raises `RuntimeError` that says what did not come."""
    deadline = time.monotonic() + within_s
    while not found():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come within {within_s:g} s")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
