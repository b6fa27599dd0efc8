"""Run a program in .venv-isolated, which holds packages that .venv must not: Triton, and W&B's `sweeps` with SciPy."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-isolated" / "bin" / "python"


def run_isolated(program: str, stdin: str = "", **environment: str) -> str:
    """Return what `program` prints; it sees this checkout. Skips the test where the environment was not made."""
    if not PYTHON.exists():
        pytest.skip("there is no .venv-isolated: bash launch/extra_environment.sh isolated")
    done = subprocess.run(
        [str(PYTHON), "-c", program],
        input=stdin,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
