"""Limits of a model, and whether problems fit it; found in one short-lived worker before any engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from opd_ray.cluster.remote_calls import remote_result
from opd_ray.cluster.worker_group import worker_env
from opd_ray.config.choices import Dtype, Template
from opd_ray.errors import DataError, ModelError
from opd_ray.evaluation.grading import ProblemSet
from opd_ray.planning.placement import Share


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """`context` and the shortest and longest prompt of all problems in tokens; `dtype` is that of the saved weights."""

    context: int
    shortest_prompt: int
    longest_prompt: int
    dtype: Dtype


async def model_limits(model_path: str, sets: Sequence[ProblemSet], deadline_s: float) -> ModelLimits:
    """Raises `ModelError` where the model cannot be read, `DataError` where a prompt leaves no room for a response."""
    remote: Any = ray.remote(read_limits)
    env = {"env_vars": worker_env(Share(ray_cpus=1, gpus=0, threads=1))}
    ref = remote.options(num_cpus=1, max_retries=0, runtime_env=env).remote(model_path, list(sets))
    found: ModelLimits = await remote_result(ref, "preflight", deadline_s)
    return found


def read_limits(model_path: str, sets: Sequence[ProblemSet]) -> ModelLimits:
    """What `model_limits` returns; imports transformers."""
    from transformers import AutoConfig

    from opd_ray.models.tokenization import PromptTokenizer, cannot_load, load_tokenizer

    tokenizer: Any = load_tokenizer(model_path)
    try:
        config: Any = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise cannot_load("model config", model_path, error) from error
    context = int(getattr(config, "max_position_embeddings", 0)) or int(tokenizer.model_max_length)
    shortest, longest = context, 0
    for part in sets:
        template = part.template or Template.completion
        if template.name not in ("completion", "completion_with_solution") and not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {model_path!r} has no chat template, which template {template.name!r} of "
                f"{part.name} needs: set template=completion"
            )
        view = PromptTokenizer(tokenizer, template, model_path)
        for prompt in part.problems:
            length = len(view.encode(prompt))
            if length >= context:
                raise DataError(
                    f"{part.name}: problem {prompt.id!r} has {length} tokens and the context of {model_path!r} "
                    f"{context}: leave it out, or evaluate a model with a longer context"
                )
            shortest, longest = min(shortest, length), max(longest, length)
    return ModelLimits(context, shortest, longest, _saved_dtype(config))


def _saved_dtype(config: Any) -> Dtype:
    # The older name is what configs written before transformers 5 say.
    name = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32")
    return Dtype.float32 if name.endswith("float32") else Dtype.bfloat16
