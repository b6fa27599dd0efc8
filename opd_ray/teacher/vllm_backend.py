"""The teacher in a vLLM engine, which may be split over several GPUs (`teacher.tensor_parallel`).

The engine is asked for the log-probs of prompt tokens, where the prompt is prompt and response together. Imports torch
and vllm: teacher workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams

from opd_ray.config.schema import RunConfig
from opd_ray.errors import ModelError, SchemaError
from opd_ray.teacher.transformers_backend import Ids, Scores


class TeacherEngine:
    """Scores responses like `teacher_model.TeacherModel`, for the teacher's own top K.

    Raises `ModelError` where vLLM cannot run the model, or its vocabulary is not the student's: vLLM normalises over
    all ids that the teacher has.
    """

    def __init__(self, cfg: RunConfig, model_path: str, vocab_size: int) -> None:
        part = cfg.teacher
        # One more than is scored: vLLM samples a token after each prompt.
        longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens + 1
        try:
            self._engine = LLM(
                model=model_path,
                dtype=part.dtype.name,  # type: ignore[arg-type]
                max_model_len=longest,
                max_num_batched_tokens=max(part.max_batch_tokens, longest),
                tensor_parallel_size=part.tensor_parallel,
                distributed_executor_backend="uni" if part.tensor_parallel == 1 else "mp",
                gpu_memory_utilization=part.gpu_memory_utilization,
                max_logprobs=part.top_k,
                logprobs_mode="raw_logprobs",
                # Cached prefixes have no log-probs.
                enable_prefix_caching=False,
                enforce_eager=not torch.cuda.is_available(),
                disable_log_stats=True,
            )
        except (ValueError, OSError) as error:
            raise ModelError(
                f"vLLM cannot run the teacher {model_path!r} ({' '.join(str(error).split())[:300]}): "
                "check the model folder and teacher.*"
            ) from error
        found = int(self._engine.model_config.get_vocab_size())
        if found != vocab_size:
            self.shutdown()
            raise ModelError(
                f"the teacher has {found} ids and shares {vocab_size} with the student: set "
                "teacher.backend=transformers, which leaves the others out"
            )
        self._vocab_size = vocab_size

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Ids], support: int) -> list[Scores]:
        """Scores of each response [T] after its prompt, at the teacher's own top K, K being `support`.

        Raises `SchemaError` when an id is none of those that student and teacher share.
        """
        for response in responses:
            if response.size and int(response.max()) >= self._vocab_size:
                raise SchemaError(
                    f"column 'response_token_ids' has the id {int(response.max())} and student and teacher share "
                    f"{self._vocab_size} ids: choose a teacher with the student's vocabulary size"
                )
        inputs: list[Any] = [
            {"prompt_token_ids": [*prompt, *response.tolist()]}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        sampling = SamplingParams(
            prompt_logprobs=support, flat_logprobs=True, max_tokens=1, detokenize=False, temperature=0.0
        )
        outputs = self._engine.generate(inputs, sampling, use_tqdm=False)
        return [
            _scores(output.prompt_logprobs, len(prompt), len(response), support)
            for output, prompt, response in zip(outputs, prompts, responses, strict=True)
        ]

    def shutdown(self) -> None:
        """Stop the engine and its processes; without it the interpreter can hang at its exit."""
        engine: Any = self._engine.llm_engine
        engine.engine_core.shutdown()


def _scores(found: Any, num_prompt_tokens: int, num_response_tokens: int, top_k: int) -> Scores:
    """The response's part of vLLM's flat log-probs: at each position the given token's, then those of rank 1 to K."""
    first, shape = found.start_indices[num_prompt_tokens], (num_response_tokens, top_k + 1)
    ids = np.asarray(found.token_ids[first:], dtype=np.int32).reshape(shape)
    logprobs = np.asarray(found.logprobs[first:], dtype=np.float32).reshape(shape)
    return Scores(np.ascontiguousarray(logprobs[:, 0]), ids[:, 1:].copy(), logprobs[:, 1:].copy())
