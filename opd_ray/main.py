"""The Hydra edge: composes the config, checks it, runs it, and turns an error into one line and an exit code.

The only module that knows Hydra; other verbs with a config (`evaluate`, `plan`) come through `command`.
``python -m opd_ray.main +experiment=lsm_block64``
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ray.config.checks import check_config
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ConfigError, OpdError
from opd_ray.run.resume import finished_run

_Config = TypeVar("_Config")
_Act = Callable[["Composed[_Config]"], None]

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
LONGEST_NAME = 100
# Config groups that no default is chosen from: Hydra wants a plus before them.
ADDED_GROUPS = ("experiment=", "sweep=")


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
    """A composed config: the typed one, not checked yet, and the same as YAML and as plain nested dicts.

    `job` are the overrides of one job of a multirun (``-m``); None otherwise.
    """

    cfg: _Config
    yaml: str
    values: dict[str, Any]
    job: str | None = None


def composed(found: DictConfig) -> Composed[Any]:
    """What Hydra composed, in the three forms that are used."""
    values = cast(dict[str, Any], OmegaConf.to_container(found, resolve=True, enum_to_str=True))
    return Composed(OmegaConf.to_object(found), OmegaConf.to_yaml(found), values)


def register_benchmarks() -> None:
    """Make each file of ``conf/benchmark/`` known to ``conf/evaluate.yaml`` by its name: a new one is one new file."""
    names = sorted(path.stem for path in (conf_dir() / "benchmark").glob("*.yaml"))
    defaults = [{f"/benchmark@benchmark.{name}": name} for name in names]
    ConfigStore.instance().store(name="all_benchmarks", node={"defaults": defaults}, package="_global_")


def multirun_name(overrides: Sequence[str]) -> str:
    """The name of a multirun's folder: its arguments, so that the same command finds the same folder again."""
    kept = [text for text in overrides if not text.startswith(("runs_dir=", "resume="))]
    # No = and no comma, so that the name can be typed as it is in another override.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(text.lstrip("+") for text in kept)).strip("_")
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8]
        name = f"{name[: LONGEST_NAME - 9]}-{digest}"
    return name or "default"


def with_plus(arguments: Sequence[str]) -> list[str]:
    """``experiment=NAME`` as ``+experiment=NAME``: W&B allows no plus in the name of a sweep's parameter."""
    return [f"+{text}" if text.startswith(ADDED_GROUPS) else text for text in arguments]


def train(found: Composed[RunConfig]) -> None:
    """Check the config and run it to its end; raises `OpdError`.

    A job of a multirun whose run is complete already is skipped, with one line.
    """
    check_config(found.cfg)
    if found.job is not None and (complete := finished_run(found.cfg, found.values)) is not None:
        sys.stderr.write(f"opd_ray: note: skipped, {complete} is complete (resume=never runs it again)\n")
        return
    # ray is imported late, so that --help and --cfg job answer at once.
    from opd_ray.training.session import run_session

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


@dataclass(slots=True)
class Multirun:
    """The jobs of one multirun (``-m``), one after the other: one that fails says so, and the others still run."""

    started: int = 0
    failed: int = 0

    def run_job(self, found: DictConfig, act: _Act[Any]) -> None:
        """Hand one job to `act`; its `runs_dir` is the multirun's folder. Ctrl-C ends them all."""
        settings = HydraConfig.get()
        job = " ".join(settings.overrides.task)
        self.started += 1
        sys.stderr.write(f"opd_ray: note: job {self.started} of the multirun: {job}\n")
        try:
            if "runs_dir" in found:
                found.runs_dir = settings.sweep.dir
            act(replace(composed(found), job=job))
        except (OpdError, OmegaConfBaseException) as error:
            self._note(str(error) if isinstance(error, OpdError) else one_line(error))
        except Exception as error:  # noqa: BLE001  (a mistake of ours must not cost the other jobs)
            traceback.print_exc()
            self._note(f"{type(error).__name__}: {error}")

    def _note(self, error: str) -> None:
        self.failed += 1
        sys.stderr.write(f"opd_ray: error: job {self.started} failed: {error}\n")

    def end(self) -> None:
        """End the process with exit code 1 if a job failed."""
        if self.failed:
            sys.stderr.write(
                f"opd_ray: error: {self.failed} of {self.started} jobs failed: "
                "the same command skips what is complete and runs the rest\n"
            )
            sys.exit(EXIT_ERROR)


def command(config_name: str, schema: type[_Config], act: _Act[_Config]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides over `schema`, and hand it to `act`.

    Returns after a complete `act`; else ends the process with one line on stderr and exit code 1 (an error) or 130
    (Ctrl-C). `schema` is a dataclass, known to the YAML's defaults list as ``<config_name>_schema``.
    """
    # Hydra would print errors in its own format of several lines and exit by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    # Cached, as each job would otherwise have a folder of its own: its overrides are not the command's.
    OmegaConf.register_new_resolver("multirun_name", multirun_name, use_cache=True, replace=True)
    multirun = Multirun()
    sys.argv[1:] = with_plus(sys.argv[1:])

    def run(found: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            multirun.run_job(found, act)
            return
        try:
            if (sweep := HydraConfig.get().runtime.choices.get("sweep")) is not None:
                raise ConfigError(f"+sweep={sweep} is many runs: add -m")
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
    multirun.end()


def main() -> None:
    """Console entry: exit code 0 after a complete run, 1 after an error, 130 after Ctrl-C."""
    command("run", RunConfig, train)


if __name__ == "__main__":
    main()
