"""Teacher: actors that score response positions with log-probs at K support ids, and the sampled token's log-prob.

The teacher may see another prompt than the student (a template with a worked solution): positions are aligned on the
response. torch and transformers are imported in the worker's constructor only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from opd_ray.cluster.worker_group import MALLOC_ENV, WorkerGroup, vllm_env
from opd_ray.config.choices import LogprobDtype, Support, TeacherBackend
from opd_ray.config.schema import RunConfig
from opd_ray.planning.placement import Share
from opd_ray.types import BatchMeta, Prompt

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

ROLE = "teacher"


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """The config of the run and what it does not say.

    `vocab_size` is the number of ids that student and teacher share.
    """

    cfg: RunConfig
    name: str
    model_path: str
    vocab_size: int
    tokenizer_fingerprint: str
    threads: int


class Scorer(Protocol):
    """What scores responses."""

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Any], support: Any) -> list[Any]:
        """See `teacher_model.TeacherModel.score`."""

    def shutdown(self) -> None:
        """End what was started."""


class TeacherWorker:
    """One copy of the teacher."""

    def __init__(self, spec: TeacherSpec) -> None:
        import torch

        from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer
        from opd_ray.trajectory.schema import BatchSpec

        torch.set_num_threads(spec.threads)
        self._spec = spec
        cfg = self._cfg = spec.cfg
        tokenizer: Any = load_tokenizer(spec.model_path)
        pad_id = int(tokenizer.pad_token_id or 0)
        self._model = load_scorer(spec, pad_id)
        self._prompts = PromptTokenizer(tokenizer, cfg.teacher.template, spec.model_path)
        self._batch_spec = BatchSpec(
            spec.tokenizer_fingerprint,
            top_k=cfg.teacher.top_k,
            logprob_dtype=cfg.replay.logprob_dtype.name,
            support=cfg.teacher.scored.name,
            sampled_logprob_dtype=cfg.replay.sampled_logprob_dtype.name,
        )

    def ping(self) -> str:
        """The worker's name, once it is ready to serve."""
        return self._spec.name

    def score(self, payload: pa.Buffer, meta: BatchMeta, prompts: Sequence[Prompt]) -> tuple[Any, BatchMeta]:
        """Stages 4 and 5: a rollout payload with teacher columns added, and its metadata.

        `prompts` holds the prompt of every trajectory. Raises `SchemaError` when the payload was made with another
        tokenizer or for another support, or has ids that the teacher does not share.
        """
        from opd_ray.trajectory.codec import add_teacher_columns, decode
        from opd_ray.trajectory.columns import row_views

        started = time.monotonic()
        cfg = self._cfg
        batch = decode(payload, expected=self._batch_spec.rollout)
        by_id = {prompt.id: self._prompts.encode(prompt) for prompt in prompts}
        given = row_views(batch, "student_topk_ids") if cfg.teacher.scored is Support.student_topk else None
        scores = self._model.score(
            [by_id[str(prompt_id)] for prompt_id in batch.column("prompt_id").to_pylist()],
            row_views(batch, "response_token_ids"),
            cfg.teacher.top_k if given is None else given,
        )
        out = add_teacher_columns(
            batch,
            rounded([row.logprobs for row in scores], cfg.replay.sampled_logprob_dtype),
            [row.topk_ids for row in scores] if given is None else None,
            rounded([row.topk_logprobs for row in scores], cfg.replay.logprob_dtype),
            self._batch_spec,
        )
        return out, BatchMeta(meta.trajectories, self._spec.name, time.monotonic() - started, out.size)

    def stop(self) -> None:
        """Stop what the scorer has started, so that the process can end at once."""
        self._model.shutdown()


def load_scorer(spec: TeacherSpec, pad_id: int) -> Scorer:
    """The teacher's model, as `teacher.backend` says; raises `ModelError`."""
    if spec.cfg.teacher.backend is TeacherBackend.vllm:
        from opd_ray.teacher.vllm_backend import TeacherEngine

        return TeacherEngine(spec.cfg, spec.model_path, spec.vocab_size)
    from opd_ray.teacher.transformers_backend import TeacherModel

    part = spec.cfg.teacher
    return TeacherModel(spec.model_path, part.dtype, pad_id, spec.vocab_size, part.max_batch_tokens)


def rounded(arrays: Sequence[npt.NDArray[np.float32]], dtype: LogprobDtype) -> list[npt.NDArray[np.floating[Any]]]:
    """The arrays in `dtype`, by torch: numpy gives the same bits of float16, eight times as slowly."""
    import torch

    target = getattr(torch, dtype.name)
    return [torch.from_numpy(array).to(target).numpy() for array in arrays]


class TeacherGroup(WorkerGroup):
    """All teacher workers."""

    @classmethod
    def create(cls, cfg: RunConfig, share: Share, vocab_size: int, fingerprint: str, path: str) -> TeacherGroup:
        """Start the workers; returns at once (await `ready`)."""
        group = cls(ROLE, cfg.deadline_s, cfg.faults.max_restarts)
        names = [f"{ROLE}-{index}" for index in range(cfg.teacher.num_workers)]
        specs = [(TeacherSpec(cfg, name, path, vocab_size, fingerprint, share.threads),) for name in names]
        is_engine = cfg.teacher.backend is TeacherBackend.vllm
        env = vllm_env(share, cfg.teacher.kv_cache_gib, cfg.teacher.tensor_parallel) if is_engine else MALLOC_ENV
        group.start(TeacherWorker, share, specs, env, cfg.placement.teacher)
        return group
