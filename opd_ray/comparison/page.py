"""A comparison as a self-contained HTML page, and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_ray.comparison import tables
from opd_ray.comparison.plots import Picture
from opd_ray.comparison.record import Comparison, ConditionResult
from opd_ray.comparison.tables import Table
from opd_ray.comparison.words import answer, method

TITLE = "Comparison of runs"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Section:
    """A condition: what is shown at once, and the tables that are folded away."""

    title: str
    scores: list[Table]
    verdicts: list[Table]
    picture: Picture | None
    more: list[Table]


def sections(comparison: Comparison, curves: Sequence[Picture]) -> list[Section]:
    """One a condition, in order; `curves` has its picture, if it was drawn, in the same order."""
    pictures: list[Picture | None] = [*curves]
    pictures += [None] * (len(comparison.conditions) - len(pictures))
    return [_section(condition, picture) for condition, picture in zip(comparison.conditions, pictures, strict=True)]


def _section(condition: ConditionResult, picture: Picture | None) -> Section:
    scores = [tables.score_table(condition, metric) for metric in condition.metrics or ["score"]]
    against_base = [found for found in condition.headlines() if found.relation == "base"]
    controls = [found for found in condition.headlines() if found.relation == "control"]
    verdicts = []
    if against_base:
        verdicts.append(tables.verdict_table("against the ungated base", against_base))
    if controls:
        verdicts.append(tables.verdict_table("gates against their controls", controls))
    more = []
    if len(condition.benchmarks) > 1:
        rest = [found for found in condition.differences if found.benchmark != condition.headline]
        more.append(tables.verdict_table("differences by benchmark", rest, show_benchmark=True))
    more += [tables.answer_table(condition)] if condition.benchmarks else []
    more += [tables.gate_table(condition), tables.cost_table(condition), tables.runs_table(condition)]
    more += [tables.settings_table(condition)] if condition.settings else []
    return Section(condition.name or "all runs", scores, verdicts, picture, more)


def as_html(comparison: Comparison, scores: Picture | None, curves: Sequence[Picture]) -> str:
    """The page; pictures are inside, and nothing is loaded."""
    from jinja2 import Environment, FileSystemLoader  # 0.1 s to import, needed only here

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("comparison.html.j2").render(
        title=TITLE,
        comparison=comparison,
        answer=answer(comparison),
        sections=sections(comparison, curves),
        scores=scores,
        config=tables.config_table(comparison),
        left_out=tables.left_out_table(comparison),
        method=method(comparison),
    )


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode()


def as_markdown(comparison: Comparison, scores: Picture | None, curves: Sequence[Picture]) -> str:
    """The same tables as Markdown; pictures are named by file beside it."""
    parts = [f"# {TITLE}", *answer(comparison)]
    parts += [f"![{scores.title}]({scores.name}.png)"] if scores else []
    parts += _bullets("Notes", comparison.notes)
    for section in sections(comparison, curves):
        parts.append(f"## {section.title}")
        parts += [part for table in [*section.scores, *section.verdicts] for part in _titled(table)]
        parts += [f"![{section.picture.title}]({section.picture.name}.png)"] if section.picture else []
        parts += [part for table in section.more for part in _titled(table)]
    for table in (tables.config_table(comparison), tables.left_out_table(comparison)):
        parts += _titled(table, level=2) if table.rows else []
    parts += _bullets("How to read this", method(comparison))
    return "\n\n".join(parts) + "\n"


def _titled(table: Table, level: int = 3) -> list[str]:
    return [f"{'#' * level} {table.title}", tables.as_markdown(table), *([table.note] if table.note else [])]


def _bullets(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []


def as_text(comparison: Comparison) -> str:
    """For the terminal: one short table a condition, the notes, and the answer."""
    parts = []
    for condition in comparison.conditions:
        table = tables.short_table(condition)
        parts.append("\n".join([*([condition.name] if condition.name else []), tables.as_text(table)]))
    parts += ["\n".join(comparison.notes)] if comparison.notes else []
    parts += [f"{tables.count_of_runs(len(comparison.left_out))} left out"] if comparison.left_out else []
    return "\n\n".join([*parts, "\n".join(answer(comparison))])
