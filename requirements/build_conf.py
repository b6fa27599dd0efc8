"""Build step that carries the top-level `conf/` folder into the wheel and the sdist.

A checkout keeps the configuration beside the package, where people look for it; an installed package has
no "beside", so the wheel holds a copy as `opd_ray/conf/`. Editable installs are left as they are.
"""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

SOURCE = Path("conf")
TARGET = Path("opd_ray") / "conf"


def conf_files() -> list[Path]:
    """Configuration files relative to the project root, hidden files left out."""
    return sorted(
        path
        for path in SOURCE.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    )


class BuildWithConf(build_py):
    """`build_py` that also copies `conf/` into the package."""

    def run(self) -> None:
        """Build the package, then add the configuration unless the install is editable."""
        super().run()
        if self.editable_mode:
            return
        for source, target in self._conf_pairs():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name what `run` writes, so that installers know every file."""
        outputs: list[str] = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return outputs + [str(target) for _, target in self._conf_pairs()]

    def get_source_files(self) -> list[str]:
        """Name what an sdist must hold for a wheel to be built from it."""
        files: list[str] = super().get_source_files()
        this_file = Path("requirements") / Path(__file__).name
        return files + [str(path) for path in [*conf_files(), this_file]]

    def _conf_pairs(self) -> list[tuple[Path, Path]]:
        root = Path(self.build_lib) / TARGET
        return [(path, root / path.relative_to(SOURCE)) for path in conf_files()]
