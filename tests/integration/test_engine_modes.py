"""What becomes of running requests when new weights arrive: real vLLM engines in Ray actors, random-weight models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from opd_ray.config.choices import Dtype, OnNewWeights
from opd_ray.errors import ActorError, WeightSyncError
from opd_ray.models.weights import WeightBucket, combined_checksum, pack_buckets
from opd_ray.rollout.group import RolloutGroup
from opd_ray.rollout.worker import RolloutWorker
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import RolloutRow, rollout_rows
from opd_ray.types import LoadResult, Prompt, RolloutRequest, WeightsMeta
from tests.integration.conftest import save_random_model
from tests.integration.learners import NO_SHARE
from tests.integration.runs import small_config

pytestmark = pytest.mark.integration

PROMPTS = (Prompt(id="p", problem="7+3-4="), Prompt(id="q", problem="12*3="))
RUNNING = RolloutRequest(PROMPTS, tuple(range(16)), 8)
LATER = RolloutRequest(PROMPTS, tuple(range(16, 24)), 4)
OLD, NEW = 3, 5
# All requests run, and none is near its end.
TOKENS_BEFORE = 3 * 16
SLOW_CHECKSUM_S = 0.2


@dataclass(frozen=True)
class Published:
    """A set of weights as the learner would publish it."""

    meta: WeightsMeta
    buckets: list[Any]


@dataclass(frozen=True)
class Outcome:
    """What came of requests that ran when new weights arrived, and of requests sent while these were on their way."""

    running: list[RolloutRow]
    later: list[RolloutRow]
    load: LoadResult
    load_wall_s: float


class ObservedWorker(RolloutWorker):
    """Acts at exact moments of the engine's life, for which a call from outside would come too early or too late."""

    async def set_mode(self, mode: OnNewWeights) -> None:
        self._engine.on_new_weights = mode

    async def mode(self) -> OnNewWeights:
        return self._engine.on_new_weights

    def _num_tokens(self) -> int:
        return sum(len(stream.token_ids) for stream in self._engine._streams.values())

    async def _in_the_middle(self, others: asyncio.Future[Any]) -> None:
        while self._num_tokens() < TOKENS_BEFORE:
            if others.done():
                raise RuntimeError("all requests ended before the weights came")
            await asyncio.sleep(0)

    async def takeover(self, published: WeightsMeta, *buckets: WeightBucket) -> Any:
        """`RUNNING` is decoding when the weights come, `LATER` is sent while the engine waits to load them."""
        running = asyncio.create_task(self.generate(RUNNING))
        await self._in_the_middle(running)
        begun = time.perf_counter()
        loading = asyncio.create_task(self.load_weights(published, *buckets))
        while self._engine._intake.is_set() and not loading.done():
            await asyncio.sleep(0)
        later = asyncio.create_task(self.generate(LATER))
        load = await loading
        load_wall_s = time.perf_counter() - begun
        return (await running)[0], (await later)[0], load, load_wall_s

    async def evaluate_and_load(self, mode: OnNewWeights, published: WeightsMeta, *buckets: WeightBucket) -> Any:
        """Evaluation and rollout requests run when the weights come, and another evaluation is sent meanwhile."""
        self._engine.on_new_weights = mode
        evaluation = asyncio.create_task(self.complete(PROMPTS, 0, 8))
        running = asyncio.create_task(self.generate(RUNNING))
        await self._in_the_middle(evaluation)
        loading = asyncio.create_task(self.load_weights(published, *buckets))
        while self._engine._intake.is_set() and not loading.done():
            await asyncio.sleep(0)
        later = asyncio.create_task(self.complete(PROMPTS, 0, 4))
        load = await loading
        return await evaluation, (await running)[0], await later, load

    async def load_twice(self, first: WeightsMeta, second: WeightsMeta, *buckets: WeightBucket) -> Any:
        """Two loads at once while requests run; the first one's checksum takes long. Tokens before and after it."""
        from opd_ray.models import weights

        fast = weights.combined_checksum
        tokens: list[int] = []

        def slow(buckets: Iterable[WeightBucket]) -> str:
            if not tokens:
                tokens.append(self._num_tokens())
                time.sleep(SLOW_CHECKSUM_S)
                tokens.append(self._num_tokens())
            return fast(buckets)

        weights.combined_checksum = slow
        try:
            running = asyncio.create_task(self.generate(RUNNING))
            await self._in_the_middle(running)
            loads = await asyncio.gather(self.load_weights(first, *buckets), self.load_weights(second, *buckets))
            await running
        finally:
            weights.combined_checksum = fast
        return loads, self._engine.policy_version, tokens

    async def break_in(self, published: WeightsMeta, *buckets: WeightBucket, decoding: bool) -> list[Any]:
        """Decoding or loading raises while all kinds of callers wait; the outcome of each, then of one after it.

        The engine is mended afterwards.
        """
        engine = self._engine
        vllm = engine._engine
        running = asyncio.create_task(self.generate(RUNNING))
        await self._in_the_middle(running)
        loading = asyncio.create_task(self.load_weights(published, *buckets))
        name = "step" if decoding else "collective_rpc"
        if decoding:
            while engine._intake.is_set():
                await asyncio.sleep(0)
        later = asyncio.create_task(self.generate(LATER))
        # Reaches its first wait.
        await asyncio.sleep(0)
        setattr(vllm, name, _broken)
        try:
            calls = (running, loading, later)
            outcomes: list[Any] = [*await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)]
            outcomes += await asyncio.gather(self.generate(LATER), return_exceptions=True)
        finally:
            delattr(vllm, name)
            engine._failure = None
            vllm.abort_request(list(vllm.output_processor.external_req_ids))
        return outcomes


