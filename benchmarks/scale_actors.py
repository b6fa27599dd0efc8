"""The actors of `bench_scale`: they sleep, and answer with metadata of long trajectories. Light: no numpy, no torch.

Everything else of a run is real: the groups with their deadlines and named Ray actors, the store, the controller.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from opd_ray.types import BatchMeta, LoadResult, Prompt, RolloutRequest, TrajectoryMeta, WeightsMeta

if TYPE_CHECKING:
    from opd_ray.learner.step_report import RankReport

# Ids and float16 log-probs of 32 support ids, and 12 bytes for the sampled token; a rollout has 8 of the latter.
SCORED_BYTES_PER_TOKEN = 205
ROLLOUT_BYTES_PER_TOKEN = 8
CHECKSUM = "00"
GOLDEN_RATIO = 0.6180339887


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a trajectory; `payload_bytes` is what really lies in the object store for a request (0: all of its bytes)."""

    response_tokens: int
    payload_bytes: int
    prompt_tokens: int = 200

    def payload(self, num_trajectories: int, bytes_per_token: int) -> Payload:
        """What an actor gives back for some trajectories."""
        return Payload(bytearray(self.payload_bytes or num_trajectories * self.response_tokens * bytes_per_token))


class Payload:
    """Bytes that Ray keeps and hands over, as a memoryview, without a copy, as it does with an Arrow buffer."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return memoryview, (pickle.PickleBuffer(self.data),)


class FakeEngine:
    """An asynchronous actor, as the real one is; stamps the version that it was given last."""

    def __init__(self, name: str, delay_s: float) -> None:
        self._name = name
        self._delay_s = delay_s
        self._version = 0
        self._sizes = Sizes(1, 0)

    async def ping(self) -> str:
        """The worker's name."""
        return self._name

    async def use(self, sizes: Sizes) -> None:
        """What trajectories look like from now on."""
        self._sizes = sizes

    async def generate(self, request: RolloutRequest) -> tuple[Payload, BatchMeta]:
        """After half of the delay to one and a half of it, all trajectories of the request at once."""
        started = time.monotonic()
        oldest, sizes = self._version, self._sizes
        # As even as random delays, and the same in every run.
        await asyncio.sleep(self._delay_s * (0.5 + request.trajectory_ids[0] * GOLDEN_RATIO % 1))
        rows = tuple(
            TrajectoryMeta(
                trajectory_id=trajectory_id,
                prompt_id=request.prompt_of(row).id,
                row=row,
                num_prompt_tokens=sizes.prompt_tokens,
                num_response_tokens=sizes.response_tokens,
                oldest_version=oldest,
                newest_version=self._version,
                finish_reason="stop",
            )
            for row, trajectory_id in enumerate(request.trajectory_ids)
        )
        num_bytes = len(rows) * sizes.response_tokens * ROLLOUT_BYTES_PER_TOKEN
        payload = sizes.payload(len(rows), ROLLOUT_BYTES_PER_TOKEN)
        return payload, BatchMeta(rows, self._name, time.monotonic() - started, num_bytes)

    async def load_weights(self, published: WeightsMeta, *buckets: Payload) -> LoadResult:
        """Confirms anything."""
        self._version = published.policy_version
        return LoadResult(self._name, published.policy_version, published.checksum, published.num_bytes, 0.0)

    async def stop(self) -> None:
        """Nothing to stop."""


class FakeTeacher:
    """A synchronous actor, as the real one is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sizes = Sizes(1, 0)

    def ping(self) -> str:
        """The worker's name."""
        return self._name

    def use(self, sizes: Sizes) -> None:
        """What trajectories look like from now on."""
        self._sizes = sizes

    def score(self, payload: Payload, meta: BatchMeta, prompts: Sequence[Prompt]) -> tuple[Payload, BatchMeta]:
        """A payload of the scored size, at once."""
        started = time.monotonic()
        count = len(meta.trajectories)
        scored = self._sizes.payload(count, SCORED_BYTES_PER_TOKEN)
        num_bytes = count * self._sizes.response_tokens * SCORED_BYTES_PER_TOKEN
        return scored, BatchMeta(meta.trajectories, self._name, time.monotonic() - started, num_bytes)

    def stop(self) -> None:
        """Nothing to stop."""


class FakeRank:
    """A learner rank that learns nothing."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def ping(self) -> str:
        """The worker's name."""
        return f"learner-{self._rank}"

    def address(self) -> tuple[str, int]:
        """Nobody meets there."""
        return "127.0.0.1", 0

    def setup(self, host: str, port: int) -> int:
        """One bucket of weights."""
        return 1

    def takes_trees(self) -> bool:
        """Nothing is computed."""
        return False

    def train_step(self, batch: Any, refs: Sequence[Any]) -> RankReport:
        """The report of a step, once its payloads are here."""
        from opd_ray.learner.step_report import RankReport

        ray.get(list(refs))
        members = [index for microbatch in batch.microbatches for index in microbatch]
        num_tokens = sum(batch.infos[index].num_response_tokens for index in members)
        return RankReport(loss_sum=1.0, weight_sum=1.0, divisor=1.0, num_tokens=num_tokens, grad_norm=1.0)

    def export(self, policy_version: int) -> tuple[WeightsMeta, Payload] | None:
        """A few bytes stand for the weights."""
        if self._rank:
            return None
        return WeightsMeta(policy_version, CHECKSUM, 4096), Payload(bytearray(4096))

    def stop(self) -> None:
        """Nothing to stop."""
