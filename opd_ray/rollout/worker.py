"""The rollout worker: an actor that samples trajectories from the student with vLLM and takes over new weights.

vllm, torch and transformers are imported in the worker's constructor only.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opd_ray.config.choices import Dtype, Template
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ModelError
from opd_ray.evaluation.grading import Completion
from opd_ray.types import BatchMeta, LoadResult, Prompt, RolloutRequest, TrajectoryMeta, WeightsMeta

if TYPE_CHECKING:
    import pyarrow as pa

    from opd_ray.models.weights import WeightBucket


def sampling_seed(run_seed: int, purpose: str, number: int) -> int:
    """The seed of one response: a function of the run's seed, so that it does not depend on what else runs."""
    digest = hashlib.blake2b(f"{run_seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class RolloutWorker:
    """One vLLM engine."""

    def __init__(self, cfg: RunConfig, name: str, model_path: str, dtype: Dtype) -> None:
        """Build the engine with the weights of `model_path` in `dtype`; raises `ModelError`."""
        from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer, tokenizer_fingerprint
        from opd_ray.rollout.engine import Engine
        from opd_ray.trajectory.schema import BatchSpec

        self._cfg = cfg
        self._name = name
        self._model_path = model_path
        self._loading = asyncio.Lock()
        self._finished_before = 0
        self._tokenizer: Any = load_tokenizer(model_path)
        self._prompts = PromptTokenizer(self._tokenizer, cfg.data.template, model_path)
        self._batch_spec = BatchSpec(
            tokenizer_fingerprint(self._tokenizer),
            support=cfg.teacher.scored.name,
            student_top_k=cfg.student_top_k,
            sampled_logprob_dtype=cfg.replay.sampled_logprob_dtype.name,
        )
        max_model_tokens = cfg.data.max_prompt_tokens + cfg.longest_response_tokens
        try:
            self._engine = Engine(cfg.rollout, model_path, dtype, max_model_tokens, cfg.student_top_k)
        except (ValueError, OSError) as error:
            raise ModelError(
                f"vLLM cannot run {model_path!r} ({' '.join(str(error).split())[:300]}): "
                "check the model folder and rollout.*"
            ) from error

    async def ping(self) -> str:
        """The worker's name, once it is ready to serve."""
        return self._name

    async def generate(self, request: RolloutRequest) -> tuple[pa.Buffer, BatchMeta]:
        """Stage 3: sample every trajectory of the request; an Arrow payload and its metadata."""
        from opd_ray.rollout.engine import Sampling
        from opd_ray.trajectory.codec import encode_rollouts

        started = time.monotonic()
        cfg, part = self._cfg, self._cfg.rollout
        prompts = [prompt for prompt in request.prompts for _ in range(request.num_samples)][
            : len(request.trajectory_ids)
        ]
        encoded = {prompt.id: self._prompts.encode(prompt) for prompt in request.prompts}
        todo = {}
        for prompt, trajectory_id in zip(prompts, request.trajectory_ids, strict=True):
            seed = sampling_seed(cfg.seed, "rollout", trajectory_id)
            sampling = Sampling(part.temperature, part.top_p, part.max_response_tokens, seed, cfg.student_top_k)
            todo[f"rollout-{trajectory_id}"] = (encoded[prompt.id], sampling)
        streams = await self._engine.generate(todo)
        rows = [
            self._row(trajectory_id, prompt.id, encoded[prompt.id], streams[f"rollout-{trajectory_id}"])
            for prompt, trajectory_id in zip(prompts, request.trajectory_ids, strict=True)
        ]
        payload = encode_rollouts(rows, self._batch_spec)
        metas = tuple(_receipt(index, row) for index, row in enumerate(rows))
        return payload, BatchMeta(metas, self._name, time.monotonic() - started, payload.size)

    def _row(self, trajectory_id: int, prompt_id: str, prompt_token_ids: list[int], stream: Any) -> Any:
        import numpy as np

        from opd_ray.trajectory.rows import RolloutRow
        from opd_ray.trajectory.versions import version_segments

        starts, values = version_segments(stream.versions)
        return RolloutRow(
            trajectory_id=trajectory_id,
            prompt_id=prompt_id,
            prompt_token_ids=np.asarray(prompt_token_ids, dtype=np.int32),
            response_token_ids=np.asarray(stream.token_ids, dtype=np.int32),
            behavior_logprobs=np.asarray(stream.logprobs, dtype=np.float32),
            version_starts=starts,
            version_values=values,
            finish_reason=stream.finish_reason,
            temperature=self._cfg.rollout.temperature,
            top_p=self._cfg.rollout.top_p,
            student_topk_ids=np.asarray(stream.topk_ids, dtype=np.int32) if self._cfg.student_top_k else None,
        )

    async def complete(
        self, prompts: Sequence[Prompt], first: int, num_samples: int, template: Template | None = None
    ) -> list[list[Completion]]:
        """Sample `num_samples` answers to each evaluation problem; `first` is the number of the first one.

        All tokens of an answer come from the same weights: new ones wait for it to end. `template` None is the one that
        training uses.
        """
        from opd_ray.models.tokenization import PromptTokenizer
        from opd_ray.rollout.engine import Sampling

        cfg, part = self._cfg, self._cfg.evaluation
        self._finished_before = self._engine.num_finished
        view = PromptTokenizer(self._tokenizer, template, self._model_path) if template else self._prompts
        todo = {}
        for offset, prompt in enumerate(prompts):
            ids = view.encode(prompt)
            for sample in range(num_samples):
                seed = sampling_seed(cfg.seed, "evaluation", (first + offset) * num_samples + sample)
                sampling = Sampling(part.temperature, part.top_p, part.max_response_tokens, seed)
                todo[f"evaluation-{first + offset}-{sample}"] = (ids, sampling)
        streams = await self._engine.generate(todo, whole=True)
        texts = self._tokenizer.batch_decode(
            [streams[request_id].token_ids for request_id in todo], skip_special_tokens=True
        )
        flat = [
            Completion(text=text, num_tokens=len(stream.token_ids), finish_reason=stream.finish_reason)
            for text, stream in zip(texts, (streams[request_id] for request_id in todo), strict=True)
        ]
        return [flat[i : i + num_samples] for i in range(0, len(flat), num_samples)]

    async def progress(self) -> tuple[int, int]:
        """Responses that ended since the last `complete` began, and tokens decoded since the engine was built."""
        return self._engine.num_finished - self._finished_before, self._engine.num_decoded

    async def load_weights(self, published: WeightsMeta, *buckets: WeightBucket) -> LoadResult:
        """Stage 12: check and take over published weights, of whatever version, and confirm them.

        Raises `WeightSyncError`: before anything is loaded where the checksum differs, and the old weights stay in use.
        """
        from opd_ray.models.weights import check_same, combined_checksum

        # Those that come first are loaded first, however long their checksum takes.
        async with self._loading:
            # In a thread: decoding continues meanwhile.
            found = await asyncio.to_thread(combined_checksum, buckets)
            check_same(published.checksum, found, self._name)
            takeover = await self._engine.load_weights(buckets, published.policy_version)
        return LoadResult(
            worker=self._name,
            policy_version=published.policy_version,
            checksum=found,
            num_bytes=sum(bucket.data.nbytes for bucket in buckets),
            standstill_s=takeover.standstill_s,
            num_aborted_tokens=takeover.num_aborted_tokens,
        )

    async def abandon(self) -> None:
        """Drop all requests; who waits for them gets `ActorError`."""
        self._engine.abandon()

    async def stop(self) -> None:
        """Stop the engine, so that the process can end at once."""
        self._engine.shutdown()


def _receipt(index: int, row: Any) -> TrajectoryMeta:
    return TrajectoryMeta(
        trajectory_id=row.trajectory_id,
        prompt_id=row.prompt_id,
        row=index,
        num_prompt_tokens=len(row.prompt_token_ids),
        num_response_tokens=len(row.response_token_ids),
        oldest_version=int(row.version_values.min()),
        newest_version=int(row.version_values.max()),
        finish_reason=row.finish_reason,
    )
