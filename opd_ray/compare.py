"""Compare runs by variant over seeds: tables with verdicts, curves, what differs in config.

``python -m opd_ray.compare runs/ --out comparison`` writes `comparison.html` (one page that needs nothing else),
`comparison.md`, `comparison.json` and the pictures as PNG, and prints the short table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_ray.comparison.groups import NUM_RESAMPLES, compare_runs
from opd_ray.comparison.page import as_html, as_markdown, as_text
from opd_ray.comparison.plots import curve_picture, score_picture
from opd_ray.comparison.record import Comparison, as_json
from opd_ray.errors import DataError, OpdError
from opd_ray.storage.committed_folder import committed_folder

PAGE_FILE, MARKDOWN_FILE, JSON_FILE = "comparison.html", "comparison.md", "comparison.json"
_OWN_FILE = re.compile(r"comparison\.(html|md|json|png)|curves-[0-9]+\.png")
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry: returns after a complete comparison, else one line on stderr and exit code 1 or 130 (Ctrl-C)."""
    chosen = _parser().parse_args(arguments)
    try:
        check_out(chosen.out)
        comparison = compare_runs(chosen.runs, chosen.resamples)
        write_comparison(comparison, chosen.out)
    except OpdError as error:
        sys.stderr.write(f"opd_ray: error: {error}\n")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("opd_ray: interrupted; nothing was written\n")
        sys.exit(EXIT_INTERRUPTED)
    sys.stdout.write(f"{as_text(comparison)}\n\n{chosen.out / PAGE_FILE}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opd_ray.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a folder that holds some")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--resamples", type=_resamples, default=NUM_RESAMPLES, help="resamples of the bootstrap (default: %(default)s)"
    )
    return parser


def _resamples(text: str) -> int:
    number = int(text)
    if number < 100:
        raise ValueError(text)
    return number


def check_out(out: Path) -> None:
    """Refuse a place that holds anything but an older comparison, as it would be replaced; raises `DataError`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"--out {out} is a file: give a folder")
    foreign = sorted(path.name for path in out.iterdir() if not _OWN_FILE.fullmatch(path.name))
    if foreign:
        raise DataError(f"--out {out} holds {foreign[0]}, which would be lost: give a folder of its own")


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write page, Markdown, JSON and pictures into the folder `out`, all or none; an older comparison is replaced.

    Raises:
        DataError: `out` holds something else or cannot be written, or matplotlib is missing.
    """
    check_out(out)
    scores = score_picture(comparison)
    curves = [curve_picture(found, f"curves-{number}") for number, found in enumerate(comparison.conditions, 1)]
    texts = {
        PAGE_FILE: as_html(comparison, scores, curves),
        MARKDOWN_FILE: as_markdown(comparison, scores, curves),
        JSON_FILE: json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n",
    }
    try:
        with committed_folder(out.absolute()) as folder:
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            for picture in [scores, *curves] if scores else curves:
                (folder / f"{picture.name}.png").write_bytes(picture.png)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; choose another place with --out") from error


if __name__ == "__main__":
    main()
