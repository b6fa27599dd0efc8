"""Choose the run to resume: the last interrupted one of the same config, the one named, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from opd_ray.config.schema import RunConfig
from opd_ray.errors import CheckpointError
from opd_ray.run.checkpoint import Checkpoint, latest_checkpoint
from opd_ray.run.folder import CONFIG_FILE, RunFolder, run_folders

AUTO = "auto"
NEVER = "never"

# What may differ between the config of a checkpoint and of the run that continues from it.
_FREE = ("resume", "runs_dir", "deadline_s", "checkpoint.", "faults.", "telemetry.")
_FREE_WHEN_NAMED = (*_FREE, "num_steps")


def checkpoint_to_resume(cfg: RunConfig, config_values: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to continue from; None for a new run.

    With ``resume=auto`` that of the newest run of the same config that was cut off and is not running any more; a run
    that came to its end is not resumed. Raises `CheckpointError` when a named run has none, is running, or was
    made with another config (`num_steps` may differ, so that a finished run can be made longer).
    """
    if cfg.resume == NEVER:
        return None
    if cfg.resume == AUTO:
        return _last_cut_off(cfg, config_values)
    folder = Path(cfg.resume).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"resume={cfg.resume} is no folder: give a run folder, auto or never")
    checkpoint = latest_checkpoint(folder.resolve())
    if checkpoint is None:
        raise CheckpointError(
            f"resume={cfg.resume} has no checkpoint: give a run folder that has one (checkpoint.every=N writes them)"
        )
    if different := next(differences(checkpoint.config, config_values, _FREE_WHEN_NAMED), None):
        key, then, now = different
        raise CheckpointError(
            f"resume={cfg.resume} was made with {key}={then} and this run has {now}: give the same, or resume=never"
        )
    if checkpoint.policy_version > cfg.num_steps:
        raise CheckpointError(
            f"resume={cfg.resume} is at step {checkpoint.policy_version}: give num_steps >= {checkpoint.policy_version}"
        )
    return checkpoint


def _last_cut_off(cfg: RunConfig, config_values: Mapping[str, Any]) -> Checkpoint | None:
    for folder in run_folders(cfg.runs_dir, cfg.run_name):
        try:
            checkpoint = latest_checkpoint(folder)
        except CheckpointError:
            continue
        if checkpoint is None or next(differences(checkpoint.config, config_values, _FREE), None):
            continue
        run = RunFolder(folder)
        return None if run.is_finished() or run.is_in_use() else checkpoint
    return None


def finished_run(cfg: RunConfig, config_values: Mapping[str, Any]) -> Path | None:
    """The newest run of the same config in `runs_dir` that came to its end; None if there is none, or ``resume=never``.

    A job of a multirun asks for it, so that a multirun that is typed again does nothing twice.
    """
    if cfg.resume != AUTO:
        return None
    for folder in run_folders(cfg.runs_dir, cfg.run_name):
        if RunFolder(folder).is_finished() and _was_made_with(folder, config_values):
            return folder
    return None


def _was_made_with(folder: Path, config_values: Mapping[str, Any]) -> bool:
    try:
        then = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(then, dict) and not any(differences(then, config_values, _FREE))


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values; keys that start with one of `free` are passed over."""
    for name in sorted({*then, *now}):
        key = f"{prefix}{name}"
        if any(key.startswith(start) if start.endswith(".") else key == start for start in free):
            continue
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, free, f"{key}.")
        elif old != new:
            yield key, old, new
