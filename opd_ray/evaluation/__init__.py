"""Evaluation: answer extraction and checking, pass@k and avg@n. Standard library and numpy only."""

from opd_ray.evaluation.answers import extract, is_correct
from opd_ray.evaluation.pass_at_k import avg_at_n, pass_at_k
from opd_ray.evaluation.scoring import Completion, EvaluationResult, check_problems, score

__all__ = [
    "Completion",
    "EvaluationResult",
    "avg_at_n",
    "check_problems",
    "extract",
    "is_correct",
    "pass_at_k",
    "score",
]
