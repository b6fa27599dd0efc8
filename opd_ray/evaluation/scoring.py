"""From completions to numbers: which are correct, pass@k, avg@n, and how long they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_ray.choices import AnswerFormat
from opd_ray.errors import DataError
from opd_ray.evaluation.answers import is_correct, is_gradable
from opd_ray.evaluation.pass_at_k import avg_at_n, pass_at_k
from opd_ray.types import Prompt

TRUNCATED = "length"
"""Finish reason of a completion that reached the token limit."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response: text, length in tokens, and why it ended (`stop`, or `length` at the limit)."""

    text: str
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What one model reached on one set of problems.

    `pass_at` maps k to the mean over problems of the unbiased pass@k, for every power of two up to n and for
    n; `truncated_share` is the share of completions that reached the token limit; `mean_tokens` is their mean
    length in tokens; `wall_s` is the time that the evaluation took, in seconds, as the caller measured it.
    """

    num_problems: int
    samples_per_problem: int
    pass_at: Mapping[int, float]
    avg_at_n: float
    truncated_share: float
    mean_tokens: float
    wall_s: float

    def as_dict(self) -> dict[str, float]:
        """A flat, JSON-able dict; with n = 8 it has `pass_at_1`, `_2`, `_4`, `_8` and `avg_at_8`."""
        return {
            **{f"pass_at_{k}": value for k, value in self.pass_at.items()},
            f"avg_at_{self.samples_per_problem}": self.avg_at_n,
            "num_problems": self.num_problems,
            "samples_per_problem": self.samples_per_problem,
            "truncated_share": self.truncated_share,
            "mean_tokens": self.mean_tokens,
            "wall_s": self.wall_s,
        }


def check_problems(problems: Sequence[Prompt], answer_format: AnswerFormat) -> None:
    """Raise `DataError` if there is no problem, or one whose reference answer cannot be compared with."""
    if not problems:
        raise DataError("evaluation has no problems: give evaluation.path a file with at least one row")
    for prompt in problems:
        where = f"evaluation problem {prompt.id!r} (row {prompt.index})"
        if prompt.answer is None:
            raise DataError(
                f"{where} has no answer: add the column `answer` to the file, "
                "or set evaluation.path='' to train without evaluation"
            )
        if not is_gradable(answer_format, prompt.answer):
            raise DataError(
                f"{where} has the answer {prompt.answer[:60]!r}, which "
                f"evaluation.answer_format={answer_format.value} cannot read: choose another format"
            )


def score(
    problems: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    answer_format: AnswerFormat,
    *,
    wall_s: float = 0.0,
) -> EvaluationResult:
    """Score ``completions[i]``, the samples of ``problems[i]``: as many for every problem, at least 1.

    Raises:
        DataError: a problem has no usable reference answer (`check_problems`).
        ValueError: the lists do not fit together.
    """
    check_problems(problems, answer_format)
    n = _samples_per_problem(problems, completions)
    num_correct = [
        sum(is_correct(answer_format, sample.text, prompt.answer or "") for sample in samples)
        for prompt, samples in zip(problems, completions, strict=True)
    ]
    num_samples = [n] * len(problems)
    flat = [sample for samples in completions for sample in samples]
    return EvaluationResult(
        num_problems=len(problems),
        samples_per_problem=n,
        pass_at={k: float(np.mean(pass_at_k(num_samples, num_correct, k))) for k in _reported_k(n)},
        avg_at_n=avg_at_n(num_samples, num_correct),
        truncated_share=sum(sample.finish_reason == TRUNCATED for sample in flat) / len(flat),
        mean_tokens=sum(sample.num_tokens for sample in flat) / len(flat),
        wall_s=wall_s,
    )


def _samples_per_problem(problems: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> int:
    if len(problems) != len(completions):
        raise ValueError(f"{len(problems)} problems but {len(completions)} lists of completions")
    n = len(completions[0])
    for prompt, samples in zip(problems, completions, strict=True):
        if len(samples) != n or n == 0:
            raise ValueError(
                f"problem {prompt.id!r} has {len(samples)} completions and the first problem {n}: "
                "every problem needs the same number, at least 1"
            )
    return n


def _reported_k(n: int) -> list[int]:
    powers = [1 << exponent for exponent in range(n.bit_length())]
    return sorted({*powers, n})
