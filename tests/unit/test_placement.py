"""CPU and GPU shares: turns in lock-step, sums in overlap, and refusals with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.config import RunConfig
from opd_ray.errors import ResourceError
from opd_ray.placement import plan_resources


def config(*, engines: int = 1, workers: int = 1, ranks: int = 2, staleness: int = 0) -> RunConfig:
    cfg = RunConfig()
    cfg.rollout.num_engines, cfg.teacher.num_workers, cfg.learner.num_ranks = engines, workers, ranks
    cfg.replay.max_staleness = staleness
    return cfg


def test_in_lock_step_each_group_has_the_whole_machine() -> None:
    plan = plan_resources(config(), 2, 0)
    assert (plan.rollout.threads, plan.teacher.threads, plan.learner.threads) == (2, 2, 1)
    assert plan.rollout.ray_cpus + plan.teacher.ray_cpus + 2 * plan.learner.ray_cpus <= 2


def test_overlapping_groups_share_it() -> None:
    plan = plan_resources(config(staleness=1), 12, 0)
    assert (plan.rollout.threads, plan.teacher.threads, plan.learner.threads) == (4, 4, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": 8}, ["learner.num_ranks=8", "8 CPUs", "there are 2"]),
        ({"engines": 3}, ["rollout.num_engines=3", "there are 2"]),
    ],
)
def test_more_workers_than_cpus_are_refused(change: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ResourceError) as caught:
        plan_resources(config(**change), 2, 0)
    assert all(word in str(caught.value) for word in words)


def test_explicit_shares_are_checked_alone_and_together() -> None:
    cfg = config(staleness=1)
    cfg.rollout.num_cpus, cfg.teacher.num_cpus, cfg.learner.num_cpus = 2, 2, 1
    with pytest.raises(ResourceError, match="together ask for 6 CPUs .*there are 4"):
        plan_resources(cfg, 4, 0)
    cfg.replay.max_staleness = 0
    assert plan_resources(cfg, 4, 0).rollout.threads == 2
    cfg.teacher.num_cpus = 5
    with pytest.raises(ResourceError, match=r"teacher.num_cpus=5 asks for 5 CPUs, there are 4"):
        plan_resources(cfg, 4, 0)


def test_gpus_are_counted() -> None:
    cfg = config(ranks=2)
    cfg.learner.num_gpus = cfg.rollout.num_gpus = 1
    with pytest.raises(ResourceError, match=r"asks for 3 GPUs .*there are 2"):
        plan_resources(cfg, 8, 2)
    assert plan_resources(cfg, 8, 3).learner.gpus == 1


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 4), st.integers(1, 64))
def test_even_shares_never_exceed_the_machine(
    engines: int, workers: int, ranks: int, staleness: int, cpus: int
) -> None:
    cfg = config(engines=engines, workers=workers, ranks=ranks, staleness=staleness)
    if max(engines, workers, ranks) > cpus:
        with pytest.raises(ResourceError):
            plan_resources(cfg, cpus, 0)
        return
    plan = plan_resources(cfg, cpus, 0)
    groups = [(engines, plan.rollout), (workers, plan.teacher), (ranks, plan.learner)]
    assert sum(count * share.ray_cpus for count, share in groups) <= cpus + 1e-9
    assert all(share.threads >= 1 for _, share in groups)
    assert all(count * share.threads <= max(cpus, count) for count, share in groups)
