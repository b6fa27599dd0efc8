"""Work goes to whoever has least, and the slow group is named: hand-made clocks."""

from __future__ import annotations

import pytest

from opd_ray.training.workload import GroupLoad, pipeline_metrics


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_worker_with_the_least_outstanding_cost_is_next() -> None:
    load = GroupLoad(3)
    chosen = []
    for cost in (5, 1, 2, 2, 1):
        chosen.append(load.least_loaded())
        load.begin(chosen[-1], cost)
    assert chosen == [0, 1, 2, 1, 2]
    load.end(0, 5)
    assert load.least_loaded() == 0


def test_idle_workers_take_turns_from_the_first() -> None:
    """So that a lock-step run asks the same engine for the same prompts each time."""
    load = GroupLoad(2)
    for _ in range(3):
        for expected in (0, 1):
            assert load.least_loaded() == expected
            load.begin(expected, 4)
        for worker in (1, 0):
            load.end(worker, 4)


def test_busy_time_is_the_union_of_open_calls() -> None:
    clock = Clock()
    load = GroupLoad(1, clock)
    load.begin(0, 1)
    clock.now += 2
    load.begin(0, 1)
    clock.now += 1
    load.end(0, 1)
    clock.now += 3
    load.end(0, 1)
    clock.now += 4
    load.done(7.5, 30)
    share, call_s, tokens = load.take()
    assert share == pytest.approx(0.6)
    assert (call_s, tokens) == (7.5, 30)


def test_a_call_that_is_open_counts_on_both_sides_of_a_take() -> None:
    clock = Clock()
    load = GroupLoad(2, clock)
    clock.now += 1
    with load.call(1, 10):
        clock.now += 3
        assert load.take()[0] == pytest.approx(3 / 8)
        clock.now += 2
    clock.now += 2
    assert load.take()[0] == pytest.approx(2 / 8)


def test_a_call_that_fails_ends_too() -> None:
    load = GroupLoad(2)
    with pytest.raises(ZeroDivisionError), load.call(0, 3):
        _ = 1 // 0
    assert load.least_loaded() == 0


def test_the_group_that_waits_least_is_the_bottleneck() -> None:
    clock = Clock()
    groups = {role: GroupLoad(1, clock) for role in ("rollout", "teacher", "learner")}
    for role, seconds in (("rollout", 1), ("teacher", 6), ("learner", 3)):
        with groups[role].call(0, 1):
            clock.now += seconds
        groups[role].done(seconds, 12)
    metrics = pipeline_metrics(groups)
    assert metrics["pipeline/wait_share/rollout"] == pytest.approx(0.9)
    assert metrics["pipeline/wait_share/teacher"] == pytest.approx(0.4)
    assert [metrics[f"pipeline/bottleneck/{role}"] for role in groups] == [0, 1, 0]
    assert metrics["teacher/tokens_per_s"] == 2
    assert metrics["time/learner_busy_s"] == 3
