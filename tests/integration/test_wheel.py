"""The wheel in a clean environment: the console command works from any folder, with everything that it needs inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_ray.cli import VERBS

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("opd_ray", "conf", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True, slots=True)
class Installed:
    """A virtual environment with the wheel, and a folder that has nothing to do with the checkout."""

    wheel: Path
    python: Path
    folder: Path

    def run(self, *command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the folder."""
        # No PYTHONPATH: nothing of the checkout may be found but through the wheel.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # `local`: a Ray of its own, whatever else runs or once ran on this machine.
        env |= {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        program, *rest = command
        return subprocess.run(
            [str(self.python.parent / program), *rest],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built from a copy, as setuptools leaves folders behind; what the project depends on is the test's own."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(base), str(source)])
    shutil.rmtree(source)
    (wheel,) = base.glob("*.whl")
    environment = base / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = (environment / "lib").glob("python*/site-packages")
    # Folders that a .pth file names come after the environment's own, and their .pth files are not read: an editable
    # install of the checkout is not seen.
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in site_folders()))
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    call([*pip, "--python", str(python), *install])
    folder = base / "elsewhere"
    folder.mkdir()
    return Installed(wheel, python, folder)


def site_folders() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_package_its_configs_models_and_templates(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    expected = {f"opd_ray/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    for folder, pattern in (
        ("", "*.py"),
        ("tiny/assets", "*"),
        ("report/templates", "*"),
        ("comparison/templates", "*"),
    ):
        found = [path for path in (ROOT / "opd_ray" / folder).rglob(pattern) if path.is_file()]
        expected |= {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}
    assert expected | {"opd_ray/py.typed"} <= names
    assert any(name.endswith(".j2") for name in names)
    rest = {name for name in names - expected if not name.startswith("opd_ray-")}
    assert rest == {"opd_ray/py.typed"}


def test_what_is_imported_is_the_wheel(installed: Installed) -> None:
    done = installed.run("python", "-c", "import opd_ray, sys; print(opd_ray.__file__); print(sys.path)")
    place, path = done.stdout.splitlines()
    assert Path(place).is_relative_to(installed.python.parents[1])
    assert str(ROOT) not in path.replace("'", "").split(", ")


def test_the_command_names_its_verbs(installed: Installed) -> None:
    done = installed.run("opd-ray", "--help")
    assert done.returncode == 0 and all(f"\n  {verb}" in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(installed: Installed, verb: str) -> None:
    done = installed.run("opd-ray", verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "opd_ray" in done.stdout or f"opd-ray {verb}" in done.stdout
    assert "Traceback" not in done.stderr


def test_configs_come_from_the_wheel(installed: Installed) -> None:
    done = installed.run("opd-ray", "train", "+experiment=lsm_block64", "scale=tiny", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "experiment: lsm_block64" in done.stdout and "block_size: 64" in done.stdout
    assert list(installed.folder.iterdir()) == []


def test_wrong_input_is_one_line(installed: Installed) -> None:
    done = installed.run("opd-ray", "train", "+experiment=lsm_block65")
    assert done.returncode == 1 and done.stderr.startswith("opd_ray: error: ")
    assert "lsm_block65" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(installed.folder.iterdir()) == []


def test_a_multirun_goes_through_the_command(installed: Installed) -> None:
    """Both jobs are refused before anything starts, each by its own line."""
    done = installed.run("opd-ray", "train", "-m", "+experiment=lsm,opd", "num_steps=0", "runs_dir=sweep")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("num_steps=0") >= 2 and "2 of 2 jobs failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_from_another_folder(installed: Installed) -> None:
    """Real engines, the embedded models of the wheel, two steps."""
    done = installed.run(
        *("opd-ray", "train", "+experiment=lsm_block64", "num_steps=2", "evaluation.path=''"),
        *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "telemetry.wandb=disabled"),
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    run = (installed.folder / "runs" / "latest").resolve()
    assert run.parent == installed.folder / "runs"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert (run / "student" / "model.safetensors").is_file()
