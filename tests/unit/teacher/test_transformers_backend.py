"""How the teacher's sequences are put into batches, and what it scores at ids that it is handed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.config.choices import Dtype
from opd_ray.errors import SchemaError
from opd_ray.models.loading import load_causal_lm
from opd_ray.teacher.transformers_backend import GROUP, TeacherModel, batches_by_length, top_entries
from opd_ray.tiny.paths import teacher_path

PATH = str(teacher_path())
SHARED = 44


def work(batches: list[list[int]], lengths: list[int], batch_cost: int) -> int:
    return sum(batch_cost + len(batch) * max(lengths[i] for i in batch) for batch in batches)


def least_work(lengths: list[int], max_batch_tokens: int, batch_cost: int) -> int:
    """By trying every way to cut the sorted lengths."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = []
    for num_cuts in range(len(order)):
        for cuts in combinations(range(1, len(order)), num_cuts):
            bounds = [0, *cuts, len(order)]
            batches = [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            if all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_batch_tokens for batch in batches):
                found.append(work(batches, lengths, batch_cost))
    return min(found)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 200), st.integers(0, 40))
def test_batches_are_the_cheapest_within_the_budget(lengths: list[int], max_tokens: int, batch_cost: int) -> None:
    batches = batches_by_length(lengths, max_tokens, batch_cost)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    assert work(batches, lengths, batch_cost) == least_work(lengths, max_tokens, batch_cost)


def test_batches_by_example() -> None:
    lengths = [10, 300, 290, 12, 11, 305]
    assert batches_by_length(lengths, 1000, 32) == [[5, 1, 2], [3, 4, 0]]
    assert batches_by_length(lengths, 700, 32) == [[5, 1], [2], [3, 4, 0]]
    assert batches_by_length(lengths, 10_000, 10_000) == [[5, 1, 2, 3, 4, 0]]
    assert batches_by_length(lengths, 1, 32) == [[5], [1], [2], [3], [4], [0]]
    assert batches_by_length([], 1000, 32) == []


@pytest.mark.parametrize("vocab", [4 * 5 * GROUP, 50 * GROUP, 50 * GROUP + 1, 30])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_top_entries_are_those_of_topk(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    values = torch.randn(7, vocab, generator=generator)
    # All large entries side by side in one group, and then all entries equal.
    values[3, 20:25] += 10
    values *= spread
    found, columns = top_entries(values, 5)
    assert torch.equal(found, values.topk(5).values)
    assert torch.equal(values.gather(1, columns), found)
    assert all(len(set(row)) == 5 for row in columns.tolist())
    if spread:
        assert torch.equal(columns, values.topk(5).indices)


def test_handed_ids_are_scored_as_they_are() -> None:
    """The same forward pass for both supports: the teacher's own ids handed back give its own log-probs."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 40, n).tolist() for n in (4, 9, 2)]
    responses = [rng.integers(2, 40, n).astype(np.int32) for n in (30, 3, 11)]
    teacher = TeacherModel(PATH, Dtype.float32, 0, SHARED, 60)
    own = teacher.score(prompts, responses, 5)
    back = teacher.score(prompts, responses, [row.topk_ids[:, ::-1] for row in own])
    for given_ids, found in zip(own, back, strict=True):
        np.testing.assert_array_equal(found.logprobs, given_ids.logprobs)
        np.testing.assert_array_equal(found.topk_ids, given_ids.topk_ids[:, ::-1])
        np.testing.assert_array_equal(found.topk_logprobs, given_ids.topk_logprobs[:, ::-1])
        assert found.topk_ids.dtype == np.int32
    everything = np.tile(np.arange(SHARED, dtype=np.int32), (11, 1))
    (whole,) = teacher.score(prompts[2:], responses[2:], [everything])
    with torch.no_grad():
        logits = load_causal_lm(PATH, Dtype.float32)(torch.tensor([[*prompts[2], *responses[2].tolist()]])).logits[0]
    # Over the ids that both share, the rest of the model's vocabulary left out.
    expected = logits[1 : 1 + 11, :SHARED].log_softmax(-1)
    np.testing.assert_allclose(whole.topk_logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("column", ["response_token_ids", "student_topk_ids"])
def test_ids_outside_the_shared_vocabulary_are_refused(column: str) -> None:
    responses = [np.array([3, SHARED if column == "response_token_ids" else 4], dtype=np.int32)]
    support = [np.array([[1, 2], [3, SHARED]], dtype=np.int32)]
    teacher = TeacherModel(PATH, Dtype.float32, 0, SHARED, 60)
    with pytest.raises(SchemaError, match=f"'{column}' has the id {SHARED} and student and teacher share {SHARED} ids"):
        teacher.score([[5]], responses, support)
