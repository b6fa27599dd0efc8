"""Imports the other projects' own code from their installed packages: nothing of them is copied here.

`bash launch/oracles.sh` makes an environment that has them; elsewhere the tests skip. NeMo-RL, whose top-K
losses would be one more reference, is not on PyPI in a usable version: `nemo-rl` 0.0.0 is a placeholder
without code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import pytest


def oracle(name: str) -> ModuleType:
    """Import module `name`; skip the calling test file if its package is not installed."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        reason = f"{package} is not installed: bash launch/oracles.sh"
        if os.environ.get("OPD_RAY_ORACLES") == "required":
            raise ModuleNotFoundError(reason)
        pytest.skip(reason, allow_module_level=True)
    with warnings.catch_warnings():
        # TRL warns that its distillation losses are experimental, and of each vLLM newer than itself.
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
