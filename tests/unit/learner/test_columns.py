"""Which columns a learner reads, and what becomes of those that it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opd_ray.config.choices import GateKind, TauMode
from opd_ray.config.schema import GateConfig, ObjectiveConfig
from opd_ray.errors import SchemaError
from opd_ray.learner.columns import learner_columns
from opd_ray.learner.microbatch import make_microbatch
from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow, TrainingRow, training_rows
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.types import SampleInfo

ALWAYS = {"prompt_token_ids", "response_token_ids", "behavior_logprobs", "teacher_logprobs"}
IDS, TOPK = {"teacher_topk_ids"}, {"teacher_topk_logprobs"}
VERSIONS = {"version_starts", "version_values"}


@pytest.mark.parametrize(
    ("kind", "gate", "probes", "expected"),
    [
        ("opd", GateConfig(), False, ALWAYS),
        ("opd", GateConfig(), True, ALWAYS | IDS),
        ("lsm", GateConfig(), False, ALWAYS | IDS | TOPK),
        ("tail_kl", GateConfig(kind=GateKind.block), True, ALWAYS | IDS | TOPK),
        ("opd", GateConfig(kind=GateKind.block, tau_mode=TauMode.staleness), False, ALWAYS | VERSIONS),
        ("opd", GateConfig(kind=GateKind.off, tau_mode=TauMode.staleness), False, ALWAYS),
        ("opd", GateConfig(kind=GateKind.block, tau_mode=TauMode.quantile), False, ALWAYS),
    ],
)
def test_a_learner_reads_what_its_objective_gate_and_report_need(
    kind: str, gate: GateConfig, probes: bool, expected: set[str]
) -> None:
    columns = learner_columns(ObjectiveConfig(kind=kind), gate, probes=probes)
    assert set(columns) == expected
    assert len(columns) == len(expected)


LENGTHS = (3, 2)
NAN = float("nan")


def rows_of(columns: tuple[str, ...] | None) -> list[TrainingRow]:
    """Two trajectories whose versions change in the middle; each log-prob column has a NaN of its own."""
    made = [
        RolloutRow(
            trajectory_id=trajectory_id,
            prompt_id="p",
            prompt_token_ids=np.arange(4, dtype=np.int32),
            response_token_ids=np.arange(length, dtype=np.int32) + 5,
            behavior_logprobs=np.array(
                [NAN, -1, -1][:length] if trajectory_id == 0 else [-1.0] * length, dtype=np.float32
            ),
            version_starts=np.array([0, 1], dtype=np.int32),
            version_values=np.array([3, 4], dtype=np.int64),
            finish_reason="stop",
            temperature=1.0,
            top_p=1.0,
        )
        for trajectory_id, length in enumerate(LENGTHS)
    ]
    batch = decode(encode_rollouts(made, BatchSpec("f")))
    sampled = [np.array([-1, NAN, -1], dtype=np.float32), np.full(2, -1, dtype=np.float32)]
    ids = [np.arange(2 * length, dtype=np.int32).reshape(length, 2) for length in LENGTHS]
    topk = [np.full((length, 2), -1, dtype=np.float16) for length in LENGTHS]
    topk[1][1, 0] = NAN
    return training_rows(decode(add_teacher_columns(batch, sampled, ids, topk, BatchSpec("f", 2)), columns=columns))


INFOS = [SampleInfo(trajectory_id, 2, 1, 0.0, 4, length) for trajectory_id, length in enumerate(LENGTHS)]
BASE = ("prompt_token_ids", "response_token_ids", "behavior_logprobs", "teacher_logprobs")


def test_a_microbatch_of_all_columns() -> None:
    batch = make_microbatch(rows_of(None), INFOS, (0, 1), pad_id=0, device=torch.device("cpu"))
    assert batch.support_ids.shape == batch.teacher_topk_logprobs.shape == (5, 2)
    assert batch.support_ids.dtype == torch.int64 and batch.teacher_topk_logprobs.dtype == torch.float32
    assert batch.token_staleness is not None
    assert batch.token_staleness.tolist() == [2, 1, 1, 2, 1]
    assert batch.valid.tolist() == [False, False, True, True, False]
    assert batch.removed == {"not_finite": 3}


def test_a_column_that_is_not_read_makes_no_token_invalid() -> None:
    batch = make_microbatch(rows_of(BASE), INFOS, (0, 1), pad_id=0, device=torch.device("cpu"))
    assert batch.support_ids.shape == batch.teacher_topk_logprobs.shape == (5, 0)
    assert batch.token_staleness is None
    assert batch.valid.tolist() == [False, False, True, True, True]
    assert batch.removed == {"not_finite": 2}


def test_what_every_learner_reads_cannot_be_left_out() -> None:
    with pytest.raises(SchemaError, match="'teacher_logprobs' is not among the decoded"):
        rows_of(tuple(name for name in BASE if name != "teacher_logprobs"))


def test_rows_are_views() -> None:
    row = rows_of(BASE)[0]
    assert not row.behavior_logprobs.flags.owndata
