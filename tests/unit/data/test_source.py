"""The prompt source: orders, epochs and exact resumption."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.data.source import PromptSource, epoch_order
from opd_ray.errors import DataError
from opd_ray.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"p{index}", problem=str(index), index=index) for index in range(count)]


@given(st.integers(1, 20), st.integers(0, 5), st.integers(1, 3))
def test_each_epoch_has_each_prompt_once(count: int, seed: int, epochs: int) -> None:
    taken = list(PromptSource(prompts(count), seed, epochs))
    assert [prompt.epoch for prompt in taken] == [epoch for epoch in range(epochs) for _ in range(count)]
    for epoch in range(epochs):
        assert sorted(prompt.index for prompt in taken if prompt.epoch == epoch) == list(range(count))


def test_orders_differ_by_epoch_and_seed_and_never_change() -> None:
    assert epoch_order(8, 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]
    assert len({tuple(epoch_order(8, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(1, 7), st.integers(0, 30))
def test_a_restored_source_goes_on_exactly(count: int, taken: int) -> None:
    unbroken = PromptSource(prompts(count), seed=3)
    for _ in range(taken):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.state()))
    resumed = PromptSource(prompts(count), seed=3)
    resumed.restore(state)
    assert list(itertools.islice(resumed, 20)) == list(itertools.islice(unbroken, 20))


def test_the_end_stays_the_end_after_a_restore() -> None:
    source = PromptSource(prompts(2), seed=0, epochs=1)
    assert len(list(source)) == 2
    resumed = PromptSource(prompts(2), seed=0, epochs=1)
    resumed.restore(source.state())
    assert list(resumed) == list(source) == []


def test_a_foreign_state_is_refused() -> None:
    state = PromptSource(prompts(3), seed=0).state()
    for other, key in [
        (PromptSource(prompts(3), seed=1), "seed"),
        (PromptSource(prompts(4), seed=0), "num_prompts"),
        (PromptSource(prompts(4)[1:], seed=0), "digest"),
    ]:
        with pytest.raises(DataError, match=f"the saved prompt cursor has {key}"):
            other.restore(state)
    for damage in ({"position": 4}, {"position": "1"}, {"epoch": None}):
        with pytest.raises(DataError, match="damaged"):
            PromptSource(prompts(3), seed=0).restore({**state, **damage})  # type: ignore[dict-item]


def test_impossible_sources_are_refused() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptSource([], seed=0)
    with pytest.raises(DataError, match="2 prompts have only 1 different ids"):
        PromptSource([Prompt("a", "x"), Prompt("a", "y")], seed=0)
    with pytest.raises(DataError, match="0 epochs"):
        PromptSource(prompts(1), seed=0, epochs=0)