def _broken(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("out of memory")


class Bench:
    """Two actors: `engine` is published to, `fresh` was started from the new weights. And both sets of weights."""

    def __init__(self, student_folder: Path, new_folder: Path) -> None:
        # Some rollouts outlast all evaluation answers.
        lengths = ("rollout.max_response_tokens=200", "evaluation.max_response_tokens=100")
        finish = small_config("lsm", "rollout.on_new_weights=finish", *lengths)
        partial = small_config("lsm", *lengths)
        specs = [
            (partial, "rollout-0", str(student_folder), Dtype.float32),
            (finish, "rollout-1", str(new_folder), Dtype.float32),
        ]
        self.group = RolloutGroup("rollout", 120)
        self.group.start(ObservedWorker, NO_SHARE, specs, {"VLLM_CPU_KVCACHE_SPACE": "1"})
        asyncio.run(self.group.ready())
        self.engine, self.fresh = self.group.workers
        self.old, self.new = publish(student_folder, OLD), publish(new_folder, NEW)

    def call(self, ref: Any) -> Any:
        return asyncio.run(self.group.result(ref, 0))

    def load(self, published: Published) -> LoadResult:
        meta: LoadResult = self.call(self.engine.load_weights.remote(published.meta, *published.buckets))
        return meta

    def rows(self, worker: Any, request: RolloutRequest) -> list[RolloutRow]:
        """What `worker` samples when nothing disturbs it."""
        return rows_of(ray.get(worker.generate.options(num_returns=2).remote(request)[0], timeout=120))

    def takeover(self, mode: OnNewWeights) -> Outcome:
        self.call(self.engine.set_mode.remote(mode))
        running, later, load, wall_s = self.call(self.engine.takeover.remote(self.new.meta, *self.new.buckets))
        return Outcome(rows_of(running), rows_of(later), load, wall_s)


def publish(folder: Path, version: int) -> Published:
    """The weights of a model folder, in several buckets."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tensors = [
        ((name, "lm_head.weight") if name == "model.embed_tokens.weight" else (name,), parameter)
        for name, parameter in model.named_parameters()
    ]
    buckets = list(pack_buckets(tensors, model.dtype, bucket_bytes=100_000))
    assert len(buckets) > 1
    num_bytes = sum(bucket.data.nbytes for bucket in buckets)
    meta = WeightsMeta(version, combined_checksum(buckets), num_bytes)
    return Published(meta, [ray.put(bucket) for bucket in buckets])


def rows_of(payload: Any) -> list[RolloutRow]:
    return rollout_rows(decode(payload))


def versions(row: RolloutRow) -> list[int]:
    return [int(version) for version in row.version_values]


def assert_same(rows: list[RolloutRow], expected: list[RolloutRow]) -> None:
    """The same token ids to the last bit; log-probs up to the rounding that the size of a batch decides on."""
    for row, other in zip(rows, expected, strict=True):
        assert row.trajectory_id == other.trajectory_id
        np.testing.assert_array_equal(row.response_token_ids, other.response_token_ids)
        np.testing.assert_allclose(row.behavior_logprobs, other.behavior_logprobs, atol=1e-4)
        assert row.finish_reason == other.finish_reason


@pytest.fixture(scope="module")
def shared_bench(ray_cluster: None, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(student_folder, save_random_model(tmp_path_factory.mktemp("models") / "new", seed=3))
    yield bench
    asyncio.run(bench.group.stop())
    bench.group.shutdown()


@pytest.fixture
def bench(shared_bench: Bench) -> Bench:
    """The old weights are in; that takes a version below the last one."""
    shared_bench.load(shared_bench.old)
    return shared_bench


@pytest.fixture
def old_rows(bench: Bench) -> list[RolloutRow]:
    return bench.rows(bench.engine, RUNNING)


def assert_loaded(outcome: Outcome, bench: Bench) -> None:
    """No request is lost, and the metadata says what was loaded."""
    assert [row.trajectory_id for row in outcome.running] == list(RUNNING.trajectory_ids)
    assert [row.trajectory_id for row in outcome.later] == list(LATER.trajectory_ids)
    for row in outcome.running + outcome.later:
        assert len(row.response_token_ids) == len(row.behavior_logprobs) == len(row.token_versions) > 0
        assert row.finish_reason in ("stop", "length")
    expected = bench.new.meta
    load = outcome.load
    assert (load.worker, load.policy_version, load.checksum) == ("rollout-0", NEW, expected.checksum)
    assert load.num_bytes == expected.num_bytes
    assert 0 < load.standstill_s < outcome.load_wall_s


def test_the_mode_comes_from_the_config(bench: Bench) -> None:
    assert ray.get(bench.fresh.mode.remote()) is OnNewWeights.finish


def test_partial_goes_on_with_the_new_weights(bench: Bench, old_rows: list[RolloutRow]) -> None:
    outcome = bench.takeover(OnNewWeights.partial)
    assert_loaded(outcome, bench)
    assert outcome.load.num_aborted_tokens == 0
    mixed = [row for row in outcome.running if versions(row) == [OLD, NEW]]
    assert mixed
    assert all(versions(row) == [OLD] for row in outcome.running if row not in mixed)
    assert all(versions(row) == [NEW] for row in outcome.later)
    for row, undisturbed in zip(outcome.running, old_rows, strict=True):
        # The tokens that claim the old version are those that the old weights sample.
        num_old = int((row.token_versions == OLD).sum())
        assert num_old > 0
        np.testing.assert_array_equal(row.response_token_ids[:num_old], undisturbed.response_token_ids[:num_old])
    assert any(
        list(row.response_token_ids) != list(undisturbed.response_token_ids)
        for row, undisturbed in zip(outcome.running, old_rows, strict=True)
    )


def test_finish_ends_running_requests_with_the_old_weights(bench: Bench, old_rows: list[RolloutRow]) -> None:
    outcome = bench.takeover(OnNewWeights.finish)
    assert_loaded(outcome, bench)
    assert outcome.load.num_aborted_tokens == 0
    assert all(versions(row) == [OLD] for row in outcome.running)
    assert_same(outcome.running, old_rows)
    # Sent while the others ended: had to wait.
    assert all(versions(row) == [NEW] for row in outcome.later)
    assert_same(outcome.later, bench.rows(bench.fresh, LATER))


def test_abort_samples_running_requests_again_with_the_new_weights(bench: Bench) -> None:
    outcome = bench.takeover(OnNewWeights.abort)
    assert_loaded(outcome, bench)
    assert outcome.load.num_aborted_tokens >= TOKENS_BEFORE
    assert all(versions(row) == [NEW] for row in outcome.running + outcome.later)
    # As if the old weights had never been: the same seeds, from the first token on.
    assert_same(outcome.running, bench.rows(bench.fresh, RUNNING))


@pytest.mark.parametrize("mode", [OnNewWeights.partial, OnNewWeights.abort])
def test_evaluation_is_neither_mixed_nor_aborted(bench: Bench, mode: OnNewWeights) -> None:
    undisturbed = bench.call(bench.engine.complete.remote(PROMPTS, 0, 8))
    with_new = bench.call(bench.fresh.complete.remote(PROMPTS, 0, 4))
    evaluation, running, later, load = bench.call(
        bench.engine.evaluate_and_load.remote(mode, bench.new.meta, *bench.new.buckets)
    )
    assert evaluation == undisturbed
    assert later == with_new
    rows = rows_of(running)
    assert [row.trajectory_id for row in rows] == list(RUNNING.trajectory_ids)
    # Some rollouts ended before the evaluation did, and the others had the usual fate.
    assert {tuple(versions(row)) for row in rows} == {(OLD,), (OLD, NEW) if mode is OnNewWeights.partial else (NEW,)}
    assert (load.num_aborted_tokens > 0) == (mode is OnNewWeights.abort)


@pytest.mark.parametrize("mode", list(OnNewWeights))
def test_damaged_weights_are_refused_and_the_engine_serves_on(
    bench: Bench, old_rows: list[RolloutRow], mode: OnNewWeights
) -> None:
    bench.call(bench.engine.set_mode.remote(mode))
    damaged = Published(replace(bench.new.meta, checksum="not its checksum"), bench.new.buckets)
    payload, _ = bench.engine.generate.options(num_returns=2).remote(RUNNING)
    with pytest.raises(WeightSyncError, match=r"rollout-0 received weights with checksum \w+"):
        bench.load(damaged)
    rows = rows_of(ray.get(payload, timeout=120))
    assert all(versions(row) == [OLD] for row in rows)
    assert_same(rows, old_rows)
    assert all(versions(row) == [OLD] for row in bench.rows(bench.engine, LATER))
    assert bench.load(bench.new).policy_version == NEW


def test_overlapping_loads_keep_their_order_and_decoding_goes_on_during_the_checksum(bench: Bench) -> None:
    bench.call(bench.engine.set_mode.remote(OnNewWeights.partial))
    second = replace(bench.new.meta, policy_version=NEW + 1)
    loads, version, tokens = bench.call(bench.engine.load_twice.remote(bench.new.meta, second, *bench.new.buckets))
    assert [load.policy_version for load in loads] == [NEW, NEW + 1]
    assert version == NEW + 1
    before, after = tokens
    assert after > before


def test_an_error_in_decoding_reaches_all_who_wait(bench: Bench) -> None:
    bench.call(bench.engine.set_mode.remote(OnNewWeights.finish))
    running, loading, later, after = bench.call(
        bench.engine.break_in.remote(bench.new.meta, *bench.new.buckets, decoding=True)
    )
    for outcome in (running, loading, later, after):
        assert isinstance(outcome, RuntimeError)
        assert str(outcome) == "out of memory"


@pytest.mark.parametrize("mode", [OnNewWeights.partial, OnNewWeights.abort])
def test_an_engine_with_half_of_the_weights_serves_no_more(bench: Bench, mode: OnNewWeights) -> None:
    bench.call(bench.engine.set_mode.remote(mode))
    outcomes = bench.call(bench.engine.break_in.remote(bench.new.meta, *bench.new.buckets, decoding=False))
    for outcome in outcomes:
        assert isinstance(outcome, WeightSyncError)
        assert f"only a part of version {NEW} (RuntimeError: out of memory)" in str(outcome)


def test_a_request_that_runs_already_is_refused(bench: Bench) -> None:
    first, _ = bench.engine.generate.options(num_returns=2).remote(RUNNING)
    _, second = bench.engine.generate.options(num_returns=2).remote(RUNNING)
    with pytest.raises(ActorError, match="run already"):
        bench.call(second)
    assert len(rows_of(ray.get(first, timeout=120))) == 16
