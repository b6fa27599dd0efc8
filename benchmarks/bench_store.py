"""The replay store against other data paths between Ray actors: append, sample and read of trajectory batches.

``bash launch/peers.sh`` (or ``python -m benchmarks.bench_store`` in its environment) ``[--out FILE.json]``

A producer actor has a batch of trajectories as numpy arrays, a consumer actor must have seen every value of it.
Between them is one contender: opd_ray's codec, with its store in the driver, which passes on references only;
TransferQueue; a TorchRL replay buffer in an actor; `ray.util.queue.Queue` with pickled lists or with dicts of numpy
arrays; and references to such dicts through that queue, which is the cost of Ray's object store alone. All are there at
once; in every round each brings batches through for some time one by one, and then with several in flight, while the
others wait. What the consumers read is compared with what the producers have. Contenders whose package is missing are
named under `skipped`, and their checks fail.

The last line printed is the record as JSON. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import logging
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import check, finish, machine, spread
from benchmarks.store_contenders import Contender, OpdRay
from benchmarks.store_peers import TorchRL, TransferQueue
from benchmarks.store_queues import QueueLists, QueueNumpy, QueueNumpyRefs
from benchmarks.store_workload import Sums, Workload, is_same, make_rows, read

CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind for kind in (OpdRay, TransferQueue, TorchRL, QueueLists, QueueNumpy, QueueNumpyRefs)
}
PACKAGES = {"transferqueue": ("transfer_queue", "TransferQueue"), "torchrl": ("torchrl", "torchrl")}
TARGETS = {"streamed": ">= 2.5", "bytes": "<= 0.75"}
NUM_WARM_UP = 3


@dataclass(slots=True)
class Measured:
    """Seconds of every batch that went alone, and batches a second of both ways, one number a round."""

    latencies_s: list[float] = field(default_factory=list)
    alone_per_s: list[float] = field(default_factory=list)
    streamed_per_s: list[float] = field(default_factory=list)


async def measure_round(contender: Contender, seconds: float, found: Measured, expected: Sums) -> None:
    """Batches alone for `seconds`, then streamed for as long."""
    latencies: list[float] = []
    while sum(latencies) < seconds:
        begun = time.perf_counter()
        sums = await contender.batch()
        latencies.append(time.perf_counter() - begun)
        if not is_same(sums, expected, in_order=contender.in_order):
            raise SystemExit(f"{contender.name} does not give back what was put in")
    found.latencies_s += latencies
    found.alone_per_s.append(len(latencies) / sum(latencies))
    begun = time.perf_counter()
    count = await contender.stream(seconds)
    found.streamed_per_s.append(count / (time.perf_counter() - begun))


async def measure(args: argparse.Namespace, work: Workload, names: list[str]) -> dict[str, dict[str, Any]]:
    """Figures of every contender."""
    expected = read(make_rows(work))
    contenders = [CONTENDERS[name](work, args.in_flight) for name in names]
    found = {name: Measured() for name in names}
    try:
        for contender in contenders:
            await contender.start()
            for _ in range(NUM_WARM_UP):
                await contender.batch()
            await contender.stream(args.seconds / 2)
        for turn in range(args.rounds):
            first = turn % len(contenders)
            # Another one begins each time.
            for contender in contenders[first:] + contenders[:first]:
                await measure_round(contender, args.seconds, found[contender.name], expected)
        return {
            contender.name: figures(found[contender.name], await contender.wire_bytes(), work) | settings(contender)
            for contender in contenders
        }
    finally:
        for contender in contenders:
            contender.stop()


def settings(contender: Contender) -> dict[str, Any]:
    """What a contender was told, and its version."""
    package = PACKAGES.get(contender.name)
    version = {} if package is None else {"version": importlib.metadata.version(package[1])}
    return {"settings": contender.settings | version}


def figures(found: Measured, num_bytes: int, work: Workload) -> dict[str, Any]:
    """Trajectories/s, MB/s, latency of a batch and bytes of a token."""
    latencies = sorted(found.latencies_s)
    streamed = statistics.median(found.streamed_per_s)
    return {
        "alone_trajectories_per_s": spread([rate * work.trajectories for rate in found.alone_per_s]),
        "streamed_trajectories_per_s": spread([rate * work.trajectories for rate in found.streamed_per_s]),
        "streamed_mb_per_s": streamed * num_bytes / 1e6,
        "batch_latency_ms": {
            "p50": 1e3 * statistics.median(latencies),
            "p99": 1e3 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
            "n": len(latencies),
        },
        "bytes_per_token": num_bytes / work.tokens,
    }


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """opd_ray against each of the others: rates streamed and alone, and bytes."""
    ours = found["opd_ray"]

    def rate(of: dict[str, Any], way: str) -> float:
        return float(of[f"{way}_trajectories_per_s"]["median"])

    return {
        name: {way: rate(ours, way) / rate(other, way) for way in ("streamed", "alone")}
        | {"bytes": ours["bytes_per_token"] / other["bytes_per_token"]}
        for name, other in found.items()
        if name != "opd_ray"
    }


def checks(against: dict[str, dict[str, float]], skipped: dict[str, str]) -> list[dict[str, Any]]:
    """The targets against other projects; those of one that is not there are not met."""
    made = []
    for name in PACKAGES:
        for quantity, target in TARGETS.items():
            title = f"{quantity}/ratio_to_{name}"
            if name in against:
                made.append(check(title, against[name][quantity], target))
            else:
                reason = skipped.get(name, "not among --contenders")
                made.append({"name": title, "value": None, "target": target, "ok": False, "reason": reason})
    return made


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each way, contender and round")
    parser.add_argument("--in-flight", type=int, default=4, help="batches, when streamed")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=[*CONTENDERS])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if "opd_ray" not in args.contenders:
        parser.error("opd_ray must be among --contenders")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import torch

    torch.set_num_threads(1)
    skipped = {
        name: f"package {package} is not installed: bash launch/peers.sh"
        for name, (module, package) in PACKAGES.items()
        if name in args.contenders and importlib.util.find_spec(module) is None
    }
    # Logical CPUs: TransferQueue's actors ask for one each.
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    work = Workload()
    try:
        found = asyncio.run(measure(args, work, [name for name in args.contenders if name not in skipped]))
    finally:
        ray.shutdown()
    against = ratios(found)
    record: dict[str, Any] = {
        "benchmark": "store",
        "machine": machine(),
        "workload": asdict(work) | {"in_flight": args.in_flight, "rounds": args.rounds, "seconds": args.seconds},
        "skipped": skipped,
        "figures": found,
        "ratios": against,
        "checks": checks(against, skipped),
    }
    return finish(record, args.out)


if __name__ == "__main__":
    sys.exit(main())
