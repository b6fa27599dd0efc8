"""Judges what engines hold on a set of problems: the same steps in training and in `opd_ray.evaluate`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opd_ray.config.choices import Template
from opd_ray.config.schema import EvaluationConfig, RunConfig
from opd_ray.evaluation.grading import Completion, GradedSample, OnDone, ProblemSet, grade, to_samples
from opd_ray.evaluation.scoring import EvaluationResult, sum_up
from opd_ray.evaluation.verifier import Verification
from opd_ray.types import Prompt

FOLDER = "evaluation"
"""Where a run folder keeps the samples of its evaluations."""


class Engines(Protocol):
    """What answers problems (`rollout.group.RolloutGroup`)."""

    def complete(
        self,
        problems: Sequence[Prompt],
        num_samples: int,
        *,
        template: Template | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Awaitable[list[list[Completion]]]:
        """`num_samples` answers to each problem."""
        ...


@dataclass(frozen=True, slots=True)
class Steps:
    """Is told how far an evaluation is: answers that have ended, and answers that have their verdict, of all."""

    sampled: OnDone
    verified: OnDone


async def judge(
    engines: Engines, problems: ProblemSet, num_samples: int, settings: Verification, steps: Steps | None = None
) -> tuple[list[GradedSample], EvaluationResult]:
    """Sample `num_samples` answers to every problem with the engines' current weights, verify them, and sum up.

    The result's `wall_s` is the time that sampling took.
    """
    total = num_samples * len(problems.problems)
    begun = time.monotonic()
    completions = await engines.complete(
        problems.problems,
        num_samples,
        template=problems.template,
        on_progress=None if steps is None else lambda done: steps.sampled(done, total),
    )
    wall_s = time.monotonic() - begun
    samples = to_samples(problems.problems, completions, problems.answer_format)
    graded = await grade(samples, problems.answer_format, settings, None if steps is None else steps.verified)
    return graded, sum_up(graded, wall_s=wall_s)


@dataclass(frozen=True, slots=True)
class SamplesFile:
    """Where the samples of one evaluation of a run go, and whose they are."""

    path: Path
    model: str
    policy_version: int | None


async def evaluate(
    cfg: RunConfig, engines: Engines, problems: Sequence[Prompt], file: SamplesFile | None = None
) -> EvaluationResult:
    """One evaluation of a training run, on ``evaluation.path``; its samples go to `file`."""
    part = cfg.evaluation
    problem_set = ProblemSet(problem_set_name(part.path), problems, part.answer_format)
    graded, result = await judge(engines, problem_set, part.samples_per_problem, verification_of(part))
    if file is not None:
        # pyarrow is imported by those who need it.
        from opd_ray.evaluation.samples import SamplesHeader, write_samples

        header = SamplesHeader(
            model=file.model,
            policy_version=file.policy_version,
            temperature=part.temperature,
            top_p=part.top_p,
            max_response_tokens=part.max_response_tokens,
            answer_format={problem_set.name: part.answer_format},
            seed=cfg.seed,
        )
        await asyncio.to_thread(write_samples, file.path, {problem_set.name: graded}, header)
    return result


def verification_of(part: EvaluationConfig) -> Verification:
    """How a run's answers are verified."""
    return Verification(num_workers=part.num_verifiers, budget_s=part.verification_budget_s)


def evaluation_metrics(result: EvaluationResult) -> dict[str, float]:
    """An evaluation's figures as metrics."""
    return {f"evaluation/{name}": float(value) for name, value in result.as_dict().items()}


def problem_set_name(path: str) -> str:
    """A short name for the problems of `path`: `tiny`, a data set's name without its owner, or a file's stem."""
    kind, _, rest = path.partition(":")
    if kind == "hub":
        return rest.split(":")[0].rsplit("/", 1)[-1].lower()
    return kind if rest else Path(path).stem
