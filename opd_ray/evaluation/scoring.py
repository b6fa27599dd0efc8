"""Scores from verdicts: pass@k, avg@n, intervals, reasons for wrong answers, and their lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_ray.config.choices import AnswerFormat
from opd_ray.evaluation.bootstrap import bootstrap_interval
from opd_ray.evaluation.grading import Completion, GradedSample, grade_exactly, to_samples
from opd_ray.evaluation.pass_at_k import avg_at_n, pass_at_k
from opd_ray.evaluation.verdict import Verdict
from opd_ray.types import Prompt

TRUNCATED = "length"
"""Finish reason of a completion that reached the token limit."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What one model reached on one set of problems.

    `pass_at` maps every k from 1 to n to the mean over problems of the unbiased pass@k. Intervals are 95 % percentile
    bootstraps over problems, of pass@n and of avg@n. `shares` are of all samples, by verdict; `truncated_share` is the
    share that reached the token limit, `mean_tokens` the mean length in tokens; `wall_s` is the time that the
    evaluation took, in seconds, as the caller measured it.
    """

    num_problems: int
    samples_per_problem: int
    pass_at: Mapping[int, float]
    pass_at_n_interval: Interval
    avg_at_n: float
    avg_at_n_interval: Interval
    shares: Mapping[Verdict, float]
    truncated_share: float
    mean_tokens: float
    wall_s: float

    def as_dict(self, *, every_k: bool = False) -> dict[str, float]:
        """A flat, JSON-able dict; with n = 8 it has `pass_at_1`, `_2`, `_4`, `_8` and `avg_at_8`.

        The figures at n have their intervals beside them, `pass_at_8_low` and so on. With `every_k` it has all k from 1
        to n, not the powers of two and n only.
        """
        n = self.samples_per_problem
        reported = [k for k in sorted(self.pass_at) if every_k or k == n or k.bit_count() == 1]
        return {
            **{f"pass_at_{k}": self.pass_at[k] for k in reported},
            f"pass_at_{n}_low": self.pass_at_n_interval[0],
            f"pass_at_{n}_high": self.pass_at_n_interval[1],
            f"avg_at_{n}": self.avg_at_n,
            f"avg_at_{n}_low": self.avg_at_n_interval[0],
            f"avg_at_{n}_high": self.avg_at_n_interval[1],
            "num_problems": self.num_problems,
            "samples_per_problem": n,
            **{f"{verdict.name}_share": self.shares[verdict] for verdict in Verdict if verdict is not Verdict.correct},
            "truncated_share": self.truncated_share,
            "mean_tokens": self.mean_tokens,
            "wall_s": self.wall_s,
        }


def score(
    problems: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    answer_format: AnswerFormat,
    *,
    wall_s: float = 0.0,
) -> EvaluationResult:
    """Grade without algebra (`grade_exactly`) and sum up; raises what `to_samples` raises."""
    return sum_up(grade_exactly(to_samples(problems, completions, answer_format), answer_format), wall_s=wall_s)


def sum_up(samples: Sequence[GradedSample], *, wall_s: float = 0.0) -> EvaluationResult:
    """The figures of one problem set's samples, in the order of their problems.

    Raises:
        ValueError: there is none, or problems have different numbers of them.
    """
    num_samples = Counter(sample.problem_id for sample in samples)
    sizes = set(num_samples.values())
    if len(sizes) != 1:
        raise ValueError(f"problems have {sorted(sizes)} samples: give every problem the same number, at least 1")
    n = sizes.pop()
    hits = Counter(sample.problem_id for sample in samples if sample.verdict is Verdict.correct)
    # In the order of the samples, so that the same problems are drawn for the intervals of every model.
    num_correct = [hits[problem] for problem in num_samples]
    each = [n] * len(num_correct)
    verdicts = Counter(sample.verdict for sample in samples)
    return EvaluationResult(
        num_problems=len(num_correct),
        samples_per_problem=n,
        pass_at={k: float(np.mean(pass_at_k(each, num_correct, k))) for k in range(1, n + 1)},
        pass_at_n_interval=bootstrap_interval(pass_at_k(each, num_correct, n)),
        avg_at_n=avg_at_n(each, num_correct),
        avg_at_n_interval=bootstrap_interval(np.asarray(num_correct) / n),
        shares={verdict: verdicts[verdict] / len(samples) for verdict in Verdict},
        truncated_share=sum(sample.finish_reason == TRUNCATED for sample in samples) / len(samples),
        mean_tokens=sum(sample.num_tokens for sample in samples) / len(samples),
        wall_s=wall_s,
    )
