"""Evaluation: answer extraction and checking, pass@k, avg@n and intervals. Standard library and numpy only.

`samples` (pyarrow) is imported by those who read or write files, math-verify in the processes of `verifier` only.
"""

from opd_ray.evaluation.answers import extract, is_correct
from opd_ray.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from opd_ray.evaluation.grading import Completion, GradedSample, ProblemSet, Sample, check_problems, grade, to_samples
from opd_ray.evaluation.pass_at_k import avg_at_n, pass_at_k
from opd_ray.evaluation.scoring import EvaluationResult, score, sum_up
from opd_ray.evaluation.verdict import Verdict
from opd_ray.evaluation.verifier import Verification

__all__ = [
    "Completion",
    "EvaluationResult",
    "GradedSample",
    "ProblemSet",
    "Sample",
    "Verdict",
    "Verification",
    "avg_at_n",
    "bootstrap_interval",
    "check_problems",
    "extract",
    "grade",
    "is_correct",
    "paired_bootstrap",
    "pass_at_k",
    "score",
    "sum_up",
    "to_samples",
]
