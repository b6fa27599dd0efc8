"""Verdicts for completions: extraction, exact comparison, and algebra for what these leave open."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_ray.config.choices import AnswerFormat, Template
from opd_ray.errors import DataError
from opd_ray.evaluation.answers import extract, reference, verdict
from opd_ray.evaluation.verdict import Verdict
from opd_ray.evaluation.verifier import Pair, Verification, verify
from opd_ray.types import Prompt

OnDone = Callable[[int, int], None]
"""Is told how many answers have their verdict, of how many."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response: text, length in tokens, and why it ended (`stop`, or `length` at the limit)."""

    text: str
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems that are judged together, under a short name; `template` None is the engines' own."""

    name: str
    problems: Sequence[Prompt]
    answer_format: AnswerFormat
    template: Template | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to one problem; `reference` is the bare right answer, `sample` counts the problem's from 0."""

    problem_id: str
    problem_index: int
    sample: int
    response: str
    num_tokens: int
    finish_reason: str
    reference: str


@dataclass(frozen=True, slots=True)
class GradedSample(Sample):
    """A sample with the answer that was found in it, and its verdict."""

    extracted: str | None
    verdict: Verdict


def check_problems(problems: Sequence[Prompt], answer_format: AnswerFormat, part: str = "evaluation") -> None:
    """Raise `DataError` if there is no problem, or one whose reference answer cannot be compared with.

    `part` is the part of the config that the problems come from.
    """
    if not problems:
        raise DataError(f"evaluation has no problems: give {part}.path a file with at least one row")
    for prompt in problems:
        where = f"evaluation problem {prompt.id!r} (row {prompt.index})"
        if prompt.answer is None:
            raise DataError(
                f"{where} has no answer: add the column `answer` to the file, map it in {part}.fields, or leave the "
                "problems out"
            )
        if reference(answer_format, prompt.answer) is None:
            raise DataError(
                f"{where} has the answer {prompt.answer[:60]!r}, which "
                f"{part}.answer_format={answer_format.value} cannot read: choose another format"
            )


def to_samples(
    problems: Sequence[Prompt], completions: Sequence[Sequence[Completion]], answer_format: AnswerFormat
) -> list[Sample]:
    """``completions[i]``, as many for every problem and at least 1, are the samples of ``problems[i]``.

    Raises:
        DataError: a problem has no usable reference answer (`check_problems`).
        ValueError: the lists do not fit together.
    """
    check_problems(problems, answer_format)
    if len(problems) != len(completions):
        raise ValueError(f"{len(problems)} problems but {len(completions)} lists of completions")
    n = len(completions[0])
    for prompt, found in zip(problems, completions, strict=True):
        if len(found) != n or n == 0:
            raise ValueError(
                f"problem {prompt.id!r} has {len(found)} completions and the first problem {n}: "
                "every problem needs the same number, at least 1"
            )
    return [
        Sample(
            problem_id=prompt.id,
            problem_index=prompt.index,
            sample=number,
            response=completion.text,
            num_tokens=completion.num_tokens,
            finish_reason=completion.finish_reason,
            reference=reference(answer_format, prompt.answer or "") or "",
        )
        for prompt, found in zip(problems, completions, strict=True)
        for number, completion in enumerate(found)
    ]


def grade_exactly(samples: Sequence[Sample], answer_format: AnswerFormat) -> list[GradedSample]:
    """Grade without algebra: what would take it counts as wrong."""
    return [
        _graded(sample, given, found or Verdict.wrong) for sample, given, found in _compared(samples, answer_format)
    ]


async def grade(
    samples: Sequence[Sample], answer_format: AnswerFormat, settings: Verification, on_done: OnDone | None = None
) -> list[GradedSample]:
    """Grade samples, in their order; equal answers to equal references are verified once.

    Raises:
        VerifierError: the processes that verify do not start.
    """
    # In a thread: the texts may be hundreds of megabytes.
    compared = await asyncio.to_thread(_compared, samples, answer_format)
    count = Counter((given or "", sample.reference) for sample, given, found in compared if found is None)
    num_done = len(samples) - count.total()
    if on_done is not None:
        on_done(num_done, len(samples))

    def verified(pair: Pair) -> None:
        nonlocal num_done
        num_done += count[pair]
        if on_done is not None:
            on_done(num_done, len(samples))

    verdicts = await verify(count, settings, verified)
    return [
        _graded(sample, given, found or verdicts[given or "", sample.reference]) for sample, given, found in compared
    ]


def _compared(
    samples: Sequence[Sample], answer_format: AnswerFormat
) -> list[tuple[Sample, str | None, Verdict | None]]:
    """Each sample with its answer and its verdict, None where it takes algebra."""
    given = [extract(answer_format, sample.response) for sample in samples]
    return [
        (sample, answer, verdict(answer_format, answer, sample.reference))
        for sample, answer in zip(samples, given, strict=True)
    ]


def _graded(sample: Sample, given: str | None, found: Verdict) -> GradedSample:
    return GradedSample(
        problem_id=sample.problem_id,
        problem_index=sample.problem_index,
        sample=sample.sample,
        response=sample.response,
        num_tokens=sample.num_tokens,
        finish_reason=sample.finish_reason,
        reference=sample.reference,
        extracted=given,
        verdict=found,
    )
