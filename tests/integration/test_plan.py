"""The planner on a real Ray, and the check at a job's start, which ends a run before any actor is started."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray

from opd_ray.cluster import probe as cluster_probe
from opd_ray.cluster.machine import read_machine
from opd_ray.errors import ResourceError
from opd_ray.planning.cluster import Cluster, Node
from opd_ray.training import session
from tests.integration.runs import small_config


def test_rays_nodes_are_read(ray_cluster: None) -> None:
    (node,) = asyncio.run(cluster_probe.ray_cluster()).nodes
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    assert (node.cpus, node.gpus, node.gpu_bytes) == (2, 0, None)
    assert node.object_store == resources["object_store_memory"]
    assert node.memory == pytest.approx(read_machine().memory, rel=0.01)
    assert node.free is not None


def test_a_run_that_cannot_fit_ends_before_any_actor(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tiny_cluster() -> Cluster:
        return Cluster((Node("small", cpus=2, memory=2**20, object_store=2**20),), "test")

    started: list[Any] = []
    monkeypatch.setattr(session, "ray_cluster", tiny_cluster)
    monkeypatch.setattr(session.Session, "_start", lambda *args: started.append(args))
    cfg = small_config("lsm_block64", f"runs_dir={tmp_path}")
    with pytest.raises(ResourceError, match=r"^node small needs at least .* of memory .*there are 1\.0 MiB"):
        session.run_session(cfg, "", {})
    assert started == []
    # Nothing is left behind by a run that has not begun.
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("lsm_block64")]
