"""Teacher: actors that score response positions with top-K ids and log-probs, and the sampled token's log-prob.

The teacher may see another prompt than the student (a template with a worked solution): positions are aligned on the
response. torch and transformers are imported in the worker's constructor only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd_ray.actors.group import WorkerGroup
from opd_ray.config import Dtype, LogprobDtype, RunConfig, Template
from opd_ray.placement import Share
from opd_ray.types import BatchReceipt, Prompt

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from opd_ray.actors.scoring_model import PaddedRows

ROLE = "teacher"


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """A teacher worker's part of the config; `vocab_size` is the number of ids that student and teacher share."""

    name: str
    model_path: str
    dtype: Dtype
    template: Template
    top_k: int
    logprob_dtype: LogprobDtype
    max_batch_tokens: int
    vocab_size: int
    tokenizer_fingerprint: str
    threads: int


class TeacherWorker:
    """One copy of the teacher, run with transformers."""

    def __init__(self, spec: TeacherSpec) -> None:
        import torch

        from opd_ray.actors.scoring_model import load_causal_lm
        from opd_ray.actors.tokenization import PromptTokenizer, load_tokenizer
        from opd_ray.replay.schema import BatchSpec

        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = load_causal_lm(spec.model_path, spec.dtype).to(self._device).eval()
        tokenizer: Any = load_tokenizer(spec.model_path)
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._prompts = PromptTokenizer(tokenizer, spec.template, spec.model_path)
        self._batch_spec = BatchSpec(spec.tokenizer_fingerprint, spec.top_k, spec.logprob_dtype.name)

    def ping(self) -> str:
        """The worker's name, once it is ready to serve."""
        return self._spec.name

    def score(self, payload: pa.Buffer, receipt: BatchReceipt, prompts: Sequence[Prompt]) -> tuple[Any, BatchReceipt]:
        """Hops 4 and 5: a rollout payload with teacher columns added, and its receipt.

        `prompts` holds the prompt of every trajectory. Raises `SchemaError` when the payload was made with another
        tokenizer.
        """
        from opd_ray.replay.codec import add_teacher_columns, decode
        from opd_ray.replay.rows import rollout_rows
        from opd_ray.replay.schema import BatchSpec

        started = time.monotonic()
        spec = self._spec
        batch = decode(payload, expected=BatchSpec(spec.tokenizer_fingerprint))
        rows = rollout_rows(batch)
        by_id = {prompt.id: self._prompts.encode(prompt) for prompt in prompts}
        scored = self._score_rows([by_id[row.prompt_id] for row in rows], [row.response_token_ids for row in rows])
        sampled, ids, logprobs = zip(*scored, strict=True)
        out = add_teacher_columns(batch, sampled, ids, logprobs, self._batch_spec)
        return out, BatchReceipt(receipt.trajectories, spec.name, time.monotonic() - started, out.size)

    def _score_rows(self, prompts: list[list[int]], responses: list[Any]) -> list[tuple[Any, Any, Any]]:
        import numpy as np
        import torch

        from opd_ray.actors.scoring_model import pad_rows

        results: list[tuple[Any, Any, Any]] = [()] * len(prompts)  # type: ignore[list-item]
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        for members in _batches_by_length(lengths, self._spec.max_batch_tokens):
            block = pad_rows(
                [np.asarray(prompts[i], dtype=np.int32) for i in members],
                [responses[i] for i in members],
                self._pad_id,
                self._device,
            )
            sampled_ids = torch.from_numpy(np.concatenate([responses[i] for i in members]).astype(np.int64))
            with torch.inference_mode():
                outputs = self._score_block(block, sampled_ids)
            parts = [torch.split(value, list(block.lengths)) for value in outputs]
            for member, *row in zip(members, *parts, strict=True):
                sampled, ids, logprobs = (value.numpy() for value in row)
                results[member] = (sampled, ids, logprobs)
        return results

    def _score_block(self, block: PaddedRows, sampled_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled log-probs [N], top-K ids int32 [N, K] and log-probs [N, K] of one padded block, on the CPU."""
        import torch

        from opd_ray.actors.scoring_model import hidden_states

        hidden = hidden_states(self._model, block.input_ids, block.positions)
        head = self._model.get_output_embeddings().weight[: self._spec.vocab_size]
        sampled, ids, logprobs = [], [], []
        # A chunk of positions at a time, so that [N, V] never exists as a whole.
        chunk = max(1, 2**25 // head.shape[0])
        for start in range(0, len(hidden), chunk):
            # Raw log-probs, at temperature 1, over the ids that the student has too.
            full = torch.log_softmax((hidden[start : start + chunk] @ head.T).float(), dim=-1)
            top = full.topk(self._spec.top_k, dim=-1)
            sampled.append(full.gather(1, sampled_ids[start : start + chunk, None].to(self._device))[:, 0].cpu())
            ids.append(top.indices.to(torch.int32).cpu())
            logprobs.append(top.values.cpu())
        return torch.cat(sampled), torch.cat(ids), torch.cat(logprobs)

    def stop(self) -> None:
        """Nothing to stop."""


def _batches_by_length(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most `max_batch_tokens` padded tokens (or one sequence)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, max_batch_tokens // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


class TeacherGroup(WorkerGroup):
    """All teacher workers."""

    @classmethod
    def create(cls, cfg: RunConfig, share: Share, vocab_size: int, fingerprint: str, path: str) -> TeacherGroup:
        """Start the workers; returns at once (await `ready`)."""
        group = cls(ROLE, cfg.deadline_s)
        specs = [
            (
                TeacherSpec(
                    name=f"{ROLE}-{index}",
                    model_path=path,
                    dtype=cfg.teacher.dtype,
                    template=cfg.teacher.template,
                    top_k=cfg.teacher.top_k,
                    logprob_dtype=cfg.replay.logprob_dtype,
                    max_batch_tokens=cfg.teacher.max_batch_tokens,
                    vocab_size=vocab_size,
                    tokenizer_fingerprint=fingerprint,
                    threads=share.threads,
                ),
            )
            for index in range(cfg.teacher.num_workers)
        ]
        group.start(TeacherWorker, share, specs, {})
        return group
