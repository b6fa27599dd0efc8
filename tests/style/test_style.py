"""Style and types of the whole project, as tests, so that they run next to the others and end in the same summary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = [folder for folder in ("opd_ray", "tests", "benchmarks") if (ROOT / folder).is_dir()]
COMMANDS = {
    "mypy": ["mypy", "--no-error-summary", *TYPED],
    "ruff check": ["ruff", "check", "--quiet", "."],
    "ruff format": ["ruff", "format", "--check", "--quiet", "."],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMMANDS)
def test_style_and_types(name: str) -> None:
    command = [sys.executable, "-m", *COMMANDS[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
