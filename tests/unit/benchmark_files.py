"""Problem files for tests: the project's own small ones in tests/data, and how their keys are graded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from opd_ray.config.choices import AnswerFormat
from opd_ray.evaluation.grading import Completion, grade, to_samples
from opd_ray.evaluation.verdict import Verdict
from opd_ray.evaluation.verifier import Verification
from opd_ray.types import Prompt

DATA = Path(__file__).resolve().parents[1] / "data"
BENCHMARKS = ["aime24", "aime25", "amc23", "gsm8k", "math500"]


def refused_by_their_own_key(problems: Sequence[Prompt], answer_format: AnswerFormat) -> list[str]:
    """Ids of the problems whose own answer, given as a model would give it, is not graded as correct."""
    frame = r"So it is \boxed{%s}." if answer_format is AnswerFormat.boxed else "So it is %s."
    completions = [[Completion(frame.replace("%s", problem.answer or ""), 5, "stop")] for problem in problems]
    samples = to_samples(problems, completions, answer_format)
    graded = asyncio.run(grade(samples, answer_format, Verification(num_workers=2, budget_s=20.0)))
    return [sample.problem_id for sample in graded if sample.verdict is not Verdict.correct]
