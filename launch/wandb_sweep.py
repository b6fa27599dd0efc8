"""Print a sweep of `conf/sweep/` in W&B's form: the same grid, drawn by a W&B server and run by its agents.

python -m launch.wandb_sweep six_variants | wandb sweep /dev/stdin    then the `wandb agent` that it prints, anywhere
python -m opd_ray.main -m +sweep=six_variants                         the same runs without a server
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from opd_ray.config.schema import RunConfig
from opd_ray.main import conf_dir

METRIC = {"name": "evaluation/avg_at_8", "goal": "maximize"}


def sweep_names() -> list[str]:
    """Names of the sweeps in `conf/sweep/`."""
    return sorted(path.stem for path in (conf_dir() / "sweep").glob("*.yaml"))


def wandb_sweep(name: str) -> dict[str, Any]:
    """The W&B sweep of ``+sweep=NAME``: every combination of the values, each run in the sweep's own folder."""
    defaults = RunConfig()
    found = OmegaConf.load(conf_dir() / "sweep" / f"{name}.yaml")
    settings: Any = OmegaConf.merge({"runs_dir": defaults.runs_dir}, found)["hydra"]
    overrides = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in settings.sweeper.params.items()])
    # W&B allows no plus in a parameter's name; `opd_ray.main` adds it again.
    parameters = {
        override.key_or_group: {"values": list(override.sweep_iterator(transformer=lambda value: value))}
        if override.is_sweep_override()
        else {"value": override.value()}
        for override in overrides
    }
    return {
        "name": name,
        "project": defaults.telemetry.wandb_project,
        "method": "grid",
        "metric": METRIC,
        "program": "opd_ray/main.py",
        "command": [
            *("${env}", "${interpreter}", "-m", "opd_ray.main"),
            *(f"runs_dir={settings.sweep.dir}", "${args_no_hyphens}"),
        ],
        "parameters": parameters,
    }


def main(arguments: Sequence[str] | None = None) -> str:
    """The YAML text that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.wandb_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sweep_names(), help="a file of conf/sweep, without .yaml")
    chosen = parser.parse_args(arguments)
    return yaml.safe_dump(wandb_sweep(chosen.name), sort_keys=False, default_flow_style=None)


if __name__ == "__main__":
    sys.stdout.write(main())
