"""Records that hold one record a trajectory travel between processes as plain values, and arrive as they were."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from ray import cloudpickle

from opd_ray.learner.spec import RankBatch
from opd_ray.types import BatchMeta, SampleInfo, TrajectoryMeta

metas = st.builds(TrajectoryMeta)
infos = st.lists(st.builds(SampleInfo, age_s=st.floats(0, 1e6)), max_size=4)
records = st.one_of(
    st.builds(BatchMeta, trajectories=st.lists(metas, max_size=4).map(tuple), busy_s=st.floats(0, 1e6)),
    infos.map(lambda some: RankBatch(((0,), ()), {0: (0, 1)}, dict(enumerate(some)), True, (3,), 2, (0,))),
)


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@given(record=records)
def test_a_record_arrives_as_it_was(dumps: Callable[[Any], bytes], record: Any) -> None:
    copy = pickle.loads(dumps(record))
    assert type(copy) is type(record)
    assert [getattr(copy, field.name) for field in fields(copy)] == [getattr(record, f.name) for f in fields(record)]


@given(record=records)
def test_no_record_within_is_pickled_by_itself(record: Any) -> None:
    stream = pickle.dumps(record)
    assert b"TrajectoryMeta" not in stream and b"SampleInfo" not in stream
