"""Rollout: actors that sample trajectories from the student with vLLM, and take over new weights while they do.

vllm, torch and transformers are imported in the worker's constructor only.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd_ray.cluster.worker_group import vllm_env
from opd_ray.config.choices import LogprobDtype, OnNewWeights, Support, Template
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ModelError
from opd_ray.evaluation.grading import Completion
from opd_ray.planning.placement import Share
from opd_ray.rollout.engine_group import EngineGroup
from opd_ray.types import BatchReceipt, LoadReceipt, Prompt, RolloutRequest, TrajectoryReceipt, WeightsReceipt

if TYPE_CHECKING:
    import pyarrow as pa

    from opd_ray.models.weights import WeightBucket

ROLE = "rollout"


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """A rollout worker's part of the config; lengths in tokens."""

    name: str
    model_path: str
    dtype: str
    template: Template
    max_model_tokens: int
    max_num_seqs: int
    gpu_memory_utilization: float
    max_response_tokens: int
    temperature: float
    top_p: float
    seed: int
    eval_max_response_tokens: int
    eval_temperature: float
    eval_top_p: float
    support: Support
    top_k: int
    on_new_weights: OnNewWeights
    sampled_logprob_dtype: LogprobDtype
    tensor_parallel: int = 1

    @classmethod
    def of(cls, cfg: RunConfig, name: str, model_path: str, dtype: str) -> RolloutSpec:
        """The part of `cfg` for an engine with the weights of `model_path`."""
        longest = max(cfg.rollout.max_response_tokens, cfg.evaluation.max_response_tokens)
        return cls(
            name=name,
            model_path=model_path,
            dtype=dtype,
            template=cfg.data.template,
            max_model_tokens=cfg.data.max_prompt_tokens + longest,
            max_num_seqs=cfg.rollout.max_num_seqs,
            gpu_memory_utilization=cfg.rollout.gpu_memory_utilization,
            max_response_tokens=cfg.rollout.max_response_tokens,
            temperature=cfg.rollout.temperature,
            top_p=cfg.rollout.top_p,
            seed=cfg.seed,
            eval_max_response_tokens=cfg.evaluation.max_response_tokens,
            eval_temperature=cfg.evaluation.temperature,
            eval_top_p=cfg.evaluation.top_p,
            support=cfg.teacher.scored,
            top_k=cfg.teacher.top_k,
            on_new_weights=cfg.rollout.on_new_weights,
            sampled_logprob_dtype=cfg.replay.sampled_logprob_dtype,
            tensor_parallel=cfg.rollout.tensor_parallel,
        )

    @property
    def student_top_k(self) -> int:
        """How many of the student's own most probable ids a trajectory carries at each position."""
        return self.top_k if self.support is Support.student_topk else 0


