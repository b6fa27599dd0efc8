"""Lengths kept against lengths dropped."""

from __future__ import annotations

import asyncio
import json

import pytest

from opd_ray.config.choices import StalePolicy
from opd_ray.replay.lengths import EDGES, LengthReport
from opd_ray.replay.staleness import StoreConfig
from opd_ray.telemetry.metrics import checked_metrics
from opd_ray.types import Histogram
from tests.unit.replay.store_driver import at_once, make_store, meta


def counts(metrics: dict[str, float | Histogram], name: str) -> dict[float, float]:
    """Filled bins by their lower edge."""
    histogram = metrics[f"{name}/histogram"]
    assert isinstance(histogram, Histogram)
    return {edge: count for edge, count in zip(histogram.edges, histogram.counts, strict=False) if count}


@pytest.mark.parametrize(
    ("length", "lower_edge"),
    [(1, 1), (2, 2), (3, 2), (4, 4), (1023, 512), (1024, 1024), (2**20 - 1, 2**19), (2**20, 2**19), (2**30, 2**19)],
)
def test_a_length_is_in_the_bin_that_starts_at_its_power_of_two(length: int, lower_edge: int) -> None:
    report = LengthReport()
    report.keep(length)
    metrics = report.as_metrics()
    assert counts(metrics, "kept_tokens") == {lower_edge: 1}
    assert counts(metrics, "dropped_tokens") == {}
    assert metrics["kept_tokens/mean"] == length and "dropped_tokens/mean" not in metrics


def test_a_report_is_a_metric_and_comes_back_as_it_was() -> None:
    report = LengthReport()
    for length in (5, 9, 300):
        report.keep(length)
    report.drop(1000)
    metrics = report.as_metrics()
    assert LengthReport.of(json.loads(json.dumps(report.as_dict()))).as_metrics() == metrics
    assert checked_metrics({f"replay/{name}": value for name, value in metrics.items()})
    assert metrics["dropped_tokens/mean"] == 1000
    assert len(EDGES) == len(LengthReport().as_dict()["kept"]) + 1


def test_the_store_counts_what_trained_and_what_was_dropped() -> None:
    async def scenario() -> None:
        store = make_store(StoreConfig(2, reuse=2, max_staleness=1, stale=StalePolicy.drop))
        await at_once(store.acquire(2))
        store.append(meta([0, 1]), "a")  # 10 and 11 tokens
        for version in (0, 1):
            assert counts(store.lengths(), "kept_tokens") == {}
            batch = await at_once(store.sample(2, version))
            assert batch is not None
            store.release(batch.trajectory_ids, version + 1)
        assert counts(store.lengths(), "kept_tokens") == {8: 2}
        await at_once(store.acquire(2))
        store.append(meta([2, 3], {2: 2, 3: 0}), "b")  # trajectory 3 is too old at version 2
        sampling = asyncio.ensure_future(store.sample(2, 2))
        (trajectory_id,) = await store.acquire(1)
        store.append(meta([trajectory_id], 2), "c")
        await sampling
        store.evict([2], "test")  # out of the learner's hands, and not counted as kept
        assert counts(store.lengths(), "dropped_tokens") == {8: 2}
        assert store.lengths()["dropped_tokens/mean"] == 12.5

    asyncio.run(scenario())
