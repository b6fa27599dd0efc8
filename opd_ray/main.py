"""The Hydra edge: composes the config, checks it, runs it, and turns an error into one line and an exit code.

The only module that knows Hydra; other verbs with a config (`evaluate`, `plan`) come through `command`.
``python -m opd_ray.main +experiment=lsm_block64``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ray.config import RunConfig
from opd_ray.config_checks import check_config
from opd_ray.errors import OpdError

_Config = TypeVar("_Config")

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def conf_dir() -> Path:
    """The folder of config files: inside an installed wheel, else beside the package."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf" / "run.yaml").is_file() else package.parent / "conf"


def to_run_config(found: DictConfig) -> RunConfig:
    """The typed, checked config of a composed one; raises `ConfigError`."""
    cfg = cast(RunConfig, OmegaConf.to_object(found))
    check_config(cfg)
    return cfg


@dataclass(frozen=True, slots=True)
class Composed(Generic[_Config]):
    """A composed config: the typed one, not checked yet, and the same as YAML and as plain nested dicts."""

    cfg: _Config
    yaml: str
    values: dict[str, Any]


def composed(found: DictConfig) -> Composed[Any]:
    """What Hydra composed, in the three forms that are used."""
    values = cast(dict[str, Any], OmegaConf.to_container(found, resolve=True, enum_to_str=True))
    return Composed(OmegaConf.to_object(found), OmegaConf.to_yaml(found), values)


def train(found: Composed[RunConfig]) -> None:
    """Check the config and run it to its end; raises `OpdError`."""
    check_config(found.cfg)
    # ray is imported late, so that --help and --cfg job answer at once.
    from opd_ray.session import run_session

    run_session(found.cfg, found.yaml, found.values)


def one_line(error: BaseException) -> str:
    """An error as one line; Hydra's and OmegaConf's name the key on lines of their own."""
    key = getattr(error, "full_key", None)
    lines = [line.strip() for line in str(error).split("Config search path:")[0].splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=")))
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        text = f"{text} ({one_line(cause)})"
    return f"{key}: {text}" if key and key not in text else text


def command(config_name: str, schema: type[_Config], act: Callable[[Composed[_Config]], None]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides over `schema`, and hand it to `act`.

    Returns after a complete `act`; else ends the process with one line on stderr and exit code 1 (an error) or 130
    (Ctrl-C). `schema` is a dataclass, known to the YAML's defaults list as ``<config_name>_schema``.
    """
    # Hydra would print errors in its own format of several lines and exit by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)

    def run(found: DictConfig) -> None:
        try:
            act(composed(found))
        except OpdError as error:
            # Reported here: Hydra would put a line of its own above it.
            sys.stderr.write(f"opd_ray: error: {error}\n")
            sys.exit(EXIT_ERROR)

    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(run)
    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        sys.stderr.write(f"opd_ray: error: {one_line(error)}\n")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("opd_ray: interrupted; the run folder holds what was finished\n")
        sys.exit(EXIT_INTERRUPTED)


def main() -> None:
    """Console entry: exit code 0 after a complete run, 1 after an error, 130 after Ctrl-C."""
    command("run", RunConfig, train)


if __name__ == "__main__":
    main()
