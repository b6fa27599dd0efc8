import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import block_segments, newline_segments

X = -1


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


def newlines(num_tokens: int, *rows: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    for row, positions in enumerate(rows):
        mask[row, list(positions)] = True
    return mask


def spans(ids: Tensor) -> list[int]:
    """Span lengths of one row; checks that ids rise by one without a gap and that only padding is -1."""
    groups = [(value, len(list(group))) for value, group in itertools.groupby(ids.tolist())]
    if groups and groups[-1][0] == X:
        groups.pop()
    assert [value for value, _ in groups] == list(range(len(groups)))
    return [count for _, count in groups]


def test_blocks_by_hand() -> None:
    ids = block_segments(lengths(5, 0, 7, 1), 7, 3)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [0, 0, 0, 1, 1, X, X],
        [X] * 7,
        [0, 0, 0, 1, 1, 1, 2],
        [0, X, X, X, X, X, X],
    ]


def test_block_size_none_is_one_segment_a_sequence_and_one_is_a_segment_a_token() -> None:
    assert block_segments(lengths(2, 4), 4, None).tolist() == [[0, 0, X, X], [0, 0, 0, 0]]
    assert block_segments(lengths(2, 4), 4, 1).tolist() == [[0, 1, X, X], [0, 1, 2, 3]]
    assert block_segments(lengths(2, 4), 4, 4).equal(block_segments(lengths(2, 4), 4, None))


def test_no_rows_and_no_columns() -> None:
    assert block_segments(torch.zeros(0, dtype=torch.int64), 3, 2).shape == (0, 3)
    assert block_segments(lengths(0, 0), 0, 2).shape == (2, 0)
    empty = newline_segments(newlines(0, (), ()), lengths(0, 0), min_len=1, max_len=2, fallback_block=2)
    assert empty.shape == (2, 0)


@pytest.mark.parametrize(
    ("positions", "length", "expected"),
    [
        # The newline token closes its span: 0..4 and 5..9; what follows the last newline is the third.
        ((4, 9), 14, [5, 5, 4]),
        # A newline on the last token leaves nothing behind it.
        ((4, 9), 10, [5, 5]),
        # Under min_len 3: 2 merges into the next (2+3), the last 1 into the previous.
        ((1, 4, 8), 10, [5, 5]),
        # Merging continues until it is long enough: 1+1+1 = 3, then 4.
        ((0, 1, 2), 7, [3, 4]),
        # A run of newlines at the end merges into the previous span.
        ((4, 5, 6), 7, [7]),
        # Everything is shorter than min_len: one span.
        ((0,), 2, [2]),
        # 23 over max_len 10 -> 3 pieces, the longer ones first.
        ((22,), 23, [8, 8, 7]),
        # 11 -> 2 pieces.
        ((10,), 14, [6, 5, 3]),
        # Merge comes before split: 2 merges into 9 = 11 -> 6 + 5.
        ((1, 10), 14, [6, 5, 3]),
        # No newline: blocks of 6, whatever min_len and max_len say.
        ((), 14, [6, 6, 2]),
        # A newline past the end is not there.
        ((14, 20), 14, [6, 6, 2]),
        ((), 0, []),
        ((), 1, [1]),
    ],
)
def test_newline_rules_by_hand(positions: tuple[int, ...], length: int, expected: list[int]) -> None:
    ids = newline_segments(newlines(24, positions), lengths(length), min_len=3, max_len=10, fallback_block=6)
    assert ids.dtype == torch.int64
    assert spans(ids[0]) == expected


def test_rows_do_not_touch_each_other() -> None:
    mask = newlines(12, (3, 7), (), (11,))
    together = newline_segments(mask, lengths(12, 9, 12), min_len=2, max_len=5, fallback_block=4)
    for row, length in enumerate((12, 9, 12)):
        alone = newline_segments(mask[row : row + 1], lengths(length), min_len=2, max_len=5, fallback_block=4)
        assert alone[0].equal(together[row])
    assert [spans(row) for row in together] == [[4, 4, 4], [4, 4, 1], [4, 4, 4]]


