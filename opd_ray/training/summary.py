"""The end of a run: `summary.json`, and the words on the terminal."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_ray.config.schema import RunConfig
from opd_ray.report.table import results_table
from opd_ray.training.learner_loop import RunTotals


@dataclass(slots=True)
class Evaluations:
    """`EvaluationResult.as_dict` by moment; None where there was none."""

    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    teacher: dict[str, float] | None = None


def summary(
    cfg: RunConfig, totals: RunTotals, evaluations: Evaluations, ledger: dict[str, int], wall_s: float
) -> dict[str, Any]:
    """`summary.json`; `wall_s` and `training_s` are those of this process, also where it continued with a run."""
    return {
        "experiment": cfg.experiment,
        "scale": cfg.scale,
        "seed": cfg.seed,
        "steps": totals.steps,
        "wall_s": wall_s,
        "training_s": totals.wall_s,
        "tokens_per_s": totals.trained_tokens / totals.wall_s if totals.wall_s else 0.0,
        "eval": asdict(evaluations),
        "ledger": ledger,
    }


def closing_words(folder: Path, evaluations: Evaluations) -> str:
    """The table of results, and what to type next."""
    table = results_table(**asdict(evaluations))
    latest, python = shown(folder.parent / "latest"), shown(Path(sys.executable))
    return (
        f"\n{table}\n\n"
        f"run folder:     {folder}\n"
        f"student:        {folder / 'student'} (for transformers and vLLM)\n"
        f"look at it:     {python} -m opd_ray.report.learning_curve {latest} --out curve.png\n"
        f"next, no gate:  {python} -m opd_ray.main +experiment=lsm\n"
    )


def shown(path: Path) -> str:
    """A path as it can be typed here: relative where it lies below the current folder."""
    # Not resolved: a virtual environment's interpreter is a link that must be called by its own name.
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
