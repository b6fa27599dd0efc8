"""Microbatch plans: nothing lost, budget held, ranks balanced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.data.packing import plan_microbatches
from opd_ray.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 200))
def test_plans_hold_what_they_promise(lengths: list[int], num_ranks: int, budget: int) -> None:
    plan = plan_microbatches(lengths, num_ranks, budget)
    assert len(plan) == num_ranks
    assert len({len(microbatches) for microbatches in plan}) == 1
    assert sorted(i for rank in plan for rows in rank for i in rows) == list(range(len(lengths)))
    for microbatches in plan:
        filled = [rows for rows in microbatches if rows]
        assert microbatches[: len(filled)] == tuple(filled), "empty microbatches come last"
        widths = [max(lengths[i] for i in rows) for rows in filled]
        assert widths == sorted(widths, reverse=True)
        for rows, width in zip(filled, widths, strict=True):
            assert len(rows) * width <= budget or len(rows) == 1
        for (first, following), width in zip(zip(filled, filled[1:], strict=False), widths, strict=False):
            assert (len(first) + 1) * width > budget, f"{following} could have begun in {first}"
    tokens = [sum(lengths[i] for rows in rank for i in rows) for rank in plan]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert any(all(rows for rows in microbatches) for microbatches in plan), "no microbatch is empty everywhere"
    assert plan == plan_microbatches(list(lengths), num_ranks, budget)


@given(st.integers(1, 30), st.integers(1, 5))
def test_equal_lengths_are_spread_evenly(count: int, num_ranks: int) -> None:
    plan = plan_microbatches([7] * count, num_ranks, 7)
    sizes = [sum(len(rows) for rows in rank) for rank in plan]
    assert max(sizes) - min(sizes) <= 1


def test_a_plan_by_example() -> None:
    plan = plan_microbatches([10, 4, 6, 4, 30], num_ranks=2, tokens_per_microbatch=20)
    assert plan == (((4,), ()), ((0, 2), (1, 3)))  # 30 is over the budget and stands alone


def test_no_trajectories_no_microbatches() -> None:
    assert plan_microbatches([], 2, 8) == ((), ())


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 ranks"):
        plan_microbatches([1], 0, 8)
    with pytest.raises(ConfigError, match="0 tokens a microbatch"):
        plan_microbatches([1], 1, 0)
    with pytest.raises(DataError, match="trajectory 1 has 0 tokens"):
        plan_microbatches([3, 0], 1, 8)
