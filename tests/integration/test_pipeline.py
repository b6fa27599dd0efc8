"""The real controller, store, vLLM engine, teacher and DeepSpeed learner on random-weight models."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import ray

from opd_ray.errors import WeightSyncError
from opd_ray.models.weights import WeightBucket
from opd_ray.training.controller import Controller, Groups
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import rollout_rows, scored_rows
from opd_ray.types import Prompt, RolloutRequest, WeightsMeta
from tests.integration.runs import Engines, RunRecord, small_config, train

pytestmark = pytest.mark.integration

EXPERIMENTS = ["opd", "opd_block64", "opd_newline", "lsm", "lsm_block64", "lsm_newline", "lsm_block64_shuffle"]


def assert_balanced(record: RunRecord) -> None:
    books = record.ledger
    evicted_and_failed = books["evicted"] + books["failed"]
    assert books["started"] == books["trained"] + evicted_and_failed + books["in_store"] + books["in_flight"]
    assert books["in_flight"] == 0


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_one_batch_of_each_variant(engines: Engines, experiment: str) -> None:
    record = train(small_config(experiment), engines)
    assert len(record.metrics) == 2
    assert record.of("replay/staleness/max") == [0, 1]
    assert record.of("replay/uses/max") == [1, 2]
    assert all(norm > 0 for norm in record.of("learner/grad_norm"))
    assert record.ledger["started"] == record.ledger["trained"] == 8
    assert_balanced(record)
    assert record.counts["payloads"] == 0
    if experiment in ("opd", "lsm"):
        assert not any("gate/value/mean" in step for step in record.metrics)
        return
    fresh, stale = record.metrics
    # The first use at staleness 0 has drift zero by definition, the second one has it measured.
    assert fresh["gate/value/min"] == fresh["gate/value/max"] == 1.0
    assert fresh["gate/drift_abs/max"] == 0.0
    assert stale["gate/drift_abs/staleness_1"] > 0
    assert 0 < stale["gate/value/min"] < 1
    assert stale["gate/engine_behavior_share"] == 0
    assert abs(fresh["gate/engine_mismatch/mean"]) < 1e-4


def test_the_gate_reweights_the_second_visit_only(engines: Engines) -> None:
    gated, ungated = train(small_config("lsm_block64"), engines), train(small_config("lsm"), engines)
    # Same seeds, lock-step: bit for bit the same first step, another second one.
    assert gated.of("learner/loss/mean")[0] == ungated.of("learner/loss/mean")[0]
    assert gated.of("learner/loss/mean")[1] != ungated.of("learner/loss/mean")[1]
    # What the gated step says of its ungated loss is what the ungated step trains on (summed in another order).
    assert gated.of("learner/loss/ungated_mean")[1] == pytest.approx(ungated.of("learner/loss/mean")[1], rel=1e-6)


def test_tau_zero_is_the_ungated_run_bit_for_bit(engines: Engines) -> None:
    gated = train(small_config("lsm_block64", "gate.tau=0", "num_steps=4"), engines)
    ungated = train(small_config("lsm", "num_steps=4"), engines)
    assert gated.of("learner/loss/mean") == ungated.of("learner/loss/mean")
    assert gated.of("learner/grad_norm") == ungated.of("learner/grad_norm")


def test_the_students_loss_falls(engines: Engines) -> None:
    record = train(small_config("lsm", "num_steps=12", "learner.lr=3e-3"), engines)
    losses = record.of("learner/loss/mean")
    assert np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])


def test_weights_really_change_in_the_engine(engines: Engines) -> None:
    """Log-probs that the engine reports for a greedy-like fixed request, before and after training."""
    prompt = Prompt(id="p", problem="7+3-4=")
    found: list[np.ndarray[Any, Any]] = []
    versions: list[int] = []

    async def probe(groups: Groups, controller: Controller) -> None:
        request = RolloutRequest((prompt,), (10**6,), 1)
        payload, meta = groups.rollout.workers[0].generate.options(num_returns=2).remote(request)
        meta = await meta
        scored, _ = groups.teacher.workers[0].score.options(num_returns=2).remote(payload, meta, (prompt,))
        row = scored_rows(decode(await scored))[0]
        found.append(np.concatenate([row.behavior_logprobs[:1], row.teacher_logprobs[:1]]))
        versions.append(meta.trajectories[0].oldest_version)
        assert (row.token_versions == versions[-1]).all()

    train(small_config("lsm", "num_steps=4"), engines, before=probe, after=probe)
    assert versions == [0, 4]
    assert abs(found[0][0] - found[1][0]) > 1e-3


def test_engine_and_learner_agree_after_training(engines: Engines) -> None:
    """At each first use at staleness 0 both hold the same weights: what is left is rounding.

    vLLM keeps a repacked copy of a tied head, which once stayed as it was when only the embedding was published.
    """
    record = train(small_config("lsm_block64", "num_steps=6"), engines)
    mismatch = [step["gate/engine_mismatch/rms"] for step in record.metrics if "gate/engine_mismatch/rms" in step]
    assert len(mismatch) == 3
    assert max(mismatch) < 1e-4


def test_new_weights_are_taken_over_in_the_middle_of_requests(engines: Engines) -> None:
    """No request is lost, and each token says which version made it."""
    prompt = Prompt(id="p", problem="7+3-4=")
    metas: list[Any] = []

    async def probe(groups: Groups, controller: Controller) -> None:
        worker = groups.rollout.workers[0]
        weights, buckets = await groups.learner.export(100)
        for attempt in range(10):
            trajectory_ids = tuple(10**6 + 100 * attempt + i for i in range(16))
            payload, meta = worker.generate.options(num_returns=2).remote(RolloutRequest((prompt,), trajectory_ids, 16))
            # How long a request takes depends on the machine: one of the waits falls into the decoding.
            await asyncio.sleep(0.02 * (attempt + 1))
            await worker.load_weights.remote(weights, *buckets)
            metas.append(await meta)
            assert len(metas[-1].trajectories) == 16
            for row in rollout_rows(decode(await payload)):
                assert len(row.token_versions) == len(row.response_token_ids)
                assert (np.diff(row.version_values) > 0).all()
            if any(t.oldest_version < t.newest_version for t in metas[-1].trajectories):
                return
            weights = WeightsMeta(101 + attempt, weights.checksum, weights.num_bytes)
        pytest.fail("no weights came in the middle of a request")

    train(small_config("lsm"), engines, after=probe)
    assert metas


def test_damaged_weights_are_refused(engines: Engines) -> None:
    bucket = WeightBucket((), np.zeros(0, dtype=np.uint8))
    published = WeightsMeta(7, "not its checksum", 0)

    async def load() -> None:
        await engines.rollout.result(engines.rollout.workers[0].load_weights.remote(published, ray.put(bucket)), 0)

    with pytest.raises(WeightSyncError, match="rollout-0"):
        asyncio.run(load())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_the_bound_holds_and_the_books_balance(engines: Engines, max_staleness: int) -> None:
    record = train(small_config("lsm_block64", "num_steps=8", f"replay.max_staleness={max_staleness}"), engines)
    first_uses = [
        s for s, v in zip(record.of("replay/staleness/max"), record.of("replay/uses/max"), strict=True) if v == 1
    ]
    assert max(first_uses) <= max_staleness
    assert max(record.of("replay/staleness/max")) <= max_staleness + 1
    assert (max(first_uses) > 0) == (max_staleness > 0)
    assert record.ledger["trained"] == record.ledger["started"] == 4 * 8
    assert_balanced(record)


def test_lock_step_is_reproducible(engines: Engines) -> None:
    runs = [train(small_config("lsm_block64", "num_steps=4"), engines) for _ in range(2)]
    assert runs[0].of("learner/loss/mean") == runs[1].of("learner/loss/mean")


def test_the_prompts_end_before_the_steps(engines: Engines) -> None:
    cfg = small_config("lsm", "num_steps=100", "data.num_prompts=5", "data.epochs=1")
    record = train(cfg, engines)
    # Five prompts of four samples fill two batches of eight and leave four trajectories over.
    assert len(record.metrics) == 4
    assert record.ledger["trained"] == 16
    assert record.ledger["evicted/drained"] == 4
    assert record.ledger["failed/end_of_data"] == 4
    assert_balanced(record)


def test_payload_stays_out_of_the_driver(engines: Engines) -> None:
    """A rollout's payload lies in the object store of a node, also where Ray would send so little to the caller."""
    prompt = Prompt(id="p", problem="7+3-4=")
    request = RolloutRequest((prompt,), (10**6 + 1,), 1)
    worker = engines.rollout.workers[0]
    payload, meta = worker.generate.options(num_returns=2).remote(request)
    size = ray.get(meta).num_bytes
    assert size < 100_000
    deadline = time.monotonic() + 20
    while not ray.experimental.get_object_locations([payload])[payload]["node_ids"]:
        assert time.monotonic() < deadline, "the payload is on no node: it came to the driver"
        time.sleep(0.1)
