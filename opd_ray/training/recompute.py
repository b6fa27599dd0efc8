"""New verdicts for samples that are there already: nothing is sampled, no engine is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from opd_ray.errors import DataError
from opd_ray.evaluation.grading import GradedSample, grade
from opd_ray.evaluation.samples import SamplesHeader, read_header, read_samples, to_graded, write_samples
from opd_ray.evaluation.scoring import EvaluationResult, sum_up
from opd_ray.evaluation.verifier import Verification
from opd_ray.report.benchmark_table import benchmark_table
from opd_ray.run.folder import SUMMARY_FILE, RunFolder
from opd_ray.telemetry.progress import ProgressLine
from opd_ray.training.evaluated_model import STUDENT
from opd_ray.training.evaluator import FOLDER
from opd_ray.training.interrupts import run_interruptible


def recompute(where: str, settings: Verification, *, show_progress: bool = True) -> int:
    """Verify again what a file, a folder of results or a run folder holds; returns how many verdicts changed.

    Files are rewritten one by one, each whole, and the figures of the summaries beside them follow. Raises `DataError`
    before anything is written where one of the files cannot be read.
    """
    files = _files(Path(where).expanduser())
    line = ProgressLine(sys.stderr, show_progress)
    tables = {path: read_samples(path) for path in files}
    found = {path: (read_header(table, path), to_graded(table, path)) for path, table in tables.items()}
    num_changed = num_samples = 0
    for path, (header, samples) in found.items():
        again = run_interruptible(_graded_again(path.stem, header, samples, settings, line))
        changed = sum(_changed(samples[name], again[name]) for name in samples)
        write_samples(path, again, header)
        results = {name: sum_up(graded) for name, graded in again.items()}
        _update_summaries(path, results)
        num_changed += changed
        num_samples += sum(map(len, samples.values()))
        table = benchmark_table({name: result.as_dict() for name, result in results.items()})
        sys.stdout.write(f"{path}: {changed} verdicts changed\n{table}\n\n")
    line.end()
    sys.stdout.write(f"{num_changed} of {num_samples} verdicts changed\n")
    return num_changed


def _files(where: Path) -> list[Path]:
    if where.is_file():
        return [where]
    files = sorted(where.glob("*.parquet")) or sorted((where / FOLDER).glob("*.parquet"))
    if not files:
        raise DataError(f"recompute={where}: there are no samples: give a file, or a folder that an evaluation wrote")
    return files


async def _graded_again(
    label: str,
    header: SamplesHeader,
    samples: dict[str, list[GradedSample]],
    settings: Verification,
    line: ProgressLine,
) -> dict[str, list[GradedSample]]:
    again = {}
    for name, graded in samples.items():
        if name not in header.answer_format:
            raise DataError(f"{label}: the answer format of {name} is not in the file: evaluate again")
        again[name] = await grade(
            graded,
            header.answer_format[name],
            settings,
            lambda done, total: line.show(f"{label}: verifying", done, total, "answers"),
        )
    return again


def _changed(before: list[GradedSample], after: list[GradedSample]) -> int:
    return sum(old.verdict is not new.verdict for old, new in zip(before, after, strict=True))


def _update_summaries(path: Path, results: dict[str, EvaluationResult]) -> None:
    """Put new figures in the place of the old ones, in whichever summary has them; how long it took stays."""
    for file in (path.with_name(SUMMARY_FILE), path.with_name(f"{STUDENT}-{SUMMARY_FILE}")):
        _update(file, ("benchmarks",), {name: result.as_dict(every_k=True) for name, result in results.items()})
    if path.parent.name == FOLDER:
        for result in results.values():
            _update(path.parent.parent / SUMMARY_FILE, ("eval",), {path.stem: result.as_dict()})


def _update(file: Path, keys: tuple[str, ...], figures: dict[str, dict[str, float]]) -> None:
    if not file.is_file():
        return
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    place: Any = summary
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        return
    for name in figures.keys() & {name for name, old in place.items() if isinstance(old, dict)}:
        place[name] |= figures[name] | {"wall_s": place[name].get("wall_s", 0.0)}
    RunFolder(file.parent).write_json(file.name, summary)
