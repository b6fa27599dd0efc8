"""Time and peak memory of the LM head's variants, on the same tensors in one run.

``python -m benchmarks.bench_lm_head [--quick] [--device cuda] --out benchmarks/results/NAME.json``

Each variant runs in its own process; the variants of a case take turns, and a ratio is the median over rounds of the
ratio inside a round. The last line printed is the record without its table of cases. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_head_inputs import write_model, write_shared
from benchmarks.lm_head_variants import BLOCK, SAMPLED, VARIANTS, bytes_needed, unavailable
from benchmarks.lm_head_worker import serve
from benchmarks.machine import check, machine, spread

TARGET = {"length": 2048, "hidden": 1024, "vocab": 151_936, "top_k": 32}
SPEEDUPS = {  # figure: (slow, fast, target)
    "gated_speedup": ("full_logits", "ours_gated", 2.2),
    "ungated_speedup": ("full_ungated", "ours_ungated", 20.0),
    "sampled_drift_speedup": ("full_logits", "ours_gated_sampled_drift", None),
    "sampled_token_speedup": ("full_sampled_token", "ours_sampled_token", None),
    "chunked_recompute_speedup": ("full_logits", "chunked_recompute", None),
    "log_sum_exp_bound_speedup": ("full_logits", "bare_product", None),
    "share_of_log_sum_exp_bound": ("bare_product", "ours_gated", None),
    "triton_speedup_of_ungated": ("ours_ungated", "ours_ungated_triton", None),
}
MEMORY_SHARES = {
    "gated_memory_share": ("full_logits", "ours_gated"),
    "ungated_memory_share": ("full_ungated", "ours_ungated"),
}
MEMORY_TARGET, PARITY_TARGET = 1 / 8, 1e-5


def numbers(text: str) -> list[int]:
    """Parse integers with commas between them."""
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--hidden", type=numbers, default=[1024, 2048])
    parser.add_argument("--vocab", type=int, default=TARGET["vocab"])
    parser.add_argument("--top-k", type=numbers, default=[32, 64])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--ids", choices=["zipf", "uniform"], default="zipf", help="how support ids are drawn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="the target shape alone, 3 repeats")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.hidden, args.top_k, args.repeats = [2048], [1024], [32], 3
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; there are {', '.join(VARIANTS)}")
    if bad := [length for length in args.lengths if length % BLOCK]:
        parser.error(f"lengths {bad} are no multiples of {BLOCK}")
    return args


def free_bytes(device: str) -> int:
    """Memory that a new process may take."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


class Case:
    """All variants of one shape and dtype, each in its process."""

    def __init__(self, sizes: dict[str, Any], files: list[Path], drift: torch.Tensor, args: argparse.Namespace) -> None:
        self.sizes, self._drift, self._args = sizes, drift[: sizes["length"]], args
        self.rows: dict[str, dict[str, Any]] = {}
        self._workers: dict[str, tuple[BaseProcess, Connection]] = {}
        settings = {"threads": args.threads, "device": args.device}
        context = multiprocessing.get_context("spawn")
        for variant in args.variants:
            self.rows[variant] = {}
            reason = unavailable(variant, args.device) or self._too_large(variant)
            if reason:
                self.rows[variant] = {"skipped": reason}
                continue
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, variant, [str(file) for file in files], sizes, settings), daemon=True
            )
            process.start()
            theirs.close()
            self._workers[variant] = (process, ours)
        for variant in list(self._workers):  # all start at once
            self._answer(variant)

    def measure(self) -> None:
        """A first step for memory and drift, then rounds of one step each, then differences."""
        self._all("first", self._keep_first)
        for _ in range(self._args.repeats):
            self._all("step", lambda row, value: row.setdefault("seconds", []).append(value))
        if self.sizes["dtype"] == "float32" and not self._too_large("full_logits", heads=3):
            self._all("errors", lambda row, value: row.update({} if value is None else {"relative_errors": value}))
        for process, pipe in self._workers.values():
            pipe.send("quit")
            process.join()

    def ratios(self, slow: str, fast: str) -> dict[str, float] | None:
        """Spread over the rounds of seconds(slow) / seconds(fast); None where one was not measured."""
        pair = [self.rows.get(name, {}).get("seconds", []) for name in (slow, fast)]
        values = [a / b for a, b in zip(*pair, strict=False)]
        return spread(values) if values else None

    def table(self) -> list[dict[str, Any]]:
        """One row a variant."""
        return [
            self.sizes
            | {"variant": variant}
            | {key: spread(value) if key == "seconds" else value for key, value in row.items()}
            for variant, row in self.rows.items()
        ]

    def figures(self) -> dict[str, Any]:
        """Ratios of time and memory, and how far a block's drift is from the true one."""
        found: dict[str, Any] = {name: self.ratios(slow, fast) for name, (slow, fast, _) in SPEEDUPS.items()}
        for name, (large, small) in MEMORY_SHARES.items():
            held = [float(self.rows.get(variant, {}).get("peak_bytes", 0)) for variant in (small, large)]
            found[name] = held[0] / held[1] if all(held) else None
        for variant, row in self.rows.items():
            if "block_drift_error" in row:
                found[f"block_drift_error/{variant}"] = row["block_drift_error"]
            if "relative_errors" in row:
                found[f"largest_relative_error/{variant}"] = max(row["relative_errors"].values())
        return {name: value for name, value in found.items() if value is not None}

    def _too_large(self, variant: str, heads: int = 0) -> str | None:
        sizes = self.sizes
        itemsize = getattr(torch, sizes["dtype"]).itemsize
        needed = bytes_needed(variant, sizes["length"], sizes["hidden"], sizes["vocab"], itemsize)
        needed += heads * sizes["vocab"] * sizes["hidden"] * itemsize
        free = free_bytes(self._args.device)
        if needed <= free:
            return None
        return f"does not fit: needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def _all(self, command: str, keep: Callable[[dict[str, Any], Any], None]) -> None:
        for variant in list(self._workers):
            self._workers[variant][1].send(command)
            value = self._answer(variant)
            if variant in self._workers:
                keep(self.rows[variant], value)

    def _answer(self, variant: str) -> Any:
        """Return a worker's answer; one that failed or died is reported in its row and asked no more."""
        process, pipe = self._workers[variant]
        try:
            state, value = pipe.recv()
        except EOFError:
            state, value = "failed", "the process died, most likely for want of memory"
        if state == "failed":
            process.join()
            self.rows[variant]["failed"] = value
            del self._workers[variant]
        return value

    def _keep_first(self, row: dict[str, Any], found: tuple[int, list[float] | None]) -> None:
        """Peak memory; errors of the blocks' mean drift, in units of the root mean square drift of a token."""
        row["peak_bytes"], means = found
        if means is not None:
            true = self._drift.double().view(-1, BLOCK).mean(dim=1)
            errors = (torch.tensor(means, dtype=torch.float64) - true) / self._drift.double().square().mean().sqrt()
            row["block_drift_error"] = {
                "rms": float(errors.square().mean().sqrt()),
                "max": float(errors.abs().max()),
                "blocks": len(means),
            }


