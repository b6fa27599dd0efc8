"""The model that ``model=`` of `opd_ray.evaluate` names, and the folder for its results."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.errors import ModelError, RunFolderError
from opd_ray.run.folder import CONFIG_FILE, STATUS_FILE, SUMMARY_FILE, RunFolder
from opd_ray.training.evaluator import FOLDER
from opd_ray.training.sources import TINY_PREFIX, model_path

STUDENT = "student"
_HUB_ID = re.compile(r"[\w-]+(?:\.[\w-]+)*(?:/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class JudgedModel:
    """`path` is what engines load, `name` a short one; `run` is the run folder that it was trained in, if any."""

    path: str
    name: str
    run: Path | None = None


def judged_model(model: str) -> JudgedModel:
    """Raises `ModelError` where there is no such folder, or a run folder has no student yet."""
    if model.startswith(TINY_PREFIX):
        return JudgedModel(model_path(model), model.replace(":", "-"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        # By its own name, also where it was named through a link such as runs/latest.
        folder = folder.resolve()
        if (folder / STUDENT).is_dir():
            return JudgedModel(str(folder / STUDENT), folder.name, folder)
        if (folder / STATUS_FILE).is_file():
            raise ModelError(f"run {folder} has no {STUDENT}/: wait for its end, or give checkpoints/step-N/student")
        return JudgedModel(str(folder), folder.name)
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"model={model}: no such folder: give a folder, a hub id, tiny:student or tiny:teacher")
    return JudgedModel(model, model.rsplit("/", 1)[-1])


class Results:
    """Files of one evaluation: a Parquet a benchmark, a summary that grows with each, the config.

    In a run folder they are ``evaluation/student-*``; any other model gets a folder of its own.
    """

    def __init__(self, model: JudgedModel, evaluations_dir: str) -> None:
        self._own: RunFolder | None = None
        self._prefix = ""
        if model.run is not None:
            self.folder = RunFolder(model.run / FOLDER)
            self._prefix = f"{STUDENT}-"
            self._make(self.folder.path)
        else:
            try:
                self.folder = self._own = RunFolder.create(evaluations_dir, model.name)
            except RunFolderError as error:
                raise RunFolderError(str(error).replace("runs_dir", "evaluations_dir")) from None

    @staticmethod
    def _make(folder: Path) -> None:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make {folder}: {error.strerror}; copy student/ elsewhere") from None

    @property
    def shown(self) -> Path:
        """The folder that the files are in."""
        return self.folder.path

    def path_of(self, name: str) -> Path:
        """Where the file `name` goes."""
        return self.folder.path / f"{self._prefix}{name}"

    def write_config(self, yaml: str) -> None:
        """Note what was asked for."""
        self.folder.write_text(f"{self._prefix}{CONFIG_FILE}", yaml)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write what is known so far."""
        self.folder.write_json(f"{self._prefix}{SUMMARY_FILE}", summary)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Every benchmark is done."""
        if self._own is not None:
            self._own.finish(summary)
        else:
            self.write_summary(summary)

    def fail(self, error: str | None) -> bool:
        """It ended early, by `error` or an interruption (None); whether anything was finished, and is kept."""
        kept = any(self.shown.glob("*.parquet"))
        if self._own is not None:
            if kept:
                self._own.mark("failed" if error else "interrupted", error)
            else:
                shutil.rmtree(self._own.path, ignore_errors=True)
        return kept

    def close(self) -> None:
        """Let go of the folder."""
        self.folder.close()
