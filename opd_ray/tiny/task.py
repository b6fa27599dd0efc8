"""Running arithmetic: verifiable answers and worked solutions, a step a line. Standard library only.

A problem is a start value and labelled steps, ``47a+3b-4c+9=``. Its solution takes the steps in order, each
with its label, and ends with the answer::

    47a+3=50
    50b-4=46
    46c+9=55
    #55

Every value on the way lies in 0..99. The label tells which step comes next, so that a small model can look it
up instead of counting. A character is a token, so a step of the solution is 7 to 9 tokens.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

CHARACTERS = "\n#+-=0123456789abcdefghijklmnopqrstuvwxyz"
"""Every character that a problem or a solution may contain, in vocabulary order."""

MAX_VALUE = 99
"""Largest running value; the smallest is 0."""

MIN_STEPS, MAX_STEPS = 14, 24
"""Steps of a problem of either split, both ends included: solutions of about 110 to 220 characters."""

_LABELS = "abcdefghijklmnopqrstuvwxyz"
_SPLITS = ("train", "test")
_TEST_SHARE = 4  # one problem text in four belongs to the test split
_ANSWER = re.compile(r"(?:\A|\n)#([0-9]+)\s*\Z")


@dataclass(frozen=True)
class TinyProblem:
    """One problem. The prompt is `problem` and a newline; `solution` ends in ``#`` and `answer`."""

    id: str
    problem: str
    answer: str
    solution: str


def problems(split: str, num: int, seed: int) -> list[TinyProblem]:
    """Return `num` distinct problems of `split` ("train" or "test"), the same ones for the same arguments."""
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if num < 0:
        raise ValueError(f"num must be 0 or more, got {num}")
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    found: list[TinyProblem] = []
    while len(found) < num:
        candidate = draw_problem(rng, rng.randint(MIN_STEPS, MAX_STEPS), split)
        if candidate.problem not in seen:
            seen.add(candidate.problem)
            found.append(candidate)
    return found


def draw_problem(rng: random.Random, num_steps: int, split: str) -> TinyProblem:
    """Draw one problem of `num_steps` steps (1 to 26) that belongs to `split`."""
    if not 1 <= num_steps <= len(_LABELS):
        raise ValueError(f"num_steps must be 1 to {len(_LABELS)}, got {num_steps}")
    while True:
        start, steps = _draw_steps(rng, num_steps)
        text = f"{start}{''.join(label + step for label, step in zip(_LABELS, steps, strict=False))}="
        if split_of(text) == split:
            break
    lines, value = [], start
    for label, step in zip(_LABELS, steps, strict=False):
        result = value + int(step)
        lines.append(f"{value}{label}{step}={result}\n")
        value = result
    lines.append(f"#{value}")
    # The id is the text's own checksum: the same problem has the same id in every list.
    return TinyProblem(f"{split}-{zlib.crc32(text.encode()):08x}", text, str(value), "".join(lines))


def split_of(problem: str) -> str:
    """Return the split of a problem text: a property of the text alone, so the splits cannot overlap."""
    return "test" if zlib.crc32(problem.encode()) % _TEST_SHARE == 0 else "train"


def extract_answer(response: str) -> str | None:
    """Return the digits after the ``#`` of the last line, or None if the last line is not an answer."""
    match = _ANSWER.search(response)
    return match.group(1) if match else None


def is_correct(response: str, answer: str) -> bool:
    """Tell whether the response ends with exactly this answer; the steps before it are not judged."""
    return extract_answer(response) == answer


def _draw_steps(rng: random.Random, num_steps: int) -> tuple[int, list[str]]:
    """Draw a start value and signed one-digit steps ("+3", "-4") that keep the value in 0..MAX_VALUE."""
    start = value = rng.randint(0, MAX_VALUE)
    signs = rng.getrandbits(num_steps)
    steps = []
    for digit in rng.choices(range(1, 10), k=num_steps):
        change = digit if signs & 1 else -digit
        if not 0 <= value + change <= MAX_VALUE:
            change = -change
        signs >>= 1
        value += change
        steps.append(f"{change:+d}")
    return start, steps
