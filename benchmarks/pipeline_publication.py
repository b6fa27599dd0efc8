"""Part `publication` of `bench_pipeline`: weights of a larger model from the learner until all engines confirm.

The actors are the real ones; what is added are clocks in their processes. No step is trained: weights of the same size
are exported each time.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.pipeline_runs import quartiles
from opd_ray.config.choices import Dtype
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ActorError
from opd_ray.learner.group import LearnerGroup, LearnerWorker
from opd_ray.learner.spec import ROLE as LEARNER
from opd_ray.learner.spec import LearnerSpec
from opd_ray.models import weights
from opd_ray.planning.placement import Share, plan_resources
from opd_ray.rollout.group import ROLE as ROLLOUT
from opd_ray.rollout.group import RolloutGroup
from opd_ray.rollout.worker import RolloutWorker
from opd_ray.types import LoadResult, Prompt, RolloutRequest, WeightsMeta

DEADLINE_S = 300.0
SEQUENCES = 8
RESPONSE_TOKENS = 1024
# SmolLM2-135M's shape.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@dataclass(slots=True)
class Clock:
    """Moments (`time.time`, which all processes of a machine share) of one publication in one process."""

    begun: float = 0.0
    ended: float = 0.0
    checksum_s: float = 0.0
    # When decoding steps began and ended.
    decoding: list[tuple[float, float]] = field(default_factory=list)

    def time_checksums(self) -> None:
        """Count the seconds of every checksum that this process makes."""
        original = weights.combined_checksum

        def timed(buckets: Any) -> str:
            begun = time.perf_counter()
            try:
                return original(buckets)
            finally:
                self.checksum_s += time.perf_counter() - begun

        weights.combined_checksum = timed

    def time_decoding(self, engine: Any) -> None:
        """Note every decoding step of a vLLM engine."""
        original: Callable[[], Any] = engine.step

        def timed() -> Any:
            begun = time.time()
            try:
                return original()
            finally:
                self.decoding.append((begun, time.time()))

        engine.step = timed

    def longest_gap_s(self) -> float:
        """Longest time between two decoding steps around the publication; 0 where there was none."""
        pairs = zip(self.decoding, self.decoding[1:], strict=False)
        return max((after[0] - before[1] for before, after in pairs if after[0] > self.begun), default=0.0)


class TimedLearner(LearnerWorker):
    """The real rank with clocks."""

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self._clock = Clock()
        self._clock.time_checksums()

    def export(self, policy_version: int) -> Any:
        """As the base class."""
        self._clock.begun, self._clock.checksum_s = time.time(), 0.0
        exported = super().export(policy_version)
        self._clock.ended = time.time()
        return exported

    def clock(self) -> Clock:
        """Of the last export."""
        return self._clock


class TimedEngine(RolloutWorker):
    """The real engine with clocks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._clock = Clock()
        self._clock.time_checksums()
        self._clock.time_decoding(self._engine._engine)

    async def load_weights(self, published: WeightsMeta, *buckets: weights.WeightBucket) -> LoadResult:
        """As the base class."""
        self._clock.begun, self._clock.checksum_s = time.time(), 0.0
        del self._clock.decoding[:-1]
        meta = await super().load_weights(published, *buckets)
        self._clock.ended = time.time()
        return meta

    async def clock(self) -> Clock:
        """Of the last publication."""
        return self._clock


