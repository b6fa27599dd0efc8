"""Three Ray nodes on this machine, of which one dies in the middle of a run: SIGKILL to its raylet, and all is gone.

The command runs in a process of its own, so that the Ray of the other tests is left alone. A node's processes and its
part of the object store end with its raylet, as with a machine that loses power.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 100 * 2**20
NODE: dict[str, Any] = {"num_cpus": 4, "object_store_memory": STORE_BYTES}
# A lost node is noticed after some seconds instead of half a minute.
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
WORKERS = ("RolloutWorker", "TeacherWorker", "LearnerWorker")
SMALL = [
    "scale=tiny",
    "num_steps=10",
    "replay.max_staleness=2",
    "replay.reuse=2",
    "rollout.num_engines=2",
    "teacher.num_workers=2",
    "rollout.num_cpus=1",
    "teacher.num_cpus=1",
    "learner.num_cpus=1",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=64",
    "evaluation.path=''",
    "checkpoint.every=3",
    "faults.max_restarts=6",
    "deadline_s=180",
    "logger=none",
    "telemetry.progress=false",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # A folder of its own: `ray.init` joins the cluster that wrote its address into the usual one last.
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        head = {**NODE, "include_dashboard": False, "_system_config": HEALTH}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        yield nodes
        nodes.shutdown()  # type: ignore[no-untyped-call]


def nodes_of(cluster: Cluster) -> list[Any]:
    nodes: list[Any] = cluster.list_all_nodes()  # type: ignore[no-untyped-call]
    return nodes


def with_three_nodes(cluster: Cluster) -> Cluster:
    while len(nodes_of(cluster)) < 3:
        cluster.add_node(**NODE)
    return cluster


def workers_on(node: Any) -> Counter[str]:
    """How many workers of which kind a node runs."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    titles = [" ".join(process.cmdline()[:1]) for process in raylet.children(recursive=True)]
    return Counter(kind for kind in WORKERS for title in titles if kind in title)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of a file of the only run."""
    found = list(folder.glob(f"*/{name}"))
    return (
        [json.loads(line) for line in found[0].read_text().splitlines(keepends=True) if line.endswith("\n")]
        if found
        else []
    )


def train_and_lose(cluster: Cluster, folder: Path, choose: Callable[[Any], bool], *overrides: str) -> Counter[str]:
    """Run the command, and end a node that `choose` agrees with after the third step; what ran on that node."""
    command = [sys.executable, "-m", "opd_ray.main", "+experiment=lsm_block64", *SMALL, f"runs_dir={folder}"]
    env = os.environ | {"RAY_ADDRESS": cluster.address, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "out.txt").open("w") as out:
        run = subprocess.Popen([*command, *overrides], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 240
            while len(lines(folder, "metrics.jsonl")) < 3 and run.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            assert run.poll() is None, (folder / "out.txt").read_text()[-3000:]
            others = [node for node in nodes_of(cluster) if node is not cluster.head_node]
            victim = max((node for node in others if choose(node)), key=lambda node: workers_on(node).total())
            lost = workers_on(victim)
            cluster.remove_node(victim, allow_graceful=False)
            assert run.wait(timeout=240) == 0, (folder / "out.txt").read_text()[-3000:]
        finally:
            run.kill()
            run.wait()
    return lost


def assert_complete(folder: Path, reuse: int = 2) -> dict[str, float]:
    """Every step once, no trajectory too often, the books; the last step's metrics."""
    metrics = lines(folder, "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 11))
    trained = lines(folder, "trained.jsonl")
    uses = Counter(pair for line in trained for pair in zip(line["trajectory_ids"], line["uses"], strict=True))
    assert set(uses.values()) == {1} and max(use for _, use in uses) <= reuse
    books = json.loads(next(folder.glob("*/ledger.json")).read_text())
    ended = books["trained"] + books["evicted"] + books["failed"]
    assert books["started"] == ended + books["in_store"] + books["in_flight"]
    return metrics[-1]


def test_a_node_with_engines_or_teachers_dies_and_no_step_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    with_three_nodes(cluster)
    lost = train_and_lose(cluster, tmp_path, lambda node: not workers_on(node)["LearnerWorker"])
    last = assert_complete(tmp_path)
    assert lost["RolloutWorker"] + lost["TeacherWorker"] > 0
    assert last["faults/restarts/learner"] == 0
    assert last["faults/restarts/rollout"] + last["faults/restarts/teacher"] > 0


def test_a_node_with_a_learner_rank_dies_and_the_run_goes_back_to_its_checkpoint(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Two ranks on two nodes: the one that lives waits for the other in a collective call."""
    with_three_nodes(cluster)
    lost = train_and_lose(
        cluster,
        tmp_path,
        lambda node: workers_on(node)["LearnerWorker"] == 1,
        "learner.num_ranks=2",
        "placement.learner=strict_spread",
    )
    last = assert_complete(tmp_path)
    assert lost["LearnerWorker"] == 1
    assert last["faults/restarts/learner"] >= 1
    log = next(tmp_path.glob("*/run.log")).read_text()
    assert "continuing from step 3: " in log and "steps are done again" in log
