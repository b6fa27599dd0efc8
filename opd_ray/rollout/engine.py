"""One in-process vLLM engine that stamps each token with its log-prob and the policy version that made it.

The engine is stepped from the event loop of its actor; between two steps other calls of the actor run, so new weights
arrive in the middle of running requests. What becomes of these is `OnNewWeights`. Imported in rollout workers only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.sampling_params import RequestOutputKind

from opd_ray.config.choices import Dtype, OnNewWeights
from opd_ray.config.schema import RolloutConfig
from opd_ray.errors import ActorError, WeightSyncError
from opd_ray.models.weights import WeightBucket
from opd_ray.rollout import weight_transfer

# Tokens of prompts that one step may take in on CPU.
MIN_PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a response is sampled; `seed` makes it independent of what else runs.

    `top_logprobs` is how many of the most probable ids are noted at each position, 0 for none.
    """

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    top_logprobs: int = 0


@dataclass(slots=True)
class Stream:
    """One request, and its tokens as they arrive: ids, behaviour log-probs and policy versions, each [T].

    `topk_ids` [T][K] are the most probable ids at each position, best first, by raw log-probs; empty if not asked for.
    """

    prompt_token_ids: list[int]
    sampling: Sampling
    is_whole: bool
    done: asyncio.Future[None]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    topk_ids: list[list[int]] = field(default_factory=list)
    finish_reason: str = ""

    def restart(self) -> int:
        """Forget the tokens; returns how many there were."""
        num_tokens = len(self.token_ids)
        for tokens in (self.token_ids, self.logprobs, self.versions, self.topk_ids):
            tokens.clear()
        return num_tokens


@dataclass(frozen=True, slots=True)
class Takeover:
    """What new weights have cost: seconds in which no token could be decoded, and response tokens thrown away."""

    standstill_s: float
    num_aborted_tokens: int


