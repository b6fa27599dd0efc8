"""The house rules: who may import what, how long files and functions may be, and errors that travel."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from opd_ray import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "opd_ray"
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "wandb", "hydra", "omegaconf", "pyarrow"}

# What a fresh interpreter may hold of HEAVY after importing a module.
ALLOWED = {
    "opd_ray": set(),
    "opd_ray.config.schema": set(),
    "opd_ray.config.choices": set(),
    "opd_ray.types": set(),
    "opd_ray.objective": {"torch"},
    "opd_ray.replay.store": {"pyarrow"},
    "opd_ray.trajectory.codec": {"pyarrow"},
    "opd_ray.data.prompts": {"pyarrow"},
    "opd_ray.data.packing": set(),
    "opd_ray.evaluation.scoring": set(),
    "opd_ray.evaluation.samples": {"pyarrow"},
    "opd_ray.evaluate": {"hydra", "omegaconf", "pyarrow"},
    "opd_ray.telemetry.sinks": set(),
    "opd_ray.telemetry.ray_metrics": set(),
    "opd_ray.telemetry.progress": set(),
    "opd_ray.report.table": set(),
    "opd_ray.comparison.run_samples": {"pyarrow"},
    "opd_ray.comparison.page": {"pyarrow"},
    "opd_ray.report.gate_diagnostics": set(),
    "opd_ray.learner.diagnostics": set(),
    "opd_ray.tiny.task": set(),
    "opd_ray.main": {"hydra", "omegaconf"},
    "opd_ray.planning.whole_plan": {"pyarrow"},
    "opd_ray.plan": {"hydra", "omegaconf", "pyarrow"},
    "opd_ray.inspect": {"pyarrow"},
    # The driver never imports torch.
    "opd_ray.training.session": {"ray", "pyarrow"},
}


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_of_a_fresh_interpreter(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert set(ast.literal_eval(done.stdout)) <= ALLOWED[module]


def imports_of(path: Path) -> set[str]:
    """`opd_ray` modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


ALWAYS = {"types", "errors", "config", "storage"}

# Which packages each package may import beside ALWAYS: arrows point down only.
ARROWS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "config": set(),
    "storage": set(),
    "objective": set(),
    "trajectory": set(),
    "replay": {"trajectory"},
    "data": set(),
    "tiny": set(),
    "telemetry": set(),
    "run": set(),
    "evaluation": {"tiny"},
    "report": {"run"},
    "comparison": {"evaluation", "report"},
    "planning": {"trajectory"},
    "cluster": {"planning", "replay"},
    "models": {"data"},
    "rollout": {"cluster", "models", "planning", "trajectory", "data", "evaluation"},
    "teacher": {"cluster", "models", "planning", "trajectory", "data"},
    "learner": {"cluster", "models", "planning", "trajectory", "data", "objective", "replay", "run"},
}
LOWEST = {
    "types": set(),
    "errors": set(),
    "config": {"types", "errors"},
    "storage": {"errors"},
    "objective": {"config"},
}
VERBS = {"main", "evaluate", "plan", "compare", "inspect", "cli"}


def package_of(path: Path) -> str:
    place = path.relative_to(PACKAGE)
    return place.parts[0] if len(place.parts) > 1 else place.stem


def packages_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imports_of(path)]
    return {name[1] for name in names if name[0] == "opd_ray" and len(name) > 1} - {package_of(path)}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_down(package: str) -> None:
    allowed = LOWEST.get(package, ALWAYS | ARROWS[package])
    for path in sorted(PACKAGE.rglob("*.py")):
        if package_of(path) == package:
            assert packages_imported(path) <= allowed, path


def test_every_package_has_its_place() -> None:
    assert {package_of(path) for path in PACKAGE.rglob("*.py")} == {*ARROWS, *VERBS, "training", "__init__"}


def test_no_package_imports_a_verb() -> None:
    for path in PACKAGE.rglob("*.py"):
        if package_of(path) not in VERBS:
            assert not packages_imported(path) & VERBS, path


def test_only_the_edges_know_ray_and_hydra() -> None:
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        roots = {name.split(".")[0] for name in imports_of(path)}
        may_ray = package_of(path) in ("cluster", "rollout", "teacher", "learner", "training")
        assert "ray" not in roots or may_ray or place == "telemetry/ray_metrics.py", place
        assert not roots & {"hydra", "omegaconf"} or place == "main.py", place


def functions(path: Path) -> list[tuple[str, int]]:
    """Name and lines of each function, docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0] if ast.get_docstring(node) else None
            doc_lines = doc.end_lineno - doc.lineno + 1 if doc is not None and doc.end_lineno else 0
            found.append((node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - doc_lines))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lengths(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert [(name, lines) for name, lines in functions(path) if lines > 60] == []
    assert "util" not in path.name


@pytest.mark.parametrize(
    "error",
    [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.OpdError)],
)
def test_errors_travel_and_are_one_line(error: type[errors.OpdError]) -> None:
    original = error("two\nlines:  give a value >= 2")
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error
    assert str(copy) == str(original) == "two lines: give a value >= 2"
