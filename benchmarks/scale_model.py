"""The model on paper: what 1,000 and 10,000 GPUs would ask of one controller and its store, from measured costs."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.scale_actors import SCORED_BYTES_PER_TOKEN
from opd_ray.cluster.payload_tasks import PAYLOADS_PER_TASK

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


def on_paper(gpus: int, found: dict[str, Any]) -> dict[str, Any]:
    """Demand against the measured costs; `shares_of_step` names first what breaks first."""
    need = demand(gpus)
    size, nodes = RESPONSE_TOKENS * SCORED_BYTES_PER_TOKEN, gpus / GPUS_PER_NODE
    step_bytes = need["trajectories_per_step"] * size
    driver = driver_seconds(gpus, found, need)
    saved = checkpoint_costs(gpus, found, need)
    # All in terms of one step's time, and as if every step had a checkpoint.
    used_s = {
        "controller_loop": driver["all"],
        "weights_from_one_node": WEIGHT_BYTES * nodes / NETWORK_BYTES_PER_S,
        **{f"checkpoint_{name.removesuffix('_s')}": value for name, value in saved.items() if name.endswith("_s")},
    }
    shares = {name: seconds / need["step_s"] for name, seconds in used_s.items()}
    return need | {
        "controller_loop_of_step_s": driver,
        "payload_bytes_per_s": step_bytes / need["step_s"],
        "step_bytes": step_bytes,
        "learner_node_step_bytes": step_bytes / (need["ranks"] / GPUS_PER_NODE),
        "publish_bytes": WEIGHT_BYTES * nodes,
        "publish_tree_s": WEIGHT_BYTES / NETWORK_BYTES_PER_S * math.ceil(math.log2(nodes)),
        "checkpoint": saved,
        "shares_of_step": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }


def driver_seconds(gpus: int, found: dict[str, Any], need: dict[str, float]) -> dict[str, float]:
    """CPU seconds of the controller's loop for one step, and its largest parts.

    A request costs what it does here with Ray, with its share of what comes once a step, and what the loops and the
    store take more of it, without Ray, at that size.
    """
    requests = need["trajectories_per_step"] / SAMPLES
    with_ray = min(found["runs"], key=lambda run: run["trajectories_per_request"])["cpu_ms_per_request"]
    here, there = (
        found["without_ray"][f"{size}/max_staleness=0"]["cpu_ms_per_request"] for size in ("here", f"{gpus}_gpus")
    )
    more_ms = max(0.0, there["driver_loop"] - here["driver_loop"])
    parts = found["parts"]
    plan = f"{need['trajectories_per_step']:.0f}_trajectories/{need['ranks']:.0f}_ranks"
    return {
        "all": (with_ray["driver_loop"] + more_ms) * requests / 1e3,
        "store": found["store_alone"][f"{gpus}_gpus"]["step_ms"] / 1e3,
        "calls_to_ranks": dispatch_seconds(parts, need),
        "plan": parts["plan_s"][plan],
        "publish": parts["publish"]["loop_cpu_s"]["median"] / parts["publish"]["engines"] * need["engines"],
    }


def checkpoint_costs(gpus: int, found: dict[str, Any], need: dict[str, float]) -> dict[str, float]:
    """A checkpoint of a full store: what each node writes at the same time, and what the driver does."""
    nodes = gpus / GPUS_PER_NODE
    # What admission leaves room for, all of it ready.
    stored = (MAX_STALENESS + 1) * need["trajectories_per_step"]
    num_bytes, payloads = stored * RESPONSE_TOKENS * SCORED_BYTES_PER_TOKEN, stored / SAMPLES
    large, small = (found["checkpoints"][f"{size}_payloads"] for size in ("large", "small"))
    index = found["store_alone"][f"{gpus}_gpus"]
    return {
        "bytes": num_bytes,
        "bytes_per_node": num_bytes / nodes,
        "payloads": payloads,
        "tasks": nodes * math.ceil(payloads / nodes / PAYLOADS_PER_TASK),
        "storage_bytes_per_second_within_a_step": num_bytes / need["step_s"],
        "freeze_s": index["freeze_ms"] / 1e3,
        "node_writes_s": num_bytes / nodes / large["bytes"] * large["write"]["seconds"],
        "controller_loop_s": payloads / small["payloads"] * small["write"]["loop_cpu_s"],
        "index_s": index["index"]["driver_cpu_s"],
        "sync_s": payloads / small["payloads"] * small["commit"]["seconds"],
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