def test_padding_of_a_float_mask_may_be_nan() -> None:
    mask = newlines(12, (4, 9)).float()
    mask[0, 11:] = float("nan")
    ids = newline_segments(mask, lengths(11), min_len=1, max_len=8, fallback_block=4)
    assert spans(ids[0]) == [5, 5, 1]


def slow_newline_spans(marks: list[bool], min_len: int, max_len: int, fallback: int) -> list[int]:
    """The rules of the docstring, token by token."""
    if not any(marks):
        blocks = [min(fallback, len(marks) - start) for start in range(0, len(marks), fallback)]
        return blocks
    cut: list[int] = [0]
    for mark in marks:
        cut[-1] += 1
        if mark:
            cut.append(0)
    if cut[-1] == 0:
        cut.pop()
    index = 0
    while index < len(cut):
        if cut[index] >= min_len:
            index += 1
        elif index + 1 < len(cut):
            cut[index : index + 2] = [cut[index] + cut[index + 1]]
        elif index > 0:
            cut[index - 1 : index + 1] = [cut[index - 1] + cut[index]]
        else:
            break
    pieces: list[int] = []
    for span in cut:
        count = 1
        while span > count * max_len:
            count += 1
        share = [0] * count
        for token in range(span):
            share[token % count] += 1
        pieces += share
    return pieces


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_newline_spans_partition_the_response_by_the_rules(data: st.DataObject) -> None:
    marks = data.draw(st.lists(st.booleans() | st.just(False), max_size=40))
    padding = data.draw(st.lists(st.booleans(), max_size=5))
    min_len = data.draw(st.integers(1, 6))
    max_len = data.draw(st.integers(min_len, 15))
    fallback = data.draw(st.integers(1, 9))
    mask = torch.tensor([marks + padding], dtype=torch.bool).reshape(1, -1)
    ids = newline_segments(mask, lengths(len(marks)), min_len=min_len, max_len=max_len, fallback_block=fallback)
    found = spans(ids[0])
    assert sum(found) == len(marks) == int((ids >= 0).sum())
    assert found == slow_newline_spans(marks, min_len, max_len, fallback)
    if any(marks):
        assert max(found) <= max_len
        if len(marks) >= min_len and max_len >= 2 * min_len - 1:
            assert min(found) >= min_len


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.none() | st.integers(1, 25), st.integers(0, 3))
def test_blocks_partition_the_response(rows: list[int], block: int | None, extra: int) -> None:
    width = max(rows) + extra
    ids = block_segments(torch.tensor(rows), width, block)
    for row, length in zip(ids, rows, strict=True):
        found = spans(row)
        assert sum(found) == length
        if block is None:
            assert len(found) == min(length, 1)
        else:
            assert all(span == block for span in found[:-1]) and all(0 < span <= block for span in found)


@pytest.mark.parametrize(
    "call",
    [
        lambda: block_segments(lengths(5), 4, 2),
        lambda: block_segments(lengths(-1), 4, 2),
        lambda: block_segments(lengths(4), 4, 0),
        lambda: block_segments(torch.ones(2, 2, dtype=torch.int64), 4, 2),
        lambda: newline_segments(newlines(4, ()), lengths(4), min_len=0, max_len=2, fallback_block=2),
        lambda: newline_segments(newlines(4, ()), lengths(4), min_len=3, max_len=2, fallback_block=2),
        lambda: newline_segments(newlines(4, ()), lengths(4), min_len=1, max_len=2, fallback_block=0),
        lambda: newline_segments(newlines(4, ()), lengths(4, 4), min_len=1, max_len=2, fallback_block=2),
        lambda: newline_segments(newlines(4, ()), lengths(5), min_len=1, max_len=2, fallback_block=2),
        lambda: newline_segments(newlines(4, ())[0], lengths(4), min_len=1, max_len=2, fallback_block=2),
    ],
)
def test_a_callers_fault_is_one_clear_line(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="; ") as caught:
        call()
    assert "\n" not in str(caught.value)
