"""Evaluation: answer extraction and checking, pass@k, avg@n and intervals. Standard library and numpy only."""

from opd_ray.evaluation.answers import extract, is_correct
from opd_ray.evaluation.bootstrap import paired_bootstrap
from opd_ray.evaluation.pass_at_k import avg_at_n, pass_at_k
from opd_ray.evaluation.scoring import Completion, EvaluationResult, check_problems, score

__all__ = [
    "Completion",
    "EvaluationResult",
    "avg_at_n",
    "check_problems",
    "extract",
    "is_correct",
    "paired_bootstrap",
    "pass_at_k",
    "score",
]