def checks(sizes: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the target shape must reach, and that every shape computes the same as full logits."""
    label = " ".join(f"{key}={value}" for key, value in sizes.items() if key != "vocab")
    items: list[tuple[str, float, str]] = []
    if all(sizes[key] == value for key, value in TARGET.items()):
        for name, (_, _, least) in SPEEDUPS.items():
            if least is not None and name in found:
                items.append((name, found[name]["median"], f">= {least}"))
        items += [(name, found[name], f"<= {MEMORY_TARGET}") for name in MEMORY_SHARES if name in found]
    for name, value in found.items():
        if name.startswith("largest_relative_error/ours"):
            items.append((name, value, f"<= {PARITY_TARGET}"))
    return [check(f"{name} {label}", value, target) for name, value, target in items]


def measure_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """Run every case; return the table, the figures of each case and the checks."""
    table: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    judged: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = write_shared(folder, max(args.lengths), max(args.top_k), args.vocab, args.ids)
        for hidden, dtype in itertools.product(args.hidden, args.dtypes):
            model, drift = write_model(folder, shared, hidden, args.vocab, dtype)
            for length, top_k in itertools.product(args.lengths, args.top_k):
                sizes = {"length": length, "hidden": hidden, "vocab": args.vocab, "top_k": top_k, "dtype": dtype}
                case = Case(sizes, [shared, model], drift, args)
                case.measure()
                for row in case.table():
                    print(describe(row), flush=True)
                found = case.figures()
                table += case.table()
                figures["T={length} H={hidden} K={top_k} {dtype}".format(**sizes)] = found
                judged += checks(sizes, found)
            model.unlink()
    return table, figures, judged


def describe(row: dict[str, Any]) -> str:
    """One line of the running log."""
    head = "T={length} H={hidden} K={top_k} {dtype} {variant}:".format(**row)
    if "seconds" not in row:
        return f"{head} {row.get('skipped') or row.get('failed')}"
    seconds = row["seconds"]
    peak = f"{row['peak_bytes'] / 2**20:.0f} MiB beyond inputs and gradients"
    return f"{head} {seconds['median']:.4f} s ({seconds['min']:.4f} to {seconds['max']:.4f}), {peak}"


def main() -> int:
    """Command line; returns the exit code."""
    args = arguments()
    table, figures, judged = measure_all(args)
    described = machine() | {"threads": args.threads, "device": "cpu"}
    if args.device.startswith("cuda"):
        described["device"] = torch.cuda.get_device_name(args.device)
    for package in ("triton", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            described["versions"][package] = importlib.metadata.version(package)
    record = {
        "benchmark": "lm_head",
        "machine": described,
        "settings": {"ids": args.ids, "repeats": args.repeats, "block": BLOCK, "sampled": SAMPLED},
        "figures": figures,
        "checks": judged,
    }
    if args.out is not None:
        args.out.write_text(json.dumps({**record, "cases": table}, indent=1) + "\n")
    print(json.dumps(record))
    return 0 if all(item["ok"] for item in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
