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
    "opd_ray.config": set(),
    "opd_ray.choices": set(),
    "opd_ray.types": set(),
    "opd_ray.objective": {"torch"},
    "opd_ray.replay.store": {"pyarrow"},
    "opd_ray.replay.codec": {"pyarrow"},
    "opd_ray.data.prompts": {"pyarrow"},
    "opd_ray.data.packing": set(),
    "opd_ray.evaluation.scoring": set(),
    "opd_ray.evaluation.samples": {"pyarrow"},
    "opd_ray.evaluate": {"hydra", "omegaconf", "pyarrow"},
    "opd_ray.telemetry.sinks": set(),
    "opd_ray.telemetry.ray_metrics": set(),
    "opd_ray.telemetry.progress": set(),
    "opd_ray.report.table": set(),
    "opd_ray.report.run_samples": {"pyarrow"},
    "opd_ray.report.comparison_page": {"pyarrow"},
    "opd_ray.report.gate_diagnostics": set(),
    "opd_ray.actors.learner.diagnostics": set(),
    "opd_ray.tiny.task": set(),
    "opd_ray.main": {"hydra", "omegaconf"},
    "opd_ray.planning.whole_plan": {"pyarrow"},
    "opd_ray.plan": {"hydra", "omegaconf", "pyarrow"},
    "opd_ray.inspect": {"pyarrow"},
    # The driver never imports torch.
    "opd_ray.session": {"ray", "pyarrow"},
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
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


SIBLINGS = ["objective", "replay", "data", "evaluation", "telemetry", "report", "tiny"]


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_do_not_know_each_other(package: str) -> None:
    allowed = {"evaluation": {"tiny"}}.get(package, set())
    for path in (PACKAGE / package).rglob("*.py"):
        for other in set(SIBLINGS) - {package} - allowed:
            assert not any(name.startswith(f"opd_ray.{other}") for name in imports_of(path)), (path, other)


def test_only_the_edges_know_ray_and_hydra() -> None:
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        roots = {name.split(".")[0] for name in imports_of(path)}
        may_ray = place.startswith("actors/") or place in ("session.py", "controller.py", "telemetry/ray_metrics.py")
        assert "ray" not in roots or may_ray, place
        assert not roots & {"hydra", "omegaconf"} or place == "main.py", place


def test_groups_do_not_know_each_other() -> None:
    roles = {"rollout", "teacher", "learner"}
    for role in roles:
        place = PACKAGE / "actors" / role
        for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            for other in roles - {role}:
                assert not any(name.startswith(f"opd_ray.actors.{other}") for name in imports_of(path)), (path, other)


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
    assert len(path.read_text().splitlines()) <= 320
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