class Engine:
    """A vLLM engine with weights of a known policy version.

    An error in decoding, or in the middle of loading weights, leaves it in a state that nobody knows: it goes to all
    who wait, and to every later call. `num_decoded` tokens and `num_finished` responses were made since it was built.
    """

    def __init__(
        self, cfg: RolloutConfig, model_path: str, dtype: Dtype, max_model_tokens: int, max_top_logprobs: int
    ) -> None:
        """Load the model; `max_model_tokens` bounds prompt + response, `max_top_logprobs` that of a `Sampling`.

        With `cfg.tensor_parallel` above 1 the model is split over as many processes, children of this one.
        """
        weight_transfer.register()
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=model_path,
                dtype=dtype.name,  # type: ignore[arg-type]
                max_model_len=max_model_tokens,
                max_num_seqs=cfg.max_num_seqs,
                gpu_memory_utilization=cfg.gpu_memory_utilization,
                enforce_eager=True,
                tensor_parallel_size=cfg.tensor_parallel,
                distributed_executor_backend="uni" if cfg.tensor_parallel == 1 else "mp",
                worker_extension_cls=weight_transfer.WORKER_EXTENSION,
                async_scheduling=False,
                # Cached prefixes would outlive the weights that made them.
                enable_prefix_caching=False,
                **_prefill_args(max_model_tokens),
                max_logprobs=max(1, max_top_logprobs),
                logprobs_mode="raw_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=weight_transfer.BACKEND),
                disable_log_stats=True,
            )
        )
        self._engine.collective_rpc("init_weight_transfer_engine", args=({},))
        self._streams: dict[str, Stream] = {}
        self._loop_task: asyncio.Task[None] | None = None
        # Closed while new weights wait for running requests to end.
        self._intake = asyncio.Event()
        self._intake.set()
        self._failure: Exception | None = None
        self._num_abandoned = 0
        self.on_new_weights = cfg.on_new_weights
        self.policy_version = 0
        self.num_decoded = 0
        self.num_finished = 0

    async def generate(
        self, requests: dict[str, tuple[list[int], Sampling]], *, whole: bool = False
    ) -> dict[str, Stream]:
        """Sample one response for each request id and wait for all; ``{id: (prompt_token_ids, sampling)}``.

        `whole` ones end with the weights they began with, and are never thrown away, whatever `on_new_weights` says.
        Raises `ActorError` for an id that runs already.
        """
        num_abandoned = self._num_abandoned
        while self._must_end(whole) and not self._intake.is_set():
            await self._intake.wait()
        self._check_usable()
        if num_abandoned != self._num_abandoned:
            raise _dropped()
        if twice := requests.keys() & self._streams.keys():
            raise ActorError(f"requests {sorted(twice)[:3]} run already: wait for them before sending them again")
        loop = asyncio.get_running_loop()
        streams = {}
        for request_id, (prompt_token_ids, sampling) in requests.items():
            stream = Stream(prompt_token_ids, sampling, whole, loop.create_future())
            self._add(request_id, stream)
            streams[request_id] = self._streams[request_id] = stream
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = loop.create_task(self._decode())
        await asyncio.gather(*(stream.done for stream in streams.values()))
        return streams

    def abandon(self) -> None:
        """Drop all requests, those that wait to begin too; who waits for them gets `ActorError`."""
        self._num_abandoned += 1
        self._engine.abort_request(list(self._streams))
        for stream in self._streams.values():
            if not stream.done.done():
                stream.done.set_exception(_dropped())
        self._streams.clear()

    def _must_end(self, whole: bool) -> bool:
        """Whether such requests end before new weights are loaded, and wait for these when they come meanwhile."""
        return whole or self.on_new_weights is OnNewWeights.finish

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _add(self, request_id: str, stream: Stream) -> None:
        prompt = {"prompt_token_ids": stream.prompt_token_ids}
        self._engine.add_request(request_id, prompt, _sampling_params(stream.sampling))

    async def _decode(self) -> None:
        try:
            while self._failure is None and self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    self._accept(output)
                # Lets other calls of the actor in between two decoding steps (load_weights above all).
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  (whatever the engine raises goes to those who wait)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for stream in self._streams.values():
            if not stream.done.done():
                stream.done.set_exception(error)
        self._streams.clear()

    def _accept(self, output: Any) -> None:
        stream = self._streams[output.request_id]
        completion = output.outputs[0]
        new_ids: Sequence[int] = completion.token_ids
        stream.token_ids.extend(new_ids)
        flat = completion.logprobs
        # The first entry of a position is the sampled token's, then come those of rank 1 to K (it once more, perhaps).
        stream.logprobs.extend(flat.logprobs[start] for start in flat.start_indices)
        spans = zip(flat.start_indices, flat.end_indices, strict=True)
        stream.topk_ids.extend(flat.token_ids[start + 1 : end] for start, end in spans if end - start > 1)
        stream.versions.extend([self.policy_version] * len(new_ids))
        self.num_decoded += len(new_ids)
        if output.finished:
            self.num_finished += 1
            stream.finish_reason = completion.finish_reason or "unknown"
            del self._streams[output.request_id]
            # A caller that was cancelled waits no more.
            if not stream.done.done():
                stream.done.set_result(None)

    async def load_weights(self, buckets: Sequence[WeightBucket], policy_version: int) -> Takeover:
        """Take over new weights between two decoding steps, with `on_new_weights`; one call at a time.

        Raises `WeightSyncError` when they cannot be loaded; the engine is of no use then.
        """
        self._intake.clear()
        try:
            running = [stream.done for stream in self._streams.values() if self._must_end(stream.is_whole)]
            if running:
                await asyncio.wait(running)
            self._check_usable()
            return self._take_over(buckets, policy_version)
        finally:
            self._intake.set()

    def _take_over(self, buckets: Sequence[WeightBucket], policy_version: int) -> Takeover:
        """The part in which decoding stands still: nothing else runs in the event loop meanwhile."""
        begun = time.perf_counter()
        again = dict(self._streams) if self.on_new_weights is OnNewWeights.abort else {}
        # vLLM tells nothing of an aborted request afterwards, and the same id may come again at once.
        self._engine.abort_request(list(again))
        num_aborted_tokens = sum(stream.restart() for stream in again.values())
        try:
            self._engine.collective_rpc("start_weight_update")
            for bucket in buckets:
                self._engine.collective_rpc("update_weights", args=({"bucket": bucket},))
            self._engine.collective_rpc("finish_weight_update")
            for request_id, stream in again.items():
                self._add(request_id, stream)
        except Exception as error:
            failure = WeightSyncError(
                f"the engine has loaded only a part of version {policy_version} ({type(error).__name__}: {error}): "
                "replace it with a new one"
            )
            self._fail(failure)
            raise failure from error
        self.policy_version = policy_version
        return Takeover(time.perf_counter() - begun, num_aborted_tokens)

    def shutdown(self) -> None:
        """Stop the engine core; without it the interpreter can hang at its exit."""
        self._engine.engine_core.shutdown()


def _dropped() -> ActorError:
    return ActorError("the request was dropped, because the run goes back to its last checkpoint: send it again")


def _prefill_args(max_model_tokens: int) -> dict[str, Any]:
    """On CPU no prompt may be split over steps: vLLM would then rewind a random generator, which torch cannot."""
    if torch.cuda.is_available():
        return {}
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(MIN_PREFILL_TOKENS, max_model_tokens),
    }


def _sampling_params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        logprobs=sampling.top_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
