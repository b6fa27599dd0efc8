"""One process that holds one variant of `bench_lm_head.py`, so that its peak memory is its own.

The parent lets the workers of a case take turns, so that all share the machine's noise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_head_variants import EQUALS, VARIANTS, Inputs, Result, relative_errors, run


def serve(pipe: Connection, variant: str, files: list[str], sizes: dict[str, int], settings: dict[str, Any]) -> None:
    """Answer "first", "step" and "errors" until told to "quit"; an exception is answered by its text."""
    torch.set_num_threads(settings["threads"])
    try:
        worker = Worker(variant, load(files, sizes, settings["device"]))
        pipe.send(("ready", None))
        while (command := pipe.recv()) != "quit":
            pipe.send(("ok", getattr(worker, command)()))
    except Exception as error:  # noqa: BLE001  (handed to the parent, which reports it)
        pipe.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))


def load(files: list[str], sizes: dict[str, int], device: str) -> Inputs:
    """Read the case's tensors; on the CPU all workers share the pages of the files."""
    found: dict[str, torch.Tensor] = {}
    for name in files:
        found |= torch.load(name, mmap=True)
    length, size = sizes["length"], sizes["top_k"]
    cut = {key: value if key == "head" else value[:length] for key, value in found.items() if key != "sampled_at"}
    for key in ("support_ids", "teacher_logprobs"):
        cut[key] = cut[key][:, :size]
    at = found["sampled_at"]
    cut["sampled_at"] = at[at < length]
    inputs = Inputs(**{key: value.contiguous().to(device) for key, value in cut.items()})
    inputs.head.sum(), inputs.hidden.sum()  # touches every page
    inputs.hidden.requires_grad_()
    inputs.head.requires_grad_()
    return inputs


class Worker:
    """Measures one variant."""

    def __init__(self, variant: str, inputs: Inputs) -> None:
        self._name = variant
        self._inputs = inputs
        tiny = Inputs(
            inputs.hidden[:128].detach().requires_grad_(),
            inputs.head[:4096].detach().clone().requires_grad_(),
            inputs.support_ids[:128] % 4096,
            inputs.teacher_logprobs[:128],
            inputs.token_ids[:128] % 4096,
            inputs.behavior_logprobs[:128],
            inputs.sampled_at[inputs.sampled_at < 128],
        )
        run(VARIANTS[variant], tiny)  # starts threads and libraries

    def first(self) -> tuple[int, list[float] | None]:
        """Peak bytes of a step beyond its inputs and gradients, and the mean drift of each block as it sees it."""
        peak = _cuda_peak if self._inputs.head.is_cuda else _resident_peak
        results: list[Result] = []
        held = peak(lambda: results.append(run(VARIANTS[self._name], self._inputs)))
        gradients = (self._inputs.hidden.grad, self._inputs.head.grad)
        held -= sum(x.numel() * x.element_size() for x in gradients if x is not None)
        self._drop()
        means = results[0].block_drift
        return max(0, held), None if means is None else means.tolist()

    def step(self) -> float:
        """Seconds of one forward and backward pass."""
        if self._inputs.head.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run(VARIANTS[self._name], self._inputs)
            end.record()
            torch.cuda.synchronize()
            seconds = float(start.elapsed_time(end)) / 1000
        else:
            began = time.perf_counter()
            run(VARIANTS[self._name], self._inputs)
            seconds = time.perf_counter() - began
        self._drop()
        return seconds

    def errors(self) -> dict[str, float] | None:
        """How far loss and gradients are from those of full logits."""
        found = relative_errors(self._name, self._inputs) if self._name in EQUALS else None
        self._drop()
        return found

    def _drop(self) -> None:
        self._inputs.hidden.grad = self._inputs.head.grad = None


def _cuda_peak(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _resident_peak(step: Callable[[], object]) -> int:
    """Growth of the process's resident memory at its highest; the kernel keeps the mark."""
    with contextlib.suppress(OSError):  # a mark from before can only make the figure larger
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; measure memory on Linux")