def save_random_model(folder: Path) -> str:
    """A model of SmolLM2-135M's shape with random float32 weights and the tiny tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from opd_ray.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(SHAPE["max_position_embeddings"])
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**SHAPE, **ids)).save_pretrained(folder)  # type: ignore[no-untyped-call,arg-type]
    tokenizer.save_pretrained(folder)
    return str(folder)


def publication_config(engines: int) -> RunConfig:
    """What the actors are told."""
    cfg = RunConfig(deadline_s=DEADLINE_S)
    cfg.student.dtype = Dtype.float32
    cfg.rollout.num_engines, cfg.learner.num_ranks = engines, 1
    cfg.rollout.max_response_tokens = cfg.evaluation.max_response_tokens = RESPONSE_TOKENS
    cfg.data.max_prompt_tokens, cfg.rollout.max_num_seqs = 64, SEQUENCES
    cfg.replay.max_staleness = 2
    return cfg


@dataclass(slots=True)
class Publishers:
    """A learner and its engines."""

    learner: LearnerGroup
    rollout: RolloutGroup
    version: int = 0

    @classmethod
    def create(cls, cfg: RunConfig, model: str) -> Publishers:
        """Start the actors, with as many threads as a run here would give them."""
        plan = plan_resources(cfg, os.cpu_count() or 1, 0)
        learner = LearnerGroup(LEARNER, DEADLINE_S)
        learner.start(TimedLearner, _free(plan.learner), [(LearnerSpec(cfg, 0, model, plan.learner.threads),)], {})
        rollout = RolloutGroup(ROLLOUT, DEADLINE_S)
        names = [f"{ROLLOUT}-{index}" for index in range(cfg.rollout.num_engines)]
        args = [(cfg, name, model, cfg.student.dtype) for name in names]
        rollout.start(TimedEngine, _free(plan.rollout), args, {"VLLM_CPU_KVCACHE_SPACE": "1"})
        return cls(learner, rollout)

    async def publish(self) -> dict[str, float]:
        """One publication as the learner loop makes it, with the seconds of its parts."""
        self.version += 1
        asked = time.time()
        meta, buckets = await self.learner.export(self.version)
        exported = time.time()
        loaded = await self.rollout.publish(meta, buckets)
        confirmed = time.time()
        (source,) = await self.learner.all(lambda worker: worker.clock.remote())
        clocks: list[Clock] = await self.rollout.all(lambda worker: worker.clock.remote())
        pack_s = source.ended - source.begun - source.checksum_s
        parts = {
            "total_s": confirmed - asked,
            "export_s": exported - asked,
            "export/pack_s": pack_s,
            "export/checksum_s": source.checksum_s,
            "export/put_and_call_s": exported - asked - pack_s - source.checksum_s,
            "engines_s": confirmed - exported,
            "num_bytes": float(meta.num_bytes),
            "mb_per_s": meta.num_bytes / 1e6 / (confirmed - asked),
        }
        # Of the engine that was slowest in each.
        split = [_engine_parts(clock, answer, exported) for clock, answer in zip(clocks, loaded, strict=True)]
        return parts | {name: max(one[name] for one in split) for name in split[0]}


def _free(share: Share) -> Share:
    """The same threads, with nothing asked of Ray: not all groups of a run are here."""
    return Share(0.0, 0.0, share.threads)


def _engine_parts(clock: Clock, answer: LoadResult, exported: float) -> dict[str, float]:
    return {
        "engine/transfer_s": clock.begun - exported,
        "engine/checksum_s": clock.checksum_s,
        "engine/standstill_s": answer.standstill_s,
        "engine/other_s": clock.ended - clock.begun - clock.checksum_s - answer.standstill_s,
        "engine/longest_decoding_gap_s": clock.longest_gap_s(),
    }


async def _decode(rollout: RolloutGroup) -> None:
    """Keep all engines busy until their requests are dropped."""
    prompt = Prompt(id="p", problem="7+3-4=")

    async def one(worker: Any, index: int) -> None:
        trajectory_ids = tuple(10_000 * (index + 1) + place for place in range(SEQUENCES))
        _, meta = worker.generate.options(num_returns=2).remote(RolloutRequest((prompt,), trajectory_ids, SEQUENCES))
        with suppress(ActorError):
            await rollout.result(meta, index)

    await asyncio.gather(*(one(worker, index) for index, worker in enumerate(rollout.workers)))


async def measure(model: str, engines: int, rounds: int) -> dict[str, Any]:
    """Publications to engines at rest, and to decoding ones; Ray must be there."""
    found: dict[str, Any] = {}
    publishers = Publishers.create(publication_config(engines), model)
    rollout, learner = publishers.rollout, publishers.learner
    try:
        await asyncio.gather(rollout.ready(), learner.ready())
        for state in ("at_rest", "decoding"):
            await publishers.publish()  # warm-up
            decoding = asyncio.create_task(_decode(rollout)) if state == "decoding" else None
            parts = []
            for _ in range(rounds):
                # Long enough for prompts to be taken in and some tokens to come.
                await asyncio.sleep(2.0)
                parts.append(await publishers.publish())
            if decoding is not None:
                if decoding.done():
                    raise SystemExit("the engines had ended their requests too early: make responses longer")
                await asyncio.sleep(1.0)
                await rollout.abandon()
                await decoding
            found[state] = {name: quartiles([part[name] for part in parts]) for name in parts[0]}
            if decoding is None:
                del found[state]["engine/longest_decoding_gap_s"]
            seconds = statistics.median(part["total_s"] for part in parts)
            sys.stderr.write(f"publication {state}: {seconds:.2f} s\n")
        async with asyncio.timeout(10.0):
            await asyncio.gather(rollout.stop(), learner.stop(), return_exceptions=True)
    finally:
        rollout.shutdown()
        learner.shutdown()
    return found
