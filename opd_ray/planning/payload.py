"""Bytes of trajectories by the Arrow schema, what the object store holds, and what groups hand to each other a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from opd_ray.config.choices import Support
from opd_ray.config.schema import RunConfig
from opd_ray.planning.amounts import Amount, Origin
from opd_ray.trajectory.schema import BatchSpec

# Bytes of a text cell (prompt id, finish reason), and version segments of a trajectory.
_TEXT_BYTES = 24
_SEGMENTS = 2
_OFFSET_BYTES = 4
_PER_PROMPT = ("prompt_token_ids",)
_PER_SEGMENT = ("version_starts", "version_values")


def batch_spec(cfg: RunConfig) -> BatchSpec:
    """The schema of a scored batch of this run."""
    return BatchSpec(
        "",
        top_k=cfg.teacher.top_k,
        logprob_dtype=cfg.replay.logprob_dtype.name,
        support=cfg.teacher.scored.name,
        sampled_logprob_dtype=cfg.replay.sampled_logprob_dtype.name,
    )


def row_bytes(spec: BatchSpec, prompt_tokens: float, response_tokens: float) -> float:
    """Bytes of one trajectory's values and offsets; the stream adds less than 5 KB a batch."""
    lengths = dict.fromkeys(_PER_PROMPT, prompt_tokens) | dict.fromkeys(_PER_SEGMENT, float(_SEGMENTS))
    return sum(_cell_bytes(spec.type_of(name), lengths.get(name, response_tokens)) for name in spec.columns)


def _cell_bytes(kind: pa.DataType, length: float) -> float:
    if pa.types.is_list(kind):
        return _OFFSET_BYTES + length * _item_bytes(kind.value_type)
    return _item_bytes(kind)


def _item_bytes(kind: pa.DataType) -> float:
    if pa.types.is_fixed_size_list(kind):
        return float(kind.list_size * _item_bytes(kind.value_type))
    if pa.types.is_string(kind):
        return _OFFSET_BYTES + _TEXT_BYTES
    return float(kind.bit_width / 8)


@dataclass(frozen=True, slots=True)
class StoreNeed:
    """What lies in the object stores of all nodes together: trajectories, and the published weights of one copy."""

    payloads: Amount
    weights: Amount
    num_trajectories: int
    bytes_per_trajectory: float


def store_need(cfg: RunConfig, weight_bytes: float) -> StoreNeed:
    """The most that the store holds with responses of full length (`replay.staleness`: admission).

    At most ``(max_staleness // reuse + 1) n`` trajectories are queued, and n are being trained on.
    """
    replay, per_step = cfg.replay, cfg.trajectories_per_step
    count = (replay.max_staleness // replay.reuse + 2) * per_step
    each = row_bytes(batch_spec(cfg), cfg.data.max_prompt_tokens, cfg.rollout.max_response_tokens)
    held = count * each
    if replay.max_bytes:
        # One batch may go beyond the budget (`replay.staleness`: bytes).
        held = min(held, replay.max_bytes + per_step * each)
    if replay.spill_bytes:
        held = min(held, float(replay.spill_bytes))
    return StoreNeed(
        payloads=Amount.possible("trajectories", held, f"{count} of full length x {each:,.0f} bytes"),
        weights=Amount("weights", 2 * weight_bytes, weight_bytes, Origin.computed, "published, and the next version"),
        num_trajectories=count,
        bytes_per_trajectory=each,
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """Bytes of one optimizer step from one group to another: at full length, and at half of it (assumed)."""

    name: str
    full: float
    half: float
    how: str


def traffic(cfg: RunConfig, weight_bytes: float, gradient_bytes: float, engine_nodes: int) -> Sequence[Stage]:
    """What moves in one optimizer step; `engine_nodes` are the nodes with engines, each of which gets the weights once.

    A trajectory is sampled and scored once for `replay.reuse` steps and read at each of them; every step's weights are
    published. The learner's own all-reduce moves 2 (N - 1) / N of the gradients a rank (ring; ZeRO 1 and 2 the same,
    ZeRO 3 half as much again: arXiv 1910.02054, section 7).
    """
    spec = batch_spec(cfg)
    per_step, reuse, ranks = cfg.trajectories_per_step, cfg.replay.reuse, cfg.learner.num_ranks
    prompt, response = cfg.data.max_prompt_tokens, cfg.rollout.max_response_tokens

    def payload(name: str, of: BatchSpec, count: float, how: str) -> Stage:
        full, half = (row_bytes(of, prompt / part, response / part) for part in (1, 2))
        return Stage(name, count * full, count * half, how)

    columns = "student's top-K ids too" if cfg.teacher.scored is Support.student_topk else "ids, log-probs, versions"
    ring = 2 * (ranks - 1) / ranks * gradient_bytes * (1.5 if cfg.learner.zero_stage == 3 else 1.0) * ranks
    return (
        payload("rollout -> teacher", spec.rollout, per_step / reuse, columns),
        payload("teacher -> store", spec, per_step / reuse, f"with K = {spec.top_k} teacher ids and log-probs"),
        payload("store -> learner", spec, per_step, f"each of {reuse} uses; only other nodes copy"),
        Stage(
            "learner -> engines", weight_bytes * engine_nodes, weight_bytes * engine_nodes, f"{engine_nodes} node(s)"
        ),
        Stage("learner <-> learner", ring, ring, f"gradients between {ranks} rank(s), all together"),
    )
