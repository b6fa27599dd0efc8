"""The table of `opd_ray.evaluate`: a line a benchmark, and their mean."""

from __future__ import annotations

from collections.abc import Mapping

from opd_ray.report.table import samples_per_problem

Figures = Mapping[str, float]
"""One benchmark's figures as `evaluation.EvaluationResult.as_dict` gives them."""

_SHARES = {"truncated": "cut off", "no_answer": "no answer", "unparseable": "unreadable", "timeout": "timeout"}


def benchmark_table(results: Mapping[str, Figures]) -> str:
    """Return the table as plain text, at least one benchmark, without control codes or a final line end.

    pass@n and avg@n come with their 95 % intervals; shares are of all samples. The mean counts every benchmark alike.
    """
    n = samples_per_problem(next(iter(results.values())))
    width = max(9, *(len(name) for name in results))
    names = "".join(f"{name:>12}" for name in _SHARES.values())
    head = f"{'':<{width}}{'problems':>10}{f'pass@{n}':>9}{'95 %':>15}{f'avg@{n}':>9}{'95 %':>15}{names}{'tokens':>9}"
    lines = [head, *(_line(name, figures, n, width) for name, figures in results.items())]
    if len(results) > 1:
        means = [
            sum(found[key] for found in results.values()) / len(results) for key in (f"pass_at_{n}", f"avg_at_{n}")
        ]
        lines.append(f"{'mean':<{width}}{'':>10}{means[0]:>9.3f}{'':>15}{means[1]:>9.3f}")
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, figures: Figures, n: int, width: int) -> str:
    cells = [f"{name:<{width}}{figures['num_problems']:>10.0f}"]
    for key in (f"pass_at_{n}", f"avg_at_{n}"):
        between = f"{figures[f'{key}_low']:.3f}-{figures[f'{key}_high']:.3f}"
        cells.append(f"{figures[key]:>9.3f}{between:>15}")
    cells += [f"{100 * figures[f'{share}_share']:>10.1f} %" for share in _SHARES]
    return "".join([*cells, f"{figures['mean_tokens']:>9.0f}"])