def sampling_seed(run_seed: int, purpose: str, number: int) -> int:
    """The seed of one response: a function of the run's seed, so that it does not depend on what else runs."""
    digest = hashlib.blake2b(f"{run_seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class RolloutWorker:
    """One vLLM engine."""

    def __init__(self, spec: RolloutSpec) -> None:
        from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer, tokenizer_fingerprint
        from opd_ray.rollout.engine import Engine, EngineSpec
        from opd_ray.trajectory.schema import BatchSpec

        self._spec = spec
        self._loading = asyncio.Lock()
        self._finished_before = 0
        self._tokenizer: Any = load_tokenizer(spec.model_path)
        self._prompts = PromptTokenizer(self._tokenizer, spec.template, spec.model_path)
        fingerprint = tokenizer_fingerprint(self._tokenizer)
        self._batch_spec = BatchSpec(
            fingerprint,
            support=spec.support.name,
            student_top_k=spec.student_top_k,
            sampled_logprob_dtype=spec.sampled_logprob_dtype.name,
        )
        try:
            self._engine = Engine(
                EngineSpec(
                    model_path=spec.model_path,
                    dtype=spec.dtype,
                    max_model_tokens=spec.max_model_tokens,
                    max_num_seqs=spec.max_num_seqs,
                    gpu_memory_utilization=spec.gpu_memory_utilization,
                    top_logprobs=spec.student_top_k,
                    on_new_weights=spec.on_new_weights,
                    tensor_parallel=spec.tensor_parallel,
                )
            )
        except (ValueError, OSError) as error:
            raise ModelError(
                f"vLLM cannot run {spec.model_path!r} ({' '.join(str(error).split())[:300]}): "
                "check the model folder and rollout.*"
            ) from error

    async def ping(self) -> str:
        """The worker's name, once it is ready to serve."""
        return self._spec.name

    async def generate(self, request: RolloutRequest) -> tuple[pa.Buffer, BatchReceipt]:
        """Hop 3: sample every slot of the request; an Arrow payload and its receipt."""
        from opd_ray.rollout.engine import Sampling
        from opd_ray.trajectory.codec import encode_rollouts

        started = time.monotonic()
        spec = self._spec
        prompts = [prompt for prompt in request.prompts for _ in range(request.num_samples)][: len(request.slots)]
        encoded = {prompt.id: self._prompts.encode(prompt) for prompt in request.prompts}
        todo = {}
        for prompt, slot in zip(prompts, request.slots, strict=True):
            seed = sampling_seed(spec.seed, "rollout", slot)
            sampling = Sampling(spec.temperature, spec.top_p, spec.max_response_tokens, seed, spec.student_top_k)
            todo[f"rollout-{slot}"] = (encoded[prompt.id], sampling)
        streams = await self._engine.generate(todo)
        rows = [
            self._row(slot, prompt.id, encoded[prompt.id], streams[f"rollout-{slot}"])
            for prompt, slot in zip(prompts, request.slots, strict=True)
        ]
        payload = encode_rollouts(rows, self._batch_spec)
        receipts = tuple(_receipt(index, row) for index, row in enumerate(rows))
        return payload, BatchReceipt(receipts, spec.name, time.monotonic() - started, payload.size)

    def _row(self, slot: int, prompt_id: str, prompt_token_ids: list[int], stream: Any) -> Any:
        import numpy as np

        from opd_ray.trajectory.rows import RolloutRow
        from opd_ray.trajectory.versions import version_segments

        starts, values = version_segments(stream.versions)
        return RolloutRow(
            slot=slot,
            prompt_id=prompt_id,
            prompt_token_ids=np.asarray(prompt_token_ids, dtype=np.int32),
            response_token_ids=np.asarray(stream.token_ids, dtype=np.int32),
            behavior_logprobs=np.asarray(stream.logprobs, dtype=np.float32),
            version_starts=starts,
            version_values=values,
            finish_reason=stream.finish_reason,
            temperature=self._spec.temperature,
            top_p=self._spec.top_p,
            student_topk_ids=np.asarray(stream.topk_ids, dtype=np.int32) if self._spec.student_top_k else None,
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

        spec = self._spec
        self._finished_before = self._engine.num_finished
        view = PromptTokenizer(self._tokenizer, template, spec.model_path) if template else self._prompts
        todo = {}
        for offset, prompt in enumerate(prompts):
            ids = view.encode(prompt)
            for sample in range(num_samples):
                seed = sampling_seed(spec.seed, "evaluation", (first + offset) * num_samples + sample)
                sampling = Sampling(spec.eval_temperature, spec.eval_top_p, spec.eval_max_response_tokens, seed)
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

    async def load_weights(self, published: WeightsReceipt, *buckets: WeightBucket) -> LoadReceipt:
        """Hop 12: check and take over published weights, of whatever version, and confirm them.

        Raises `WeightSyncError`: before anything is loaded where the checksum differs, and the old weights stay in use.
        """
        from opd_ray.models.weights import check_same, combined_checksum

        # Those that come first are loaded first, however long their checksum takes.
        async with self._loading:
            # In a thread: decoding goes on meanwhile.
            found = await asyncio.to_thread(combined_checksum, buckets)
            check_same(published.checksum, found, self._spec.name)
            takeover = await self._engine.load_weights(buckets, published.policy_version)
        return LoadReceipt(
            worker=self._spec.name,
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


def _receipt(index: int, row: Any) -> TrajectoryReceipt:
    return TrajectoryReceipt(
        slot=row.slot,
        prompt_id=row.prompt_id,
        row=index,
        num_prompt_tokens=len(row.prompt_token_ids),
        num_response_tokens=len(row.response_token_ids),
        oldest_version=int(row.version_values.min()),
        newest_version=int(row.version_values.max()),
        finish_reason=row.finish_reason,
    )


class RolloutGroup(EngineGroup):
    """All rollout engines."""

    @classmethod
    def create(cls, cfg: RunConfig, share: Share, paths: Sequence[str], role: str = ROLE) -> RolloutGroup:
        """Start one engine for each entry of `paths`; returns at once (await `ready`).

        Under another `role` than the usual one it samples from the teacher, in the teacher's dtype.
        """
        group = cls(role, cfg.deadline_s, cfg.faults.max_restarts)
        dtype = (cfg.student if role == ROLE else cfg.teacher).dtype.name
        specs = [(RolloutSpec.of(cfg, f"{role}-{index}", path, dtype),) for index, path in enumerate(paths)]
        env = vllm_env(share, cfg.rollout.kv_cache_gib, cfg.rollout.tensor_parallel)
        group.start(RolloutWorker, share, specs, env, cfg.placement.rollout)
        return group
