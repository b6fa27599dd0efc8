"""The tiny task: right arithmetic, bounded values, disjoint and repeatable splits, exact verification."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.tiny.task import (
    CHARACTERS,
    MAX_STEPS,
    MAX_VALUE,
    MIN_STEPS,
    extract_answer,
    is_correct,
    problems,
    split_of,
)

LINE = re.compile(r"([0-9]+)([a-z])([+-])([1-9])=([0-9]+)")
SPLITS = st.sampled_from(["train", "test"])
SEEDS = st.integers(0, 2**32)


@settings(max_examples=50, deadline=None)
@given(SPLITS, SEEDS)
def test_every_line_is_right_and_bounded(split: str, seed: int) -> None:
    for item in problems(split, 3, seed):
        *lines, last = item.solution.split("\n")
        assert MIN_STEPS <= len(lines) <= MAX_STEPS
        start = re.match(r"[0-9]+", item.problem)
        assert start is not None
        value, steps = int(start.group()), ""
        for index, line in enumerate(lines):
            match = LINE.fullmatch(line)
            assert match is not None, line
            before, label, sign, digit, after = match.groups()
            assert label == chr(ord("a") + index)
            assert int(before) == value
            value += int(digit) if sign == "+" else -int(digit)
            assert int(after) == value
            assert 0 <= value <= MAX_VALUE
            steps += label + sign + digit
        assert item.problem == f"{start.group()}{steps}="
        assert last == f"#{value}" == f"#{item.answer}"
        assert set(item.problem + item.solution) <= set(CHARACTERS)


@settings(max_examples=50, deadline=None)
@given(SPLITS, SEEDS, st.integers(0, 20))
def test_same_arguments_give_the_same_distinct_problems(split: str, seed: int, num: int) -> None:
    found = problems(split, num, seed)
    assert found == problems(split, num, seed)
    assert len({item.problem for item in found}) == num
    assert found[: num // 2] == problems(split, num // 2, seed)


@settings(max_examples=50, deadline=None)
@given(SEEDS, SEEDS)
def test_splits_are_disjoint_for_all_seeds(train_seed: int, test_seed: int) -> None:
    train = problems("train", 20, train_seed)
    test = problems("test", 20, test_seed)
    assert {split_of(item.problem) for item in train} == {"train"}
    assert {split_of(item.problem) for item in test} == {"test"}
    assert not {item.problem for item in train} & {item.problem for item in test}
    assert not {item.id for item in train} & {item.id for item in test}


def test_other_seeds_give_other_problems() -> None:
    first, second = ({item.problem for item in problems("train", 100, seed)} for seed in (0, 1))
    assert not first & second


def test_ten_thousand_problems_are_fast_and_have_their_own_ids() -> None:
    started = time.process_time()
    found = problems("test", 10_000, 0)
    assert time.process_time() - started < 5.0  # about half a second; the rest is for a busy machine
    assert len({item.id for item in found}) == len(found)


def test_solutions_span_several_blocks() -> None:
    lengths = [len(item.solution) + 1 for item in problems("test", 1000, 0)]
    assert sum(100 <= length <= 250 for length in lengths) > 0.95 * len(lengths)
    assert statistics.mean(lengths) > 2 * 64


@settings(max_examples=50, deadline=None)
@given(SPLITS, SEEDS)
def test_solution_is_correct_and_its_neighbours_are_not(split: str, seed: int) -> None:
    (item,) = problems(split, 1, seed)
    assert extract_answer(item.solution) == item.answer
    assert is_correct(item.solution, item.answer)
    assert is_correct(item.solution + "\n", item.answer)
    assert not is_correct(item.solution, str(int(item.answer) + 1))
    assert not is_correct(item.solution + "0", item.answer)
    assert not is_correct(item.solution + "\n1a+1=2", item.answer)


@pytest.mark.parametrize("response", ["", "#", "12", "#1a", "#12\n#", "#-3", "12#\n", "3a+4=7#7", "7\n##7"])
def test_what_is_no_answer(response: str) -> None:
    assert extract_answer(response) is None


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=CHARACTERS))
def test_extraction_never_fails(response: str) -> None:
    answer = extract_answer(response)
    assert answer is None or is_correct(response, answer)


@pytest.mark.parametrize(("split", "num"), [("valid", 1), ("", 0), ("train", -1)])
def test_nonsense_is_refused(split: str, num: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        problems(split, num, 0)


def test_task_and_paths_need_the_standard_library_only() -> None:
    code = (
        "import sys, opd_ray.tiny.task, opd_ray.tiny.paths;"
        "raise SystemExit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
