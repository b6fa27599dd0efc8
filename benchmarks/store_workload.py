"""What `bench_store` moves: trajectories as an engine and a teacher leave them, and what reading them means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
# Sum of all ids and segment starts, and sum of all log-probs, of each trajectory; versions change from batch to batch.
Sums = list[tuple[int, float]]

ARRAYS = (
    "prompt_token_ids",
    "response_token_ids",
    "behavior_logprobs",
    "version_starts",
    "version_values",
    "teacher_logprobs",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
)
# Log-probs of 16 bits are off by at most 2**-11 of their value.
LOGPROB_TOLERANCE = 2.0**-11


@dataclass(frozen=True, slots=True)
class Workload:
    """One batch: so many trajectories of equal length, with the support's K log-probs for each response token."""

    trajectories: int = 32
    prompt_tokens: int = 128
    response_tokens: int = 1024
    top_k: int = 32
    vocab_size: int = 150_000
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Response tokens of a batch."""
        return self.trajectories * self.response_tokens


def make_rows(work: Workload) -> list[Row]:
    """The batch's trajectories, the same for every contender: ids int32, log-probs float32."""
    rng = np.random.default_rng(work.seed)
    return [_row(work, index, rng) for index in range(work.trajectories)]


def _row(work: Workload, index: int, rng: np.random.Generator) -> Row:
    def ids(*shape: int) -> npt.NDArray[np.int32]:
        return rng.integers(0, work.vocab_size, shape, dtype=np.int32)

    def logprobs(*shape: int) -> npt.NDArray[np.float32]:
        return -10 * rng.random(shape, dtype=np.float32)

    length, top_k = work.response_tokens, work.top_k
    return {
        "trajectory_id": index,
        "prompt_id": f"prompt-{index}",
        "prompt_token_ids": ids(work.prompt_tokens),
        "response_token_ids": ids(length),
        "behavior_logprobs": logprobs(length),
        # Weights came in the middle of the response.
        "version_starts": np.array([0, length // 2], dtype=np.int32),
        "version_values": np.array([6, 7], dtype=np.int64),
        "finish_reason": "stop",
        "temperature": 1.0,
        "top_p": 1.0,
        "teacher_logprobs": logprobs(length),
        "teacher_topk_ids": ids(length, top_k),
        "teacher_topk_logprobs": logprobs(length, top_k),
    }


def read(rows: Iterable[Mapping[str, Any]]) -> Sums:
    """Look at every value once: numpy arrays by column name, ids as int64 and log-probs as a float32 tensor."""
    import torch

    sums = []
    for row in rows:
        sum_of_ids, logprobs = 0, 0.0
        for name in ARRAYS:
            if name.endswith("logprobs"):
                logprobs += float(torch.from_numpy(row[name]).float().sum())
            else:
                total = int(row[name].sum(dtype=np.int64))
                sum_of_ids += total if name != "version_values" else 0
        sums.append((sum_of_ids, logprobs))
    return sums


def is_same(found: Sums, expected: Sums, *, in_order: bool) -> bool:
    """Whether what was read is the batch; without `in_order` each trajectory must be one of the batch."""
    if len(found) != len(expected):
        return False
    by_ids = dict(expected)
    if in_order and [ids for ids, _ in found] != [ids for ids, _ in expected]:
        return False
    return all(
        ids in by_ids and abs(logprobs - by_ids[ids]) <= LOGPROB_TOLERANCE * abs(by_ids[ids]) for ids, logprobs in found
    )
