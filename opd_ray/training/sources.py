"""Prompts, problems and models that the `path` keys of a config name, the embedded ones included."""

from __future__ import annotations

from collections.abc import Mapping

from opd_ray.config.choices import AnswerFormat
from opd_ray.config.schema import DataConfig, RunConfig
from opd_ray.data.prompts import read_prompts
from opd_ray.errors import DataError, ModelError
from opd_ray.evaluation.grading import check_problems
from opd_ray.tiny.paths import student_path, teacher_path
from opd_ray.tiny.task import problems
from opd_ray.types import Prompt

TINY_PREFIX = "tiny:"
_TINY_DEFAULT_PROMPTS = 4000


def model_path(path: str) -> str:
    """The folder or hub id that a model path stands for: `tiny:student` and `tiny:teacher` are embedded models."""
    if not path.startswith(TINY_PREFIX):
        return path
    folders = {"student": student_path, "teacher": teacher_path}
    name = path.removeprefix(TINY_PREFIX)
    if name not in folders:
        raise ModelError(f"model {path!r} is unknown: give tiny:student, tiny:teacher, a folder or a hub id")
    return str(folders[name]())


def training_prompts(cfg: DataConfig, seed: int) -> list[Prompt]:
    """The prompts of `data.path`; raises `DataError`."""
    if cfg.path.startswith(TINY_PREFIX):
        return _tiny_prompts(cfg.path, cfg.num_prompts, seed)
    return read_prompts(cfg.path, cfg.num_prompts or None, fields=cfg.fields, unique=cfg.unique)


def evaluation_problems(cfg: RunConfig) -> list[Prompt]:
    """The problems of `evaluation.path` (none if it is empty); raises `DataError` where an answer is missing."""
    part = cfg.evaluation
    if not part.path:
        return []
    return answered_problems(part.path, part.fields, part.num_problems, part.answer_format, "evaluation")


def answered_problems(
    path: str, fields: Mapping[str, str], num_problems: int, answer_format: AnswerFormat, part: str
) -> list[Prompt]:
    """The first `num_problems` problems of `path` (0: all) with answers; `part` of the config is named in errors.

    Raises `DataError`, also where an answer is missing or of another format.
    """
    if path.startswith(TINY_PREFIX):
        # Always the same problems, so that runs with different seeds are compared on the same ground.
        found = _tiny_prompts(path, num_problems, 0)
    else:
        found = read_prompts(path, num_problems or None, fields=fields)
    check_problems(found, answer_format, part)
    return found


def _tiny_prompts(path: str, num_prompts: int, seed: int) -> list[Prompt]:
    split = path.removeprefix(TINY_PREFIX)
    if split not in ("train", "test"):
        raise DataError(f"data set {path!r} is unknown: give tiny:train, tiny:test, a file or hub:OWNER/NAME:SPLIT")
    return [
        Prompt(
            id=problem.id,
            problem=problem.problem,
            answer=problem.answer,
            solution=problem.solution,
            index=index,
        )
        for index, problem in enumerate(problems(split, num_prompts or _TINY_DEFAULT_PROMPTS, seed))
    ]
