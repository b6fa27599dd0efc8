"""The three scorers that `bench_teacher.py` compares: each turns an Arrow rollout batch into an Arrow scored batch."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.config.choices import Dtype, LogprobDtype, Template
from opd_ray.config.schema import ReplayConfig, RunConfig, TeacherConfig
from opd_ray.trajectory.codec import add_teacher_columns, decode
from opd_ray.trajectory.columns import row_views
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.types import BatchMeta, Prompt

# Padded tokens in one forward pass, and tokens in one step of vLLM: for both more than a batch here needs.
MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Work:
    """One rollout batch and what is to be found out about it."""

    model: str
    dtype: Dtype
    threads: int
    top_k: int
    vocab_size: int
    fingerprint: str
    payload: bytes
    prompts: tuple[Prompt, ...]

    @property
    def spec(self) -> BatchSpec:
        """The scored batch; float16 log-probs as by default."""
        return BatchSpec(self.fingerprint, self.top_k, LogprobDtype.float16.name)


class OurScorer:
    """The teacher worker, in this process."""

    def __init__(self, work: Work) -> None:
        from opd_ray.teacher.worker import TeacherSpec, TeacherWorker

        self._work = work
        cfg = RunConfig(
            teacher=TeacherConfig(dtype=work.dtype, top_k=work.top_k, max_batch_tokens=MAX_BATCH_TOKENS),
            replay=ReplayConfig(logprob_dtype=LogprobDtype.float16),
        )
        spec = TeacherSpec(cfg, "teacher-0", work.model, work.vocab_size, work.fingerprint, work.threads)
        self._worker = TeacherWorker(spec)

    def score(self, payload: bytes) -> pa.Buffer:
        """Scored batch of a rollout batch."""
        scored: pa.Buffer
        scored, _ = self._worker.score(pa.py_buffer(payload), BatchMeta((), "", 0.0, 0), self._work.prompts)
        return scored

    def raw_bytes(self) -> int | None:
        """What it hands out is the wire form."""
        return None


class VllmScorer:
    """A vLLM engine that is asked for prompt log-probs of prompt and response."""

    def __init__(self, work: Work, flat: bool, compiled: bool) -> None:
        from vllm import LLM, SamplingParams

        from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer

        self._work = work
        self._flat = flat
        self._tokenizer = PromptTokenizer(load_tokenizer(work.model), Template.completion, work.model)
        self._last: list[Any] = []
        self._engine = LLM(
            model=work.model,
            dtype=work.dtype.name,  # type: ignore[arg-type]
            max_model_len=1024,
            max_num_batched_tokens=MAX_BATCH_TOKENS,
            max_logprobs=work.top_k,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=False,
            enforce_eager=not compiled,
            disable_log_stats=True,
        )
        self._sampling = SamplingParams(
            prompt_logprobs=work.top_k, flat_logprobs=flat, max_tokens=1, detokenize=False, temperature=0.0
        )

    def score(self, payload: bytes) -> pa.Buffer:
        """Scored batch of a rollout batch."""
        batch = decode(payload, expected=self._work.spec.rollout)
        by_id = {prompt.id: self._tokenizer.encode(prompt) for prompt in self._work.prompts}
        prompts = [by_id[str(prompt_id)] for prompt_id in batch.column("prompt_id").to_pylist()]
        responses = [response.tolist() for response in row_views(batch, "response_token_ids")]
        inputs = [{"prompt_token_ids": [*p, *r]} for p, r in zip(prompts, responses, strict=True)]
        outputs = self._engine.generate(inputs, self._sampling, use_tqdm=False)  # type: ignore[arg-type]
        self._last = [output.prompt_logprobs for output in outputs]
        read = self._read_flat if self._flat else self._read_dicts
        rows = [read(*row) for row in zip(prompts, responses, self._last, strict=True)]
        sampled, ids, logprobs = zip(*rows, strict=True)
        return add_teacher_columns(batch, sampled, ids, logprobs, self._work.spec)

    def _read_flat(self, prompt: list[int], response: list[int], found: Any) -> tuple[Any, Any, Any]:
        # Each position has the given token first, and then those of rank 1 to K.
        first, shape = found.start_indices[len(prompt)], (len(response), self._work.top_k + 1)
        ids = np.asarray(found.token_ids[first:], dtype=np.int32).reshape(shape)
        logprobs = np.asarray(found.logprobs[first:], dtype=np.float32).reshape(shape)
        return logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]

    def _read_dicts(self, prompt: list[int], response: list[int], found: Any) -> tuple[Any, Any, Any]:
        # A given token that is not among the K is one more entry, the first. The order of the others does not matter.
        positions, top_k = found[len(prompt) :], self._work.top_k
        sampled = [entries[token].logprob for entries, token in zip(positions, response, strict=True)]
        ids = [list(entries)[-top_k:] for entries in positions]
        logprobs = [[entry.logprob for entry in entries.values()][-top_k:] for entries in positions]
        return np.array(sampled, np.float32), np.array(ids, np.int32), np.array(logprobs, np.float32)

    def raw_bytes(self) -> int | None:
        """Size of the response positions of what the engine handed out, pickled as between two processes."""
        lengths = [len(row) for row in row_views(decode(self._work.payload), "response_token_ids")]
        return sum(len(pickle.dumps(found[-n:], protocol=5)) for found, n in zip(self._last, lengths, strict=True))


def make_scorer(name: str, work: Work, compiled: bool) -> OurScorer | VllmScorer:
    """``opd_ray``, ``vllm_dict`` or ``vllm_flat``; `compiled` lets vLLM compile its model."""
    return OurScorer(work) if name == "opd_ray" else VllmScorer(work, name == "vllm_flat", compiled)
