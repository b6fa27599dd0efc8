"""Microbatch plans: nothing lost, budget held, ranks balanced."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.data.packing import MICROBATCH_COST, Plan, PromptKey, least_work, plan_microbatches, together, work_of
from opd_ray.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def assert_complete(plan: Plan, num_sequences: int, num_ranks: int) -> None:
    """Every sequence is there once, and each rank has equally many microbatches."""
    assert len(plan) == num_ranks
    assert len({len(microbatches) for microbatches in plan}) == 1
    assert sorted(i for rank in plan for rows in rank for i in rows) == list(range(num_sequences))


@given(LENGTHS, st.integers(1, 5), st.integers(1, 200))
def test_plans_hold_what_they_promise(lengths: list[int], num_ranks: int, budget: int) -> None:
    plan = plan_microbatches(lengths, num_ranks, budget)
    assert_complete(plan, len(lengths), num_ranks)
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


# By trajectory: the number of its prompt, whose tokens are five times that, and the tokens of its response.
SAMPLES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), max_size=24)


def shapes_of(samples: list[tuple[int, int]]) -> tuple[list[int], list[PromptKey]]:
    """Lengths and prompts."""
    return [5 * prompt + response for prompt, response in samples], [
        (f"p{prompt}", 5 * prompt) for prompt, _ in samples
    ]


def most_work(plan: Plan, lengths: list[int], prompts: list[PromptKey]) -> float:
    costs = [[work_of(rows, lengths, prompts, 0) if rows else 0 for rows in rank] for rank in plan]
    return max(sum(rank) + MICROBATCH_COST * len(rank) for rank in costs)


@given(SAMPLES, st.integers(1, 4), st.integers(1, 300))
def test_plans_by_prompt_are_as_complete_as_bounded_and_never_more_work(
    samples: list[tuple[int, int]], num_ranks: int, budget: int
) -> None:
    lengths, prompts = shapes_of(samples)
    plan = plan_microbatches(lengths, num_ranks, budget, prompts)
    assert_complete(plan, len(lengths), num_ranks)
    for microbatches in plan:
        filled = [rows for rows in microbatches if rows]
        assert microbatches[: len(filled)] == tuple(filled), "empty microbatches come last"
        widths = [max(lengths[i] for i in rows) for rows in filled]
        assert widths == sorted(widths, reverse=True)
        assert all(len(rows) * width <= budget or len(rows) == 1 for rows, width in zip(filled, widths, strict=True))
    plain = plan_microbatches(lengths, num_ranks, budget)
    assert most_work(plan, lengths, prompts) <= most_work(plain, lengths, prompts)
    assert plan == plan_microbatches(list(lengths), num_ranks, budget, list(prompts))


def test_samples_of_a_prompt_stand_together_on_a_rank_and_in_microbatches() -> None:
    # Two prompts of 100 tokens, four responses of 99 to 102 tokens each, in turns.
    samples = [(20, 99 + place // 2) for place in range(8)]
    lengths = [100 + response for _, response in samples]
    prompts = [(f"p{place % 2}", 100) for place in range(8)]
    for num_ranks, budget in ((1, 900), (2, 900), (2, 500), (4, 500)):
        plan = plan_microbatches(lengths, num_ranks, budget, prompts)
        for microbatches in plan:
            assert all(len({prompts[i] for i in rows}) == 1 for rows in microbatches if rows)
        sizes = [sum(len(rows) for rows in rank) for rank in plan]
        assert sizes == [8 // num_ranks] * num_ranks
    # Without prompts a microbatch has both.
    assert {prompts[i] for i in plan_microbatches(lengths, 1, 900)[0][0]} == {("p0", 100), ("p1", 100)}


def test_one_prompt_is_spread_over_ranks_that_would_have_nothing_to_do() -> None:
    plan = plan_microbatches([120] * 8, 4, 1000, [("p", 20)] * 8)
    assert [sum(len(rows) for rows in rank) for rank in plan] == [2, 2, 2, 2]


@given(SAMPLES.filter(lambda samples: 0 < len(samples) <= 8), st.integers(1, 300), st.integers(0, 40))
def test_cuts_are_those_with_the_least_work(samples: list[tuple[int, int]], budget: int, batch_cost: int) -> None:
    lengths, prompts = shapes_of(samples)
    order = together(sorted(range(len(lengths)), key=lambda i: -lengths[i]), prompts)
    found = least_work(order, lengths, prompts, budget, batch_cost)
    assert [i for rows in found for i in rows] == order
    works = []
    for num_cuts in range(len(order)):
        for cuts in combinations(range(1, len(order)), num_cuts):
            bounds = [0, *cuts, len(order)]
            batches = [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            if all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget for rows in batches):
                works.append(sum(work_of(rows, lengths, prompts, batch_cost) for rows in batches))
    assert sum(work_of(rows, lengths, prompts, batch_cost) for rows in found) == pytest.approx(min(works))


def test_no_trajectories_no_microbatches() -> None:
    assert plan_microbatches([], 2, 8) == ((), ())


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 ranks"):
        plan_microbatches([1], 0, 8)
    with pytest.raises(ConfigError, match="0 tokens a microbatch"):
        plan_microbatches([1], 1, 0)
    with pytest.raises(DataError, match="trajectory 1 has 0 tokens"):
        plan_microbatches([3, 0], 1, 8)
