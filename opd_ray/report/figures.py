"""Shared parts of the plots of a run: reading its metrics, a figure, axes. matplotlib is imported only to draw."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_ray.errors import DataError, OpdError

INK, GRID, FAINT = "#2b2b2b", "#e4e4e4", "#9a9a9a"
COLORS = ("#1f5fa8", "#d9822b", "#3a8f5c", "#8a4fa3")


def plot_command(
    prog: str, description: str | None, plot: Callable[[Path, Path], None], arguments: Sequence[str] | None
) -> int:
    """Command line ``RUN --out PICTURE`` around ``plot(run, out)``; returns the exit code, errors are one line."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("run", type=Path, help="run folder (runs/latest is the newest)")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.png, .svg or .pdf)")
    chosen = parser.parse_args(arguments)
    try:
        plot(chosen.run, chosen.out)
    except OpdError as error:
        sys.stderr.write(f"opd_ray: error: {error}\n")
        return 1
    sys.stdout.write(f"{chosen.out}\n")
    return 0


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the step and the values, by key, of each line of `metrics.jsonl`; one without an end is not there yet.

    Raises:
        DataError: the file is missing, or not made of JSON objects with a step.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    return
                try:
                    record = json.loads(line)
                    step = int(record.pop("step"))
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: not a JSON object with a step") from error
                record.pop("time", None)
                yield step, record
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a run folder") from error


def new_figure(title: str, width: float, height: float) -> Any:
    """A matplotlib figure of that size in inches; raises `DataError` where matplotlib is missing."""
    try:
        figure_type = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise DataError("plotting needs matplotlib: pip install matplotlib") from error
    figure = figure_type(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def save_figure(figure: Any, out: Path) -> None:
    """Write the picture; raises `DataError` where it cannot be written."""
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {out}: {error}") from error


def draw_line(axes: Any, values: Mapping[int, float], color: str, label: str, **style: Any) -> None:
    """Values by step as a line; one alone as a point."""
    steps = sorted(values)
    style = {"marker": "o", "markersize": 3, **style} if len(steps) == 1 else style
    axes.plot(steps, [values[step] for step in steps], **{"color": color, "linewidth": 1.5, "label": label, **style})


def finish_axes(axes: Any, title: str, unit: str, drawn: bool, x_label: str = "step") -> None:
    """Title, grid and legend; axes on which nothing was `drawn` say so."""
    axes.set_title(title + (f"  ({unit})" if unit else ""), fontsize=9.5, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=8, color=FAINT)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    if x_label == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if not drawn:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", fontsize=9, color=FAINT)
    elif axes.get_legend_handles_labels()[1]:
        # Above the axes, where no line runs.
        axes.legend(
            frameon=False,
            fontsize=8,
            ncols=4,
            loc="lower right",
            bbox_to_anchor=(1.01, 0.99),
            borderaxespad=0.2,
            handlelength=1.2,
            handletextpad=0.4,
            columnspacing=1.0,
        )
