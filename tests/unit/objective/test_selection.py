import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.objective import any_occurrence, first_occurrence, select_by_entropy

NAN, INF = float("nan"), float("inf")


def test_highest_entropies_by_hand() -> None:
    entropy = torch.tensor([[0.1, 0.9, 0.5, 0.7, 9.0], [3.0, 1.0, 2.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    # ceil(0.5 * 4) = 2 and ceil(0.5 * 3) = 2.
    got = select_by_entropy(entropy, mask, top_share=0.5)
    assert got.dtype == torch.bool
    assert got.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]


def test_earlier_positions_win_ties() -> None:
    entropy = torch.tensor([[1.0, 1.0, 2.0, 1.0]])
    assert select_by_entropy(entropy, torch.ones(1, 4), top_share=0.5).int().tolist() == [[1, 0, 1, 0]]
    assert select_by_entropy(entropy * 0, torch.ones(1, 4), top_share=0.75).int().tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("low", [NAN, -INF])
def test_nan_counts_as_lowest_and_still_before_masked_positions(low: float) -> None:
    entropy = torch.tensor([[9.0, low, 0.0, low]])
    mask = torch.tensor([[0, 1, 1, 1]])
    assert select_by_entropy(entropy, mask, top_share=0.3).int().tolist() == [[0, 0, 1, 0]]
    assert select_by_entropy(entropy, mask, top_share=0.6).int().tolist() == [[0, 1, 1, 0]]
    assert select_by_entropy(entropy, mask, top_share=1.0).int().tolist() == [[0, 1, 1, 1]]


def test_whole_numbers_of_tokens_are_not_rounded_up() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point.
    got = select_by_entropy(torch.rand(1, 100), torch.ones(1, 100), top_share=0.07)
    assert got.sum().item() == 7


def test_nothing_to_select() -> None:
    assert not select_by_entropy(torch.rand(2, 3), torch.zeros(2, 3), top_share=1.0).any()
    for shape in ((0, 3), (2, 0)):
        assert select_by_entropy(torch.zeros(shape), torch.zeros(shape), top_share=0.5).shape == shape


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.2, 0.5, 0.8, 1.0]), st.booleans())
def test_selection_equals_the_definition(seed: int, share: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(3, 11, generator=generator)
    entropy = (entropy * 3).round() if ties else entropy
    mask = torch.rand(3, 11, generator=generator) < 0.7
    got = select_by_entropy(entropy, mask, top_share=share)
    for b in range(3):
        valid = [t for t in range(11) if mask[b, t]]
        best = sorted(valid, key=lambda t: (-float(entropy[b, t]), t))
        kept = set(best[: math.ceil(round(share * len(valid), 9))])
        assert {t for t in range(11) if got[b, t]} == kept
    if share == 1.0:
        assert got.equal(mask)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, NAN])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="top_share is"):
        select_by_entropy(torch.zeros(1, 2), torch.zeros(1, 2), top_share=share)


def test_first_occurrence_of_each_id_in_each_response() -> None:
    tokens = torch.tensor([[5, 7, 5, 8, 7], [8, 8, 5, 5, 7], [1, 2, 3, 4, 6]])
    window = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    got = first_occurrence(tokens, window, [5, 7, 99])
    assert got.dtype == torch.bool
    assert got.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_an_occurrence_outside_the_window_does_not_count_as_the_first() -> None:
    tokens, window = torch.tensor([[5, 5, 5]]), torch.tensor([[0, 1, 1]])
    assert first_occurrence(tokens, window, [5, 5]).int().tolist() == [[0, 1, 0]]


def test_any_occurrence_marks_all() -> None:
    tokens = torch.tensor([[5, 7, 5], [1, 2, 3]], dtype=torch.int32)
    assert any_occurrence(tokens, [5, 3]).int().tolist() == [[1, 0, 1], [0, 0, 1]]
    assert not any_occurrence(tokens, []).any() and any_occurrence(tokens, []).shape == (2, 3)
    assert not first_occurrence(tokens, torch.ones(2, 3), []).any()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        select_by_entropy(torch.zeros(1, 2), torch.zeros(1, 3), top_share=0.5)
    with pytest.raises(ValueError, match="shapes differ"):
        first_occurrence(torch.zeros(1, 2).long(), torch.zeros(1, 3), [1])
    with pytest.raises(ValueError, match=r"\[B,T\]"):
        first_occurrence(torch.zeros(2).long(), torch.zeros(2), [1])
