"""What trajectories, requests, steps and checkpoints cost the controller, and what breaks first on a large cluster.

``python -m benchmarks.bench_scale [--out FILE.json]``; a quick look: ``--rollouts 20 --teachers 5 --ranks 4 --quick``

The controller, its replay store, the groups and all calls between them are real. 200 rollout engines, 50 teachers and
16 learner ranks are Ray actors that only answer, with metadata of 16,384-token trajectories. Payloads go by reference:
each request has a few KB in the object store, so that what is measured is the control plane. One small run has payloads
of the real size, and Ray tasks write a checkpoint of them. The same loops, and the store alone, also run without Ray,
at the sizes of clusters that do not fit here. From all of these follows a projection, which has no pass mark.

A process of Ray takes some 60 MiB, a second of CPU to start and 0.65 % of a core for doing nothing, so that 266 of them
would take both cores of a small machine before the first trajectory. By default, therefore, four engines (teachers) are
one process: the controller has 200 workers all the same, and makes the same calls. ``--share 1`` gives each its own.

The last line printed is the record as JSON. Exit code 1 when a trajectory was older than allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks.machine import check, finish, machine
from benchmarks.scale_actors import SCORED_BYTES_PER_TOKEN, Sizes
from benchmarks.scale_cluster import part_of, start, use
from benchmarks.scale_inprocess import in_process
from benchmarks.scale_model import RESPONSE_TOKENS, demand, on_paper
from benchmarks.scale_parts import parts
from benchmarks.scale_run import Cluster, Scenario, run
from benchmarks.scale_store import checkpoints, store_alone

SMALL = Sizes(RESPONSE_TOKENS, payload_bytes=4096)
REAL = Sizes(RESPONSE_TOKENS, payload_bytes=0)
# Without Ray an engine takes this long on average, so that requests are in flight as on a cluster.
ENGINE_S = 1.0
ACTOR_MIB = 66
OBJECT_STORE_BYTES = 2 * 2**30
# The largest step: of the real size it takes 0.2 GB.
REAL_PROMPTS = 8
# What `worker_env` gives every worker, so far as it matters here; Ray hands the driver's own on to all workers.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_max_direct_call_object_size": "1024",
    "OMP_NUM_THREADS": "1",
}


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    """Every batch with every bound."""
    return [
        Scenario(max(batch // args.samples, args.rollouts), args.samples, bound, args.seconds)
        for batch in args.batches
        for bound in args.max_staleness
    ]


async def real_size(cluster: Cluster, args: argparse.Namespace) -> dict[str, Any]:
    """Few trajectories with all of their bytes."""
    few = part_of(cluster, min(REAL_PROMPTS, args.rollouts), min(4, args.teachers), min(4, args.ranks))
    await use(few, REAL)
    try:
        return await run(Scenario(REAL_PROMPTS, args.samples, 2, args.seconds), few, probe=True)
    finally:
        await use(few, SMALL)


async def without_ray(args: argparse.Namespace) -> dict[str, Any]:
    """The loops alone: at this cluster's size, and at larger ones with whole steps of 8 trajectories an engine."""
    found = {}
    here = {"engines": args.rollouts, "teachers": args.teachers, "ranks": args.ranks}
    for name, size in {"here": here, **{f"{gpus}_gpus": demand(gpus) for gpus in args.gpus}}.items():
        engines, teachers, ranks = (round(size[role]) for role in here)
        for bound in (0, 2) if name != "10000_gpus" else (0,):
            scenario = Scenario(engines, args.samples, bound, min(args.seconds, 3.0), warm_up_steps=1, min_steps=1)
            cluster = in_process(engines, teachers, ranks, ENGINE_S, SMALL)
            found[f"{name}/max_staleness={bound}"] = await run(scenario, cluster, probe=False)
    return found


