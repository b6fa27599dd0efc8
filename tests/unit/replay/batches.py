"""Trajectories to encode in tests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.trajectory.versions import version_segments

Arrays = list[np.ndarray]

FINGERPRINT = "tok-1"
ROLLOUT = BatchSpec(FINGERPRINT)


def trajectory(trajectory_id: int, num_tokens: int, rng: np.random.Generator) -> RolloutRow:
    starts, values = version_segments(np.sort(rng.integers(0, 3, num_tokens)))
    return RolloutRow(
        trajectory_id=trajectory_id,
        prompt_id=f"prompt-{trajectory_id}",
        prompt_token_ids=rng.integers(0, 100, 5, dtype=np.int32),
        response_token_ids=rng.integers(0, 100, num_tokens, dtype=np.int32),
        behavior_logprobs=-rng.random(num_tokens, dtype=np.float32),
        version_starts=starts,
        version_values=values,
        finish_reason="stop",
        temperature=1.0,
        top_p=0.75,
    )


def trajectories(lengths: list[int], seed: int = 0) -> list[RolloutRow]:
    rng = np.random.default_rng(seed)
    return [trajectory(trajectory_id, length, rng) for trajectory_id, length in enumerate(lengths)]


def teacher_arrays(lengths: list[int], top_k: int, seed: int = 1) -> tuple[Arrays, Arrays, Arrays]:
    rng = np.random.default_rng(seed)
    return (
        [-rng.random(length, dtype=np.float32) for length in lengths],
        [rng.integers(0, 100, (length, top_k), dtype=np.int64) for length in lengths],
        [-10 * rng.random((length, top_k), dtype=np.float32) for length in lengths],
    )


def with_student_ids(rows: list[RolloutRow], top_k: int, seed: int = 2) -> list[RolloutRow]:
    rng = np.random.default_rng(seed)
    shapes = [(len(row.response_token_ids), top_k) for row in rows]
    return [
        dataclasses.replace(row, student_topk_ids=rng.integers(0, 100, shape, dtype=np.int32))
        for row, shape in zip(rows, shapes, strict=True)
    ]


def scored_buffer(lengths: list[int], spec: BatchSpec) -> pa.Buffer:
    rows = trajectories(lengths)
    logprobs, ids, topk_logprobs = teacher_arrays(lengths, spec.top_k)
    if spec.rollout.student_top_k:
        batch = decode(encode_rollouts(with_student_ids(rows, spec.top_k), spec.rollout))
        return add_teacher_columns(batch, logprobs, None, topk_logprobs, spec)
    return add_teacher_columns(decode(encode_rollouts(rows, spec.rollout)), logprobs, ids, topk_logprobs, spec)
