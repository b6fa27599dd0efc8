"""The store benchmark moves the same values whatever carries them, and sees it when they change."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bench_store import checks
from benchmarks.store_contenders import StoreConsumer, StoreProducer, default_bytes
from benchmarks.store_queues import as_arrays, as_lists
from benchmarks.store_workload import Workload, is_same, make_rows, read
from opd_ray.config.choices import LogprobDtype
from opd_ray.replay.batch import SampledBatch

WORK = Workload(trajectories=3, prompt_tokens=2, response_tokens=5, top_k=4)
EXPECTED = read(make_rows(WORK))


@pytest.mark.parametrize("sampled", LogprobDtype)
def test_what_goes_through_the_codec_is_what_the_producer_has(sampled: LogprobDtype) -> None:
    payload, meta = StoreProducer(WORK, LogprobDtype.float16, sampled).produce((4, 5, 6), version=9)
    rows = tuple((0, row) for row in range(WORK.trajectories))
    assert is_same(StoreConsumer().read_payloads(SampledBatch((), rows, ()), [payload]), EXPECTED, in_order=True)
    assert [item.trajectory_id for item in meta.trajectories] == [4, 5, 6]
    assert meta.num_bytes == payload.size


def test_the_defaults_take_four_bytes_a_token_more() -> None:
    work = Workload(response_tokens=256)
    producer = StoreProducer(work, LogprobDtype.float16, LogprobDtype.float16)
    halved = producer.produce(tuple(range(work.trajectories)), 0)[1].num_bytes
    assert default_bytes(work) - halved == pytest.approx(4 * work.tokens, abs=64)


def test_what_goes_through_lists_is_what_the_producer_has() -> None:
    assert read(as_arrays(as_lists(row)) for row in make_rows(WORK)) == EXPECTED


@pytest.mark.parametrize(("name", "change"), [("teacher_topk_ids", 1), ("teacher_logprobs", -1.0)])
def test_a_value_that_changed_on_the_way_is_seen(name: str, change: float) -> None:
    rows = make_rows(WORK)
    rows[1][name] = rows[1][name] + np.asarray(change, dtype=rows[1][name].dtype)
    assert not is_same(read(rows), EXPECTED, in_order=True)


def test_order_counts_only_where_it_is_promised() -> None:
    turned = EXPECTED[1:] + EXPECTED[:1]
    assert is_same(turned, EXPECTED, in_order=False)
    assert not is_same(turned, EXPECTED, in_order=True)


def test_a_trajectory_that_is_missing_is_seen() -> None:
    assert not is_same(EXPECTED[1:], EXPECTED, in_order=False)


def test_the_check_against_a_contender_that_is_not_there_fails_and_says_why() -> None:
    made = {item["name"]: item for item in checks({}, {"torchrl": "not installed"})}
    assert made["streamed/ratio_to_torchrl"]["ok"] is False
    assert made["streamed/ratio_to_torchrl"]["reason"] == "not installed"


def test_other_projects_are_checked_and_plain_references_are_a_figure() -> None:
    figures = {"streamed": 2.0, "alone": 2.0, "bytes": 0.7}
    made = checks({"transferqueue": figures, "torchrl": figures, "numpy_by_reference": figures}, {})
    assert {item["name"]: item["ok"] for item in made} == {
        "streamed/ratio_to_transferqueue": False,
        "bytes/ratio_to_transferqueue": True,
        "streamed/ratio_to_torchrl": False,
        "bytes/ratio_to_torchrl": True,
    }
