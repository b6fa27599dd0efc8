"""Waiting for room: soon over, silent at first, then said once, and an error with the numbers in the end."""

from __future__ import annotations

import asyncio
import logging

import pytest

from opd_ray.cluster import placement as placement_groups
from opd_ray.cluster.placement import Placement
from opd_ray.config.choices import PlacementStrategy
from opd_ray.errors import ResourceError
from opd_ray.planning.node_fit import NodeResources
from opd_ray.planning.placement import Share


class Room(Placement):
    """Room for its two workers is there after so many looks."""

    def __init__(self, num_looks: int) -> None:
        super().__init__("teacher", Share(ray_cpus=2, gpus=0, threads=1), 2, PlacementStrategy.spread)
        self.num_looks = num_looks

    async def _placed(self) -> list[bool]:
        self.num_looks -= 1
        return [True, self.num_looks < 0]


@pytest.fixture(autouse=True)
def ray_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster; what it would say."""
    monkeypatch.setattr(placement_groups, "placement_group", lambda bundles, strategy: (bundles, strategy))
    monkeypatch.setattr(placement_groups, "cluster_nodes", lambda: [NodeResources(1.0, 0.0)])
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 0.5})
    monkeypatch.setattr(placement_groups, "LOOK_S", 0.02)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_short_wait_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(Room(num_looks=5).wait(deadline_s=20))
    assert warnings(caplog) == []


def test_a_longer_wait_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_groups, "_PATIENCE_S", 0.03)
    asyncio.run(Room(num_looks=9).wait(deadline_s=20))
    (line,) = warnings(caplog)
    assert line.startswith("teacher: 2 x (2 CPUs, 0 GPUs)") and line.endswith("may be in use by others")


def test_no_room_in_time_is_an_error_with_what_there_is() -> None:
    with pytest.raises(ResourceError, match=r"teacher: 2 x .* found no room in 0.\d+ s; .* free of all are 0.5 CPUs"):
        asyncio.run(Room(num_looks=1000).wait(deadline_s=0.05))
