"""Memory of one rollout engine and of one teacher worker."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opd_ray.planning.activations import inference_bytes
from opd_ray.planning.amounts import Amount, Origin, WorkerNeed, expected
from opd_ray.planning.model_shape import ModelShape
from opd_ray.planning.overheads import CUDA_CONTEXT, CUDA_PROCESS_HOST, ROLLOUT_PROCESS, TEACHER_PROCESS

# Tokens of prompts that vLLM takes in at once: `rollout.engine.MIN_PREFILL_TOKENS` on CPU, its own default on a GPU.
_PREFILL_TOKENS_CPU = 4096
_PREFILL_TOKENS_GPU = 8192
# Logits that a teacher holds at once (`teacher.transformers_backend.MAX_LOGITS`).
_MAX_LOGITS = 2**25
_CONTEXT = Amount.possible("CUDA context", CUDA_CONTEXT, "no measurement", Origin.assumed)
_CUDA_PROCESS = Amount.possible("process", CUDA_PROCESS_HOST, "Python, torch with CUDA", Origin.assumed)


def _weights_in_words(shape: ModelShape, item_bytes: int) -> str:
    return f"{shape.num_parameters:,} parameters x {item_bytes} bytes"


@dataclass(frozen=True, slots=True)
class RolloutInput:
    """An engine's part of a plan; lengths in tokens, `sequences` the most that it has at a time.

    `gpu_bytes` is the memory of one GPU (None: unknown), of which the engine takes `gpu_memory_utilization`;
    `tensor_parallel` GPUs share its weights and its cache.
    """

    shape: ModelShape
    num_engines: int
    gpus: float
    cpus: float
    item_bytes: int
    max_model_tokens: int
    sequences: int
    kv_cache_bytes: float
    gpu_memory_utilization: float
    gpu_bytes: float | None = None
    tensor_parallel: int = 1

    @property
    def sequence_bytes(self) -> float:
        """KV cache of one sequence of full length, on one GPU."""
        # vLLM copies heads that it cannot split.
        parts = min(self.tensor_parallel, self.shape.kv_heads)
        return self.shape.kv_bytes(self.item_bytes) * self.max_model_tokens / parts

    @property
    def one_sequence(self) -> Amount:
        """`sequence_bytes`, without which vLLM refuses to start; less where layers look back a window only."""
        sure = self.shape.least_cached_tokens(self.max_model_tokens) / self.max_model_tokens
        how = f"{self.max_model_tokens:,} tokens; vLLM refuses less"
        return Amount("KV cache, one sequence", self.sequence_bytes, self.sequence_bytes * sure, Origin.computed, how)


def rollout_need(given: RolloutInput) -> WorkerNeed:
    """The need of one engine, a GPU of it where it has several."""
    return _rollout_on_gpu(given) if given.gpus else _rollout_on_cpu(given)


def _rollout_on_gpu(given: RolloutInput) -> WorkerNeed:
    weights = given.shape.num_parameters * given.item_bytes / given.tensor_parallel
    one = given.sequence_bytes
    prefill = _PREFILL_TOKENS_GPU * inference_bytes(given.shape, given.item_bytes)
    device = [
        Amount.certain("weights", weights, _weights_in_words(given.shape, given.item_bytes)),
        given.one_sequence,
        Amount.possible("prefill", prefill, f"{_PREFILL_TOKENS_GPU} tokens in one layer"),
        _CONTEXT,
    ]
    notes: tuple[str, ...] = ()
    filling: tuple[Amount, ...] = ()
    if given.gpu_bytes is not None:
        share = given.gpu_memory_utilization * given.gpu_bytes
        rest = max(0.0, share - expected(device))
        how = f"the rest of gpu_memory_utilization={given.gpu_memory_utilization:g}"
        filling = (Amount.certain("KV cache, the others", rest, how),)
        notes = (_kv_note(given, rest + one),)
    weights_on_host = given.shape.num_parameters * given.item_bytes / given.tensor_parallel
    host = (
        Amount.possible("process", CUDA_PROCESS_HOST * given.tensor_parallel, "vLLM with CUDA", Origin.assumed),
        Amount.possible("weights while they are loaded", weights_on_host, "through host memory"),
    )
    actions = "lower rollout.max_response_tokens or data.max_prompt_tokens, raise rollout.gpu_memory_utilization"
    return WorkerNeed(
        role="rollout",
        count=given.num_engines,
        gpus=given.gpus,
        cpus=given.cpus,
        device=tuple(device),
        host=host,
        actions=actions,
        notes=notes,
        device_share=given.gpu_memory_utilization,
        filling=filling,
    )


def _rollout_on_cpu(given: RolloutInput) -> WorkerNeed:
    shape, size = given.shape, given.item_bytes
    used = min(given.kv_cache_bytes, given.sequences * given.sequence_bytes)
    prefill = max(_PREFILL_TOKENS_CPU, given.max_model_tokens) * inference_bytes(shape, size)
    host = (
        Amount("process", ROLLOUT_PROCESS, ROLLOUT_PROCESS / 2, Origin.measured, "Python, torch, vLLM"),
        Amount.certain("weights", shape.num_parameters * size, _weights_in_words(shape, size)),
        Amount.possible("head, packed again", shape.largest_parameter * size, "vLLM's own copy of it on CPU"),
        Amount.possible("KV cache", used, f"{given.sequences} sequences of full length, in what is reserved"),
        Amount.possible("prefill", prefill, "tokens taken in at once, in one layer"),
    )
    notes = (_kv_note(given, given.kv_cache_bytes),)
    actions = "lower rollout.kv_cache_gib, rollout.num_engines or rollout.max_response_tokens"
    return WorkerNeed("rollout", given.num_engines, 0, given.cpus, (), host, actions, notes)


def _kv_note(given: RolloutInput, room: float) -> str:
    fitting = max(0, math.floor(room / given.sequence_bytes))
    words = f"KV cache for {fitting} sequences of {given.max_model_tokens:,} tokens at a time"
    if fitting >= given.sequences:
        return f"{words}, an engine has {given.sequences}"
    return f"{words}, an engine has up to {given.sequences}: the others wait where all are of full length"


@dataclass(frozen=True, slots=True)
class TeacherInput:
    """A teacher worker's part of a plan; `batch_tokens` are the padded tokens of its largest forward pass.

    `engine_share` is 0 for a transformers teacher; else a vLLM engine takes that share of `gpu_bytes`, or
    `kv_cache_bytes` of host memory, for sequences of at most `max_model_tokens`.
    """

    shape: ModelShape
    num_workers: int
    gpus: float
    cpus: float
    item_bytes: int
    batch_tokens: int
    top_k: int
    tensor_parallel: int = 1
    engine_share: float = 0.0
    kv_cache_bytes: float = 0.0
    max_model_tokens: int = 1
    gpu_bytes: float | None = None


def teacher_need(given: TeacherInput) -> WorkerNeed:
    """The need of one worker, a GPU of it where it has several."""
    if given.engine_share:
        return _teacher_engine_need(given)
    shape, size, positions = given.shape, given.item_bytes, given.batch_tokens
    weights = Amount.certain("weights", shape.num_parameters * size, _weights_in_words(shape, size))
    logits = min(_MAX_LOGITS, positions * shape.vocab) * (size + (4 if size < 4 else 0))
    states = positions * (inference_bytes(shape, size) + size * shape.hidden)
    batch = (
        Amount.possible("activations", states, f"{positions:,} tokens of a batch in one layer"),
        Amount.possible("logits", logits, "at most 2^25 at a time, and in float32"),
        Amount.possible("top-K", positions * given.top_k * 24, f"ids and log-probs of K = {given.top_k}"),
    )
    actions = "lower teacher.max_batch_tokens, or set teacher.dtype=bfloat16"
    if given.gpus:
        loading = Amount.possible("model while it is loaded", weights.expected, "then moved to the GPU")
        device, host = (weights, *batch, _CONTEXT), (_CUDA_PROCESS, loading)
        return WorkerNeed("teacher", given.num_workers, given.gpus, given.cpus, device, host, actions)
    process = Amount("process", TEACHER_PROCESS, TEACHER_PROCESS / 2, Origin.measured, "Python, torch")
    return WorkerNeed("teacher", given.num_workers, 0, given.cpus, (), (process, weights, *batch), actions)


def _teacher_engine_need(given: TeacherInput) -> WorkerNeed:
    """As a rollout engine's, and the logits of all prompt tokens of a batch in float32, which vLLM makes at once."""
    engine = RolloutInput(
        shape=given.shape,
        num_engines=given.num_workers,
        gpus=given.gpus,
        cpus=given.cpus,
        item_bytes=given.item_bytes,
        max_model_tokens=given.max_model_tokens,
        sequences=max(1, given.batch_tokens // given.max_model_tokens),
        kv_cache_bytes=given.kv_cache_bytes,
        gpu_memory_utilization=given.engine_share,
        gpu_bytes=given.gpu_bytes,
        tensor_parallel=given.tensor_parallel,
    )
    need = rollout_need(engine)
    size = given.batch_tokens * given.shape.vocab * 4
    logits = Amount.possible("logits", size, "of a batch's tokens", Origin.assumed)
    actions = "lower teacher.max_batch_tokens, or set teacher.backend=transformers"
    if given.gpus:
        return replace(need, role="teacher", device=(*need.device, logits), actions=actions)
    return replace(need, role="teacher", host=(*need.host, logits), actions=actions)
