"""Bytes of trajectories against what the codec writes, the store's most, and what moves in a step."""

from __future__ import annotations

import numpy as np
import pytest

from opd_ray.config.choices import LogprobDtype, Support
from opd_ray.config.schema import RunConfig
from opd_ray.planning.payload import batch_spec, row_bytes, store_need, traffic
from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow

PROMPT, RESPONSE = 70, 600


def rollout_row(trajectory_id: int, top_k: int) -> RolloutRow:
    return RolloutRow(
        trajectory_id=trajectory_id,
        prompt_id=f"problem-{trajectory_id}",
        prompt_token_ids=np.ones(PROMPT, np.int32),
        response_token_ids=np.ones(RESPONSE, np.int32),
        behavior_logprobs=np.zeros(RESPONSE, np.float32),
        version_starts=np.array([0, 5], np.int32),
        version_values=np.array([0, 1], np.int64),
        finish_reason="stop",
        temperature=1.0,
        top_p=1.0,
        student_topk_ids=np.ones((RESPONSE, top_k), np.int32) if top_k else None,
    )


@pytest.mark.parametrize("support", list(Support))
@pytest.mark.parametrize("top_k", [2, 32])
@pytest.mark.parametrize("dtype", list(LogprobDtype))
def test_bytes_are_those_that_the_codec_writes(support: Support, top_k: int, dtype: LogprobDtype) -> None:
    cfg = RunConfig()
    cfg.teacher.top_k, cfg.teacher.support = top_k, support
    cfg.replay.logprob_dtype = cfg.replay.sampled_logprob_dtype = dtype
    spec = batch_spec(cfg)
    given = top_k if support is Support.student_topk else 0
    count = 24
    rollout = encode_rollouts([rollout_row(trajectory_id, given) for trajectory_id in range(count)], spec.rollout)
    tokens = [np.zeros(RESPONSE, np.float32)] * count
    ids = None if given else [np.ones((RESPONSE, top_k), np.int32)] * count
    scored = add_teacher_columns(decode(rollout), tokens, ids, [np.zeros((RESPONSE, top_k), np.float32)] * count, spec)
    assert row_bytes(spec.rollout, PROMPT, RESPONSE) * count == pytest.approx(rollout.size, rel=0.02)
    assert row_bytes(spec, PROMPT, RESPONSE) * count == pytest.approx(scored.size, rel=0.02)


def test_a_response_token_takes_204_bytes_at_k_32() -> None:
    cfg = RunConfig()
    # Id, two float32 log-probs, 32 ids of 4 and 32 log-probs of 2 bytes.
    spec = batch_spec(cfg)
    assert row_bytes(spec, 0, 1001) - row_bytes(spec, 0, 1) == 1000 * (4 + 4 + 4 + 32 * 6)


@pytest.mark.parametrize(("staleness", "reuse", "batches"), [(0, 1, 2), (0, 2, 2), (2, 1, 4), (3, 2, 3)])
def test_the_store_holds_what_admission_lets_in(staleness: int, reuse: int, batches: int) -> None:
    cfg = RunConfig()
    cfg.replay.max_staleness, cfg.replay.reuse = staleness, reuse
    need = store_need(cfg, 10.0)
    assert need.num_trajectories == batches * cfg.trajectories_per_step
    assert need.payloads.expected == need.num_trajectories * need.bytes_per_trajectory
    assert (need.weights.least, need.weights.expected) == (10.0, 20.0)


def test_budgets_bound_what_lies_in_memory() -> None:
    cfg = RunConfig()
    whole = store_need(cfg, 0.0)
    cfg.replay.spill_bytes = 1000
    assert store_need(cfg, 0.0).payloads.expected == 1000
    cfg.replay.spill_bytes, cfg.replay.max_bytes = 0, 1
    assert store_need(cfg, 0.0).payloads.expected == pytest.approx(whole.payloads.expected / 2 + 1)


def test_what_moves_in_a_step() -> None:
    cfg = RunConfig()
    cfg.replay.reuse, cfg.learner.num_ranks = 2, 4
    stages = {stage.name: stage for stage in traffic(cfg, 100.0, 80.0, 3)}
    # Sampled and scored once, read at both uses.
    assert stages["store -> learner"].full == 2 * stages["teacher -> store"].full
    assert stages["rollout -> teacher"].full < stages["teacher -> store"].full
    assert stages["teacher -> store"].half == pytest.approx(stages["teacher -> store"].full / 2, rel=0.01)
    assert stages["learner -> engines"].full == 300
    # A ring moves 2 x 3 / 4 of the gradients a rank, four ranks.
    assert stages["learner <-> learner"].full == 480
    cfg.learner.zero_stage = 3
    assert {stage.name: stage for stage in traffic(cfg, 100.0, 80.0, 3)}["learner <-> learner"].full == 720