async def with_ray(args: argparse.Namespace) -> dict[str, Any]:
    """All that needs Ray."""
    begun = time.monotonic()
    cluster = await start(args)
    found: dict[str, Any] = {"start_s": time.monotonic() - begun}
    await use(cluster, SMALL)
    found["parts"] = await parts(cluster)
    found["runs"] = []
    for scenario in scenarios(args):
        found["runs"].append(await run(scenario, cluster, probe=True))
        say(found["runs"][-1])
    found["real_size"] = await real_size(cluster, args)
    found["checkpoints"] = await checkpoints(*args.payloads)
    return found


def say(figures: dict[str, Any]) -> None:
    """One line for those who wait."""
    print(
        f"{figures['trajectories_per_step']} a step, max_staleness {figures['max_staleness']}: "
        f"{figures['mean_trajectories_per_s']:.0f} trajectories/s, driver "
        f"{figures['cpu_ms_per_trajectory']['driver']:.2f} ms each",
        file=sys.stderr,
        flush=True,
    )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--teachers", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--share", type=int, default=4, help="engines, or teachers, that are one process; 1 = none")
    parser.add_argument("--batches", type=int, nargs="+", default=[1600, 4096], help="trajectories a step")
    parser.add_argument("--samples", type=int, default=8, help="a prompt")
    parser.add_argument("--max-staleness", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="of steady state, a run")
    parser.add_argument("--delay-s", type=float, default=0.0, help="that an engine takes for a request")
    parser.add_argument("--quick", action="store_true", help="one batch, two bounds, 3 s each, not 10,000 GPUs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(given)
    # Of 27 MB, which together are a node's share of a checkpoint, and of 4 KB.
    args.gpus, args.payloads = (1000, 10_000), (20, 2000)
    if args.quick:
        args.gpus, args.payloads = (1000,), (4, 200)
        args.batches, args.max_staleness, args.seconds = args.batches[:1], [0, 2], 3.0
    return args


def num_processes(args: argparse.Namespace) -> int:
    """Of actors; each learner rank is one."""
    shared = -(-args.rollouts // args.share) - (-args.teachers // args.share)
    return int(shared + args.ranks)


def refuse_without_memory(num_actors: int) -> None:
    """The kernel would end some process of this machine otherwise."""
    import psutil

    needed = num_actors * ACTOR_MIB * 2**20 + OBJECT_STORE_BYTES // 2
    free = psutil.virtual_memory().available
    if needed > free:
        raise SystemExit(
            f"{num_actors} processes need about {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f}: "
            "end other work, or give a larger --share, or smaller --rollouts, --teachers, --ranks"
        )


def main() -> int:
    """Command line; returns the exit code."""
    args = arguments()
    refuse_without_memory(num_processes(args))
    os.environ |= ENVIRONMENT
    found: dict[str, Any] = {"without_ray": asyncio.run(without_ray(args)), "store_alone": {}}
    for gpus in args.gpus:
        trajectories = round(demand(gpus)["trajectories_per_step"])
        found["store_alone"][f"{gpus}_gpus"] = asyncio.run(store_alone(trajectories))
    try:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        found |= asyncio.run(with_ray(args))
    finally:
        ray.shutdown()
    excess = max(one["staleness_seen"] - one["max_staleness"] for one in found["runs"])
    record: dict[str, Any] = {
        "benchmark": "scale",
        "machine": machine(),
        "workload": {
            "rollouts": args.rollouts,
            "teachers": args.teachers,
            "ranks": args.ranks,
            "response_tokens": RESPONSE_TOKENS,
            "bytes_per_token": SCORED_BYTES_PER_TOKEN,
            "seconds": args.seconds,
            "delay_s": args.delay_s,
            "workers_a_process": args.share,
            "processes": num_processes(args),
        },
        **found,
        "on_paper": {f"{gpus}_gpus": on_paper(gpus, found) for gpus in args.gpus},
        "checks": [check("staleness/above_bound", excess, "<= 0")],
    }
    return finish(record, args.out)


if __name__ == "__main__":
    sys.exit(main())
