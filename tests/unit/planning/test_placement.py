"""CPU and GPU shares: turns in lock-step, sums in overlap, and refusals with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.config.choices import PlacementStrategy
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ResourceError
from opd_ray.planning.node_fit import Demand, NodeResources, first_without_room, nodes_text
from opd_ray.planning.placement import ResourcePlan, plan_resources


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


PACK, SPREAD = PlacementStrategy.pack, PlacementStrategy.spread
STRICT_PACK, STRICT_SPREAD = PlacementStrategy.strict_pack, PlacementStrategy.strict_spread


def on(cfg: RunConfig, *nodes: tuple[float, float]) -> ResourcePlan:
    """The plan on nodes of so many CPUs and GPUs each."""
    found = [NodeResources(*node) for node in nodes]
    return plan_resources(cfg, sum(node.cpus for node in found), sum(node.gpus for node in found), found)


def test_an_even_share_is_at_most_a_node() -> None:
    """One rank of three nodes of two CPUs: it has one node, not six CPUs."""
    plan = on(config(ranks=1), (2, 0), (2, 0), (2, 0))
    assert (plan.rollout.threads, plan.teacher.threads, plan.learner.threads) == (2, 2, 2)
    overlapped = on(config(ranks=1, engines=2, staleness=1), (2, 0), (2, 0), (2, 0))
    assert [overlapped.rollout.ray_cpus, overlapped.teacher.ray_cpus, overlapped.learner.ray_cpus] == [1, 2, 2]


def test_even_shares_are_lowered_until_all_workers_find_a_node() -> None:
    """A third of eight CPUs is 2.67: two teachers of 1.33 do not fit beside each other on nodes of two."""
    plan = on(config(ranks=2, engines=2, staleness=1), (2, 0), (2, 0), (2, 0), (2, 0))
    shares = [plan.teacher] + 2 * [plan.rollout] + 2 * [plan.learner]
    demands = [Demand(str(number), 1, share.ray_cpus, 0, PACK) for number, share in enumerate(shares)]
    assert first_without_room([NodeResources(2, 0)] * 4, demands) is None
    assert plan.rollout.ray_cpus == pytest.approx(8 / 6 * 0.64, abs=1e-3)


def test_a_worker_that_fits_on_no_node_is_refused_with_what_each_has() -> None:
    cfg = config()
    cfg.rollout.num_cpus = 4
    with pytest.raises(ResourceError, match=r"worker of rollout asks for 4 CPUs.*nodes with 3 x \(2 CPUs, 0 GPUs\)"):
        on(cfg, (2, 0), (2, 0), (2, 0))
    cfg = config(ranks=1)
    cfg.rollout.num_gpus = 4
    with pytest.raises(
        ResourceError, match=r"4 GPUs, no node has them; .*2 x \(8 CPUs, 2 GPUs\): lower rollout.num_cpus"
    ):
        on(cfg, (8, 2), (8, 2))


@pytest.mark.parametrize(
    ("strategy", "ranks", "words"),
    [
        (STRICT_PACK, 3, r"learner: 3 x \(1 CPU, 1 GPU\) \(strict_pack\) finds no room"),
        (STRICT_SPREAD, 4, r"learner: 4 x \(1 CPU, 1 GPU\) \(strict_spread\) finds no room"),
    ],
)
def test_a_strict_placement_that_cannot_be_is_refused(strategy: PlacementStrategy, ranks: int, words: str) -> None:
    cfg = config(ranks=ranks)
    cfg.learner.num_gpus = cfg.learner.num_cpus = 1
    cfg.replay.max_staleness = 1
    nodes = [(8.0, 2.0)] * 3
    assert on(cfg, *nodes).learner.gpus == 1
    cfg.placement.learner = strategy
    with pytest.raises(ResourceError, match=words):
        on(cfg, *nodes)


@pytest.mark.parametrize(
    ("strategy", "fits"), [(PACK, True), (SPREAD, True), (STRICT_PACK, False), (STRICT_SPREAD, True)]
)
def test_what_the_strategies_ask_of_nodes(strategy: PlacementStrategy, fits: bool) -> None:
    nodes = [NodeResources(2, 0), NodeResources(2, 0), NodeResources(1, 0)]
    demand = Demand("learner", 3, 1, 0, strategy)
    assert (first_without_room(nodes, [demand]) is None) is fits
    assert first_without_room(nodes, [Demand("learner", 6, 1, 0, strategy)]) is not None


def test_workers_without_gpu_leave_the_nodes_that_have_some_to_the_others() -> None:
    nodes = [NodeResources(4, 1), NodeResources(8, 0)]
    demands = [Demand("rollout", 2, 4, 0, SPREAD), Demand("learner", 1, 4, 1, PACK)]
    assert first_without_room(nodes, demands) is None


def test_equal_nodes_are_named_together() -> None:
    nodes = [NodeResources(8, 4), NodeResources(1, 0), NodeResources(8, 4)]
    assert nodes_text(nodes) == "nodes with 1 x (1 CPU, 0 GPUs), 2 x (8 CPUs, 4 GPUs)"


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.lists(st.integers(1, 8), min_size=1)
)
def test_even_shares_always_find_room_or_there_are_more_workers_than_cpus(
    engines: int, workers: int, ranks: int, staleness: int, cpus: list[int]
) -> None:
    cfg = config(engines=engines, workers=workers, ranks=ranks, staleness=staleness)
    nodes = [NodeResources(count, 0) for count in cpus]
    if max(engines, workers, ranks) > sum(cpus):
        return
    plan = plan_resources(cfg, sum(cpus), 0, nodes)
    demands = [
        Demand(role, count, share.ray_cpus, 0, SPREAD)
        for role, count, share in [
            ("r", engines, plan.rollout),
            ("t", workers, plan.teacher),
            ("l", ranks, plan.learner),
        ]
    ]
    assert first_without_room(nodes, demands) is None
    assert all(1 <= share.threads <= max(cpus) for share in (plan.rollout, plan.teacher, plan.learner))
