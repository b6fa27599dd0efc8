"""What a learner rank is told of a step: its own trajectories and payloads, and of the others no more than it needs."""

from __future__ import annotations

import pytest

from opd_ray.config.schema import RunConfig
from opd_ray.data.packing import plan_microbatches
from opd_ray.learner.spec import LearnerSpec, rank_batches, recorded_places
from opd_ray.replay.batch import SampledBatch
from opd_ray.types import SampleInfo


def info(trajectory_id: int, num_uses: int, staleness: int = 0) -> SampleInfo:
    return SampleInfo(trajectory_id, staleness, num_uses, 0.0, 10, 100 - trajectory_id)


def test_a_rank_gets_its_own_rows_and_payloads_only() -> None:
    rows = ((0, 0), (0, 1), (1, 0), (2, 3), (2, 1))
    batch = SampledBatch(("a", "b", "c"), rows, tuple(info(trajectory_id, 1) for trajectory_id in range(5)))
    plan = plan_microbatches([110 - trajectory_id for trajectory_id in range(5)], 2, 300)
    parts = rank_batches(batch, plan, 7, 2)
    seen = []
    for (part, refs), microbatches in zip(parts, plan, strict=True):
        places = sorted(place for members in microbatches for place in members)
        assert part.microbatches == microbatches
        assert sorted(part.rows) == sorted(part.infos) == places
        assert sorted(refs) == sorted({batch.refs[rows[place][0]] for place in places})
        for place in places:
            payload, row = part.rows[place]
            assert (refs[payload], row) == (batch.refs[rows[place][0]], rows[place][1])
            assert part.infos[place] == batch.infos[place]
        assert (part.policy_version, part.is_fresh, part.last_uses) == (7, True, ())
        seen += places
    assert sorted(seen) == list(range(5))


def test_every_rank_knows_of_stale_trajectories_and_of_last_visits_elsewhere() -> None:
    batch = SampledBatch(("a",), ((0, 0), (0, 1), (0, 2)), (info(0, 1), info(1, 2, 1), info(2, 1)))
    parts = rank_batches(batch, plan_microbatches([5, 5, 5], 3, 100), 0, 2)
    assert [(part.is_fresh, part.last_uses) for part, _ in parts] == [(False, (1,))] * 3


def test_every_rank_forgets_what_was_lost_before() -> None:
    batch = SampledBatch(("a",), ((0, 0), (0, 1)), (info(4, 1), info(5, 2)))
    parts = rank_batches(batch, plan_microbatches([5, 5], 2, 100), 0, 2, lost=(1, 2))
    assert [part.last_uses for part, _ in parts] == [(5, 1, 2)] * 2


def test_a_rank_without_trajectories_gets_none() -> None:
    batch = SampledBatch(("a",), ((0, 0),), (info(0, 1),))
    _, (part, refs) = rank_batches(batch, plan_microbatches([5], 2, 100), 0, 1)
    assert (part.rows, part.infos, refs, part.microbatches) == ({}, {}, [], ((),))


def test_dumped_trajectories_are_spread_over_the_step_and_every_visit_has_the_same() -> None:
    rows = tuple((0, place) for place in range(8))
    plan = plan_microbatches([5] * 8, 2, 20)
    found = []
    for use in (1, 2):
        batch = SampledBatch(("a",), rows, tuple(info(40 + place, use, use - 1) for place in range(8)))
        parts = rank_batches(batch, plan, use - 1, 2, 3)
        for part, _ in parts:
            assert set(part.dumped) <= set(part.rows), "a rank dumps its own trajectories only"
        found.append(sorted(part.infos[place].trajectory_id for part, _ in parts for place in part.dumped))
    assert found == [[40, 42, 45]] * 2


@pytest.mark.parametrize(
    ("num_trajectories", "num_recorded", "places"),
    [(32, 0, ()), (32, 1, (0,)), (32, 2, (0, 16)), (3, 2, (0, 1)), (2, 5, (0, 1)), (0, 3, ())],
)
def test_at_most_the_whole_step_is_dumped(num_trajectories: int, num_recorded: int, places: tuple[int, ...]) -> None:
    assert recorded_places(num_trajectories, num_recorded) == places


def test_nothing_is_dumped_unless_the_config_asks_for_it_and_there_is_a_folder() -> None:
    cfg = RunConfig()
    assert LearnerSpec(cfg, 0, "m", 1, "folder").num_recorded == 0
    cfg.telemetry.record_trajectories = 2
    assert LearnerSpec(cfg, 0, "m", 1, "folder").num_recorded == 2
    assert LearnerSpec(cfg, 0, "m", 1).num_recorded == 0
