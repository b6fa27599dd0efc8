"""Compare runs by variant over seeds: reads their folders, gives the figures of `comparison.record`.

As a library, for a study: ``as_json(compare_runs([Path("runs")]))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from opd_ray.comparison import variants
from opd_ray.comparison.record import (
    MEAN,
    Comparison,
    ConditionResult,
    ConfigDifference,
    Difference,
    LeftOut,
    Relation,
    VariantResult,
    families,
)
from opd_ray.comparison.run_figures import curves_of, figures_of, read_figures
from opd_ray.comparison.run_record import RunRecord, find_runs, read_run
from opd_ray.comparison.run_samples import RunSamples, read_run_samples
from opd_ray.comparison.scores import ScoreBook, score_book
from opd_ray.comparison.variants import Group
from opd_ray.errors import DataError
from opd_ray.evaluation.significance import ALPHA, holm

NUM_RESAMPLES = 10_000


def compare_runs(paths: Sequence[Path], num_resamples: int = NUM_RESAMPLES) -> Comparison:
    """Compare the finished runs among and below `paths`.

    Args:
        paths: run folders, or folders that hold some.
        num_resamples: resamples of the bootstrap, at least 2.

    Raises:
        DataError: a path is not there, no run is finished, or a run's metrics or samples are damaged.
    """
    folders = find_runs(paths)
    finished, left_out = _finished_runs(folders)
    if not finished:
        raise DataError(
            f"none of the {len(folders)} runs is finished ({left_out[0].run}: {left_out[0].why}): "
            "wait for one, or give others"
        )
    groups, replaced = variants.group_runs(finished)
    left_out += [LeftOut(run.path.name, "a newer run has the same config and seed") for run in replaced]
    kept = [run for group in groups for run in group.runs.values()]
    comparison = Comparison(
        num_runs=len(kept),
        conditions=[],
        config_differences=_config_differences(kept),
        left_out=left_out,
        notes=[],
        num_resamples=num_resamples,
    )
    by_condition = groupby(groups, key=lambda group: group.condition)
    for number, (condition, members) in enumerate(by_condition, 1):
        name = variants.condition_name(condition, number)
        result, notes = _condition_result(name, dict(condition), list(members), num_resamples)
        comparison.conditions.append(result)
        comparison.notes += [f"{result.name}: {note}" if result.name else note for note in notes]
    _apply_holm(comparison)
    return comparison


def _finished_runs(folders: Sequence[Path]) -> tuple[list[RunRecord], list[LeftOut]]:
    finished, left_out = [], []
    for folder in folders:
        try:
            run = read_run(folder)
        except DataError as error:
            left_out.append(LeftOut(folder.name, str(error)))
            continue
        if run.status == "finished":
            finished.append(run)
        else:
            left_out.append(LeftOut(folder.name, f"{run.status}: {run.error}" if run.error else run.status))
    return finished, left_out


def _config_differences(runs: Sequence[RunRecord]) -> list[ConfigDifference]:
    found = []
    for key, values in variants.differing(run.config for run in runs).items():
        counts = {value: sum(run.config.get(key, variants.ABSENT) == value for run in runs) for value in values}
        found.append(ConfigDifference(key, variants.role_of(key), counts))
    return found


def _condition_result(
    name: str, settings: dict[str, str], groups: list[Group], num_resamples: int
) -> tuple[ConditionResult, list[str]]:
    samples = {group.name: {seed: read_run_samples(run.path) for seed, run in group.runs.items()} for group in groups}
    book = score_book(samples, num_resamples)
    names = [*book.benchmarks, *([MEAN] if len(book.benchmarks) > 1 else [])]
    result = ConditionResult(
        name=name,
        settings=settings,
        benchmarks=book.benchmarks,
        metrics=book.metrics,
        variants=[_variant_result(group, groups, book, names) for group in groups],
    )
    for group in groups:
        base, imitated = variants.base_of(group, groups), variants.imitated_by(group, groups)
        if base:
            result.differences += _differences(book, (group.name, base.name), names, "base")
        if imitated:
            result.differences += _differences(book, (imitated.name, group.name), names, "control")
    return result, book.notes + _without_samples(samples, book)


def _variant_result(group: Group, groups: list[Group], book: ScoreBook, names: list[str]) -> VariantResult:
    base = variants.base_of(group, groups)
    read = [read_figures(run) for _, run in sorted(group.runs.items())]
    result = VariantResult(
        name=group.name,
        gate=group.gate,
        seeds=sorted(group.runs),
        runs=[run.path.name for _, run in sorted(group.runs.items())],
        base=base.name if base else None,
        figures=figures_of([*(run.figures for run in read), *book.answers.get(group.name, [])]),
        curves=curves_of(read),
        remark="" if base or group.gate == variants.OFF else "its ungated base is not among the runs",
    )
    for name in names:
        found = {metric: book.estimate(group.name, metric, name) for metric in book.metrics}
        result.scores[name] = {metric: estimate for metric, estimate in found.items() if estimate is not None}
    if base and not set(group.runs) & set(base.runs):
        result.remark = f"no seed in common with {base.name}"
    return result


def _differences(
    book: ScoreBook, names: tuple[str, str], benchmarks: list[str], relation: Relation
) -> list[Difference]:
    found = []
    for metric in book.metrics:
        for benchmark in benchmarks:
            difference = book.difference(*names, metric, benchmark)
            if difference is not None:
                found.append(difference.record(names, relation, metric, benchmark))
    return found


def _without_samples(samples: dict[str, dict[int, RunSamples]], book: ScoreBook) -> list[str]:
    """A note for each variant with runs that are not in the table."""
    notes = []
    for variant, runs in samples.items():
        empty = sorted(seed for seed, found in runs.items() if not found.after and not found.student)
        if empty and len(empty) == len(runs):
            notes.append(f"{variant}: no samples of an evaluation, so no scores")
        elif empty:
            notes.append(f"{variant}: no samples of an evaluation for seed {', '.join(map(str, empty))}")
        for name in book.benchmarks:
            have = book.of(variant, book.metrics[0], name)[0]
            missing = sorted(set(runs) - set(empty) - set(have))
            if missing:
                notes.append(f"{variant}: no samples of {name} for seed {', '.join(map(str, missing))}")
    return notes


def _apply_holm(comparison: Comparison) -> None:
    """Mark which of the headline verdicts stay when those of one kind and metric are judged together."""
    kept: dict[int, bool] = {}
    for family in families(comparison.headlines()).values():
        kept |= zip(map(id, family), holm([found.p_value for found in family], ALPHA), strict=True)
    for condition in comparison.conditions:
        condition.differences = [
            replace(found, survives_holm=kept[id(found)] and found.verdict != "cannot tell")
            if id(found) in kept
            else found
            for found in condition.differences
        ]
