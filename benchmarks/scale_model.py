"""The model on paper: what 1,000 and 10,000 GPUs would ask of one controller and one store, from measured costs."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.scale_actors import SCORED_BYTES_PER_TOKEN

# A 1.7 B student (28 layers, 8 KV heads of 128, bfloat16: 115 kB a token) at responses of 16k tokens: decoding on an
# H100 is bound by reading the KV cache, 0.94 GB a sequence at its mean length, at 2.3 TB/s.
TOKENS_PER_S_OF_ENGINE = 2500
RESPONSE_TOKENS = 16_384
SAMPLES = 8
WEIGHT_BYTES = 1.72e9 * 2
GPUS_PER_NODE = 8
NETWORK_BYTES_PER_S = 50e9  # of a node, 400 Gbit/s
# Student 2 FLOP a weight and token forward, 4 backward, 2 recomputed; an 8 B teacher forward; 40 % of 990 TFLOP/s.
# That gives shares of the GPUs of about 80 : 12 : 8, with one engine, teacher or rank a GPU.
SHARES = {"engines": 0.80, "teachers": 0.12, "ranks": 0.08}
MAX_STALENESS = 2


def demand(gpus: int) -> dict[str, float]:
    """What a cluster does: the smallest step that gives every engine one prompt."""
    engines, ranks = round(gpus * SHARES["engines"]), round(gpus * SHARES["ranks"])
    per_s = engines * TOKENS_PER_S_OF_ENGINE / RESPONSE_TOKENS
    step = engines * SAMPLES
    return {
        "engines": engines,
        "teachers": round(gpus * SHARES["teachers"]),
        "ranks": ranks,
        "trajectories_per_s": per_s,
        "requests_per_s": per_s / SAMPLES,
        "trajectories_per_step": step,
        "step_s": step / per_s,
    }


def load(gpus: int, found: dict[str, Any]) -> dict[str, float]:
    """Demand against the measured costs."""
    need = demand(gpus)
    size = RESPONSE_TOKENS * SCORED_BYTES_PER_TOKEN
    one = min(found["runs"], key=lambda run: run["trajectories_per_request"])
    cpu = one["cpu_ms_per_request"]
    parts = found["parts"]
    dispatch = dispatch_seconds(parts, need)
    publish = parts["publish"]["loop_cpu_s"]["median"] / parts["publish"]["engines"] * need["engines"]
    stored = (MAX_STALENESS + 2) * need["trajectories_per_step"] * size
    nodes = gpus / GPUS_PER_NODE
    return need | {
        "controller_limit_over_demand": 1e3 / (cpu["driver_loop"] * need["requests_per_s"]),
        "hand_out_limit_over_demand": max(hand_out_per_s(run) for run in found["runs"]) / need["requests_per_s"],
        "hand_out_limit_over_demand_idle": 1e3 / (found["idle_store_call"]["p50_ms"] * need["requests_per_s"]),
        "controller_share_of_a_core": cpu["driver_loop"] * need["requests_per_s"] / 1e3,
        "store_share_of_a_core": cpu["store"] * need["requests_per_s"] / 1e3,
        "dispatch_of_step_s": dispatch,
        "dispatch_share_of_step": dispatch / need["step_s"],
        "publish_driver_s": publish,
        "payload_bytes_per_s": need["trajectories_per_s"] * size,
        "step_bytes": need["trajectories_per_step"] * size,
        "learner_node_bytes_per_s": need["trajectories_per_s"] * size,
        "stored_bytes": stored,
        "stored_bytes_per_node": stored / nodes,
        "publish_bytes": WEIGHT_BYTES * nodes,
        "publish_from_one_node_s": WEIGHT_BYTES * nodes / NETWORK_BYTES_PER_S,
        "publish_tree_s": WEIGHT_BYTES / NETWORK_BYTES_PER_S * math.ceil(math.log2(nodes)),
        "checkpoint_store_s": stored / 1e6 / found["real_size"]["snapshot"]["mb_per_s"],
    }


def dispatch_seconds(parts: dict[str, Any], need: dict[str, float]) -> float:
    """A step's calls to all ranks, each with the facts and the payloads of its own trajectories."""

    def loop_s(name: str) -> float:
        return float(parts[f"train_step/{name}"]["loop_cpu_s"]["median"])

    ranks = parts["train_step/ranks"]
    bare, with_facts, with_both = (
        loop_s(f"{name}_payloads") for name in ("8_trajectories/1", "4096_trajectories/1", "4096_trajectories/200")
    )
    fact = (with_facts - bare) / (4096 - 8)
    payload = max(0.0, with_both - with_facts) / (200 - 1)
    seconds: float = need["ranks"] * bare / ranks + fact * need["trajectories_per_step"] + payload * need["engines"]
    return seconds


def hand_out_per_s(run: dict[str, Any]) -> float:
    """Requests that can be handed out: each waits for an answer of the store, one after the other."""
    return float(1e3 / run["store_calls"]["acquire_slots"]["p50_ms"])


def on_paper(found: dict[str, Any]) -> dict[str, Any]:
    """Both clusters."""
    return {f"{gpus}_gpus": load(gpus, found) for gpus in (1000, 10_000)}
