"""Losses, drift statistics and supports by name: every module in a folder of `opd_ray/objective/` is an entry.

To add an entry, add its file; the config uses the file's name. Names, and the constants that an entry declares, are
read without importing it, as setuptools reads ``attr:``, because entries import torch and the driver must not.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from opd_ray.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
_Choice = TypeVar("_Choice", bound=StrEnum)


class Needs(StrEnum):
    """What a loss reads of the student, declared as `NEEDS` by its module.

    `support_logits`: logits of the support's ids, up to a constant; `support_logprobs`: their log-probs over the whole
    vocabulary; `sampled_logprobs`: the sampled token's log-prob only.
    """

    support_logits = "support_logits"
    support_logprobs = "support_logprobs"
    sampled_logprobs = "sampled_logprobs"


@dataclass(frozen=True)
class Registry:
    """The entries of one folder, a path from the root of the repository."""

    folder: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all entries, sorted."""
        return tuple(sorted(module.name for module in pkgutil.iter_modules([str(_ROOT / self.folder)])))

    def load(self, name: str) -> Any:
        """Import the module of an entry, one of `names`; imports torch."""
        return importlib.import_module(f"{self.folder}/{name}".replace("/", "."))

    def declares(self, name: str, constant: str) -> bool:
        """Whether an entry's module assigns a text to `constant`."""
        return constant in _constants(_ROOT / self.folder / f"{name}.py")

    def declared(self, name: str, constant: str, choices: type[_Choice]) -> _Choice:
        """The value of an entry's constant; raises `ConfigError` where it is none of `choices`."""
        path = f"{self.folder}/{name}.py"
        found = _constants(_ROOT / path).get(constant)
        if found not in list(choices):
            raise ConfigError(
                f"{path} has {constant}={found!r}: write it as a plain string, one of {', '.join(choices)}"
            )
        return choices(found)


LOSSES = Registry("opd_ray/objective/losses")
STATISTICS = Registry("opd_ray/objective/statistics")
SUPPORTS = Registry("opd_ray/objective/supports")


@cache
def _constants(path: Path) -> dict[str, str]:
    """The texts that a module assigns to names at its top level."""
    return {
        target.id: node.value.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
