"""One run as its folder tells it: config, status, summary. Reads files only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd_ray.errors import DataError

CONFIG_FILE = "config.yaml"
_MARKS = (CONFIG_FILE, "status.json", "metrics.jsonl")
_STAMP = re.compile(r"-(\d{8}-\d{6})(?:-(\d+))?$")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run folder; `config` maps dotted keys to their values as text, `summary` is empty where there is none."""

    path: Path
    config: Mapping[str, str]
    status: str
    error: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """The variant's name in the config."""
        return self.config.get("experiment", "custom")

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def age_key(self) -> tuple[str, int, float]:
        """Grows from older to newer runs: the time stamp of the folder's name, else the config's time on disk."""
        match = _STAMP.search(self.path.name)
        written = (self.path / CONFIG_FILE).stat().st_mtime
        return (match[1], int(match[2] or 1), written) if match else ("", 0, written)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among and below `paths`, each once whatever links lead to it, sorted by name.

    Raises:
        DataError: a path is not there, or there is no run at all.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no {path}: give run folders, or folders that hold some")
        if path.is_dir():
            found |= set(_runs_below(path.resolve()))
    if not found:
        raise DataError(
            f"no run folder (with {CONFIG_FILE}) in {', '.join(map(str, paths[:3]))}: give runs, or their folder"
        )
    return sorted(found)


def _runs_below(folder: Path) -> list[Path]:
    found = []
    for parent, names, files in os.walk(folder):
        if any(mark in files for mark in _MARKS):
            found.append(Path(parent))
            names.clear()
        # What begins with a point is half written or not of a run.
        names[:] = [name for name in names if not name.startswith(".")]
    return found


def read_run(path: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: `config.yaml` is missing or malformed, or has no whole seed.
    """
    try:
        loaded = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path / CONFIG_FILE}: {error.strerror}; give a run folder") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path / CONFIG_FILE} is not YAML: take the run away, or restore the file") from error
    config = _flat(loaded) if isinstance(loaded, Mapping) else {}
    if not config.get("seed", "").isdecimal():
        raise DataError(f"{path / CONFIG_FILE} has no seed: give folders that python -m opd_ray.main made")
    status = _read_object(path / "status.json")
    return RunRecord(
        path=path,
        config=config,
        status=str(status.get("status", "unknown")),
        error=None if status.get("error") is None else str(status["error"]),
        summary=_read_object(path / "summary.json"),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as text; an empty part keeps its own key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
