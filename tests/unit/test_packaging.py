"""The top level of the checkout, and what `pyproject.toml` says goes into a wheel (tests/integration builds one)."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from opd_ray.main import conf_dir

ROOT = Path(__file__).resolve().parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "opd_ray", "conf", "launch", "tests", "benchmarks"}


def test_the_top_level_is_complete_and_has_nothing_else() -> None:
    done = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this checkout has no git history")
    assert {name for name in done.stdout.split() if not name.startswith(".")} == TOP_LEVEL


def test_every_package_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "opd_ray").rglob("*.py")}
    listed = SETUPTOOLS["packages"]
    assert listed == sorted(set(listed))
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"opd_ray.conf"}


def test_every_other_file_of_a_package_is_package_data() -> None:
    mapped: dict[str, str] = SETUPTOOLS["package-dir"]
    carried: set[Path] = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / mapped.get(package, package.replace(".", "/"))
        carried |= {path for pattern in patterns for path in folder.glob(pattern)}
        # A trailing ** of setuptools takes files too; pathlib's takes folders only.
        carried |= {p for pattern in patterns if pattern.endswith("**") for p in folder.glob(f"{pattern}/*")}
    for root in (ROOT / "opd_ray", conf_dir()):
        files = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")}
        assert files <= carried
