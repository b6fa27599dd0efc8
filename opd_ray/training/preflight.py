"""Checks that need tokenizers and model configs, made in one short-lived worker before any engine is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.config.choices import Overlong
from opd_ray.config.schema import RunConfig
from opd_ray.errors import DataError, ModelError
from opd_ray.planning.model_files import shape_of_loaded
from opd_ray.planning.model_shape import ModelShape
from opd_ray.types import Prompt


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """`vocab_size` ids mean the same to student and teacher; `kept` are indices of prompts within the limit.

    `shapes` are the student's and the teacher's sizes, None where the number of parameters is unknown.
    """

    vocab_size: int
    tokenizer_fingerprint: str
    kept: tuple[int, ...]
    shapes: tuple[ModelShape | None, ModelShape | None] = (None, None)


def preflight(
    cfg: RunConfig, student_path: str, teacher_path: str, prompts: Sequence[Prompt], problems: Sequence[Prompt]
) -> PreflightReport:
    """Check models and prompts against each other; raises `ModelError` or `DataError`."""
    from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer, tokenizer_fingerprint

    student, teacher = load_tokenizer(student_path), load_tokenizer(teacher_path)
    fingerprint, other = tokenizer_fingerprint(student), tokenizer_fingerprint(teacher)
    if fingerprint != other:
        raise ModelError(
            f"student {student_path!r} ({len(student)} tokens) and teacher {teacher_path!r} "
            f"({len(teacher)} tokens) have different tokenizers, so their ids mean different text: "
            "choose a teacher with the student's tokenizer"
        )
    of_student, of_teacher = (_checked_config(path, cfg) for path in (student_path, teacher_path))
    vocab_size = min(int(of_student.vocab_size), int(of_teacher.vocab_size))
    if (top_k := cfg.teacher.top_k) > vocab_size:
        raise ModelError(
            f"teacher.top_k={top_k} exceeds the vocabulary of {vocab_size} tokens: give a value <= {vocab_size}"
        )
    views = {
        "data": PromptTokenizer(student, cfg.data.template, student_path),
        "teacher": PromptTokenizer(teacher, cfg.teacher.template, teacher_path),
    }
    kept = _within_limit(cfg, prompts, list(views.values()))
    _within_limit(cfg, problems, [views["data"]])
    shapes = (
        shape_of_loaded(of_student.to_dict(), student_path),
        shape_of_loaded(of_teacher.to_dict(), teacher_path),
    )
    return PreflightReport(vocab_size, fingerprint, kept, shapes)


def _checked_config(path: str, cfg: RunConfig) -> Any:
    from transformers import AutoConfig

    from opd_ray.models.tokenization import cannot_load

    try:
        config: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise cannot_load("model config", path, error) from error
    limit, response = cfg.data.max_prompt_tokens, cfg.longest_response_tokens
    longest = limit + response
    context = getattr(config, "max_position_embeddings", longest)
    if longest > context:
        raise ModelError(
            f"data.max_prompt_tokens={limit} plus the longest response of {response} "
            f"tokens exceed the context of {context} tokens of {path!r}: lower one of them"
        )
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", None):
        raise ModelError(
            f"{path!r} rescales its logits, which the learner's sparse head does not: choose a model with a plain head"
        )
    return config


def _within_limit(cfg: RunConfig, prompts: Sequence[Prompt], views: Sequence[Any]) -> tuple[int, ...]:
    limit = cfg.data.max_prompt_tokens
    lengths = [max(len(view.encode(prompt)) for view in views) for prompt in prompts]
    kept = tuple(index for index, length in enumerate(lengths) if length <= limit)
    over = len(lengths) - len(kept)
    if not over:
        return kept
    worst = max(range(len(lengths)), key=lambda index: lengths[index])
    if cfg.data.overlong is Overlong.error or not kept:
        raise DataError(
            f"{over} of {len(lengths)} prompts are longer than data.max_prompt_tokens={limit}, the "
            f"longest is {prompts[worst].id!r} with {lengths[worst]} tokens: raise the limit, or set data.overlong=drop"
        )
    return kept
