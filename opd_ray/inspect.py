"""Look into one trajectory of a run: ``python -m opd_ray.inspect RUN [trajectory=ID] [step=N] [use=N]``.

Writes one HTML page of the trajectory's text with the drift, gate weight, KL and version of every token, from what the
run recorded (``telemetry.record_trajectories``). Without an ID, the trajectory whose
drift was the largest is taken, and what else is there is listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_ray.errors import DataError, OpdError
from opd_ray.report.trajectory_page import trajectory_page
from opd_ray.run.trajectory_records import RECORDS_FOLDER, DumpEntry, read_settings, read_uses, record_entries

_NAMES = {"trajectory": "trajectory_id", "step": "step", "use": "use"}
_MAX_LISTED = 12


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 1 and one line on an error."""
    parser = argparse.ArgumentParser(
        prog="python -m opd_ray.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder (runs/latest is the newest finished one)")
    parser.add_argument("which", nargs="*", metavar="NAME=N", help="trajectory=ID, step=N, use=N: what is shown")
    parser.add_argument("--out", type=Path, help="page to write; default RUN/trajectories/trajectory-ID.html")
    chosen = parser.parse_args(arguments)
    try:
        entries = record_entries(chosen.run)
        wanted = _wanted(chosen.which)
        entry = choose(entries, wanted)
        out = chosen.out or chosen.run / RECORDS_FOLDER / f"trajectory-{entry.trajectory_id}.html"
        write_page(chosen.run, entries, entry, out)
    except OpdError as error:
        sys.stderr.write(f"opd_ray: error: {error}\n")
        sys.exit(1)
    if "trajectory_id" not in wanted:
        sys.stdout.write(overview(entries))
    sys.stdout.write(f"{out}\n")


def choose(entries: Sequence[DumpEntry], wanted: dict[str, int]) -> DumpEntry:
    """Of the uses that have the wanted `trajectory_id`, `step` and `use`, the one with the largest drift.

    Raises:
        DataError: there is none.
    """
    found = [entry for entry in entries if all(getattr(entry, name) == value for name, value in wanted.items())]
    if not found:
        what = " ".join(f"{key}={wanted[name]}" for key, name in _NAMES.items() if name in wanted)
        trajectory_ids = sorted({entry.trajectory_id for entry in entries})
        some = ", ".join(str(trajectory_id) for trajectory_id in trajectory_ids[:_MAX_LISTED]) + (
            ", ..." if len(trajectory_ids) > _MAX_LISTED else ""
        )
        steps = f"{min(entry.step for entry in entries)} to {max(entry.step for entry in entries)}"
        raise DataError(f"{what} was not recorded: there are the trajectories {some} of steps {steps}")
    return max(found, key=lambda entry: (entry.drift_abs_max, -entry.step, -entry.trajectory_id))


def write_page(run: Path, entries: Sequence[DumpEntry], opens_at: DumpEntry, out: Path) -> None:
    """Write the page of a trajectory with all of its uses, opened at one of them.

    Raises:
        DataError: a file is damaged, or the page cannot be written.
    """
    own = [entry for entry in entries if entry.trajectory_id == opens_at.trajectory_id]
    page = trajectory_page(
        read_uses(own), own.index(opens_at), run=run.resolve().name, settings=read_settings(opens_at.path)
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; choose another place with --out") from error


def overview(entries: Sequence[DumpEntry]) -> str:
    """A line for each recorded use, those with the largest drift first, and the rest counted."""
    ordered = sorted(entries, key=lambda entry: (-entry.drift_abs_max, entry.step, entry.trajectory_id))
    lines = [f"{'trajectory':>10} {'step':>6} {'use':>5} {'staleness':>9} {'tokens':>7} {'largest |drift|':>15}"]
    lines += [
        f"{e.trajectory_id:>10} {e.step:>6} {e.use:>5} {e.staleness:>9} {e.num_tokens:>7} {e.drift_abs_max:>15.3g}"
        for e in ordered[:_MAX_LISTED]
    ]
    rest = len(ordered) - _MAX_LISTED
    return "\n".join([*lines, *([f"and {rest} more, of smaller drift"] if rest > 0 else []), ""])


def _wanted(which: Sequence[str]) -> dict[str, int]:
    """Entry fields and their values from ``trajectory=ID step=N use=N``; raises `DataError`."""
    wanted = {}
    for word in which:
        key, _, value = word.partition("=")
        if key not in _NAMES or not value.isdecimal():
            raise DataError(f"{word!r} is not understood: give trajectory=ID, step=N or use=N")
        wanted[_NAMES[key]] = int(value)
    return wanted


if __name__ == "__main__":
    main()
