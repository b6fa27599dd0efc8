"""`opd_ray.inspect`: which trajectory it shows, and one line for what cannot be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opd_ray.errors import DataError
from opd_ray.inspect import choose, main, overview
from opd_ray.run.trajectory_records import RECORDS_FOLDER, DumpEntry, write_records
from tests.unit.dumped import SETTINGS, made_use


def entry(trajectory_id: int, step: int, use: int, drift: float) -> DumpEntry:
    return DumpEntry(Path("f"), 0, trajectory_id, step, use, use - 1, 10, drift)


ENTRIES = [entry(0, 1, 1, 0.0), entry(8, 1, 1, 0.0), entry(0, 2, 2, 0.1), entry(8, 2, 2, 0.3), entry(16, 4, 2, 0.2)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, use in ((1, 1), (2, 2)):
        uses = [made_use(["4", "2", "\n"], trajectory_id=trajectory_id, step=step, use=use) for trajectory_id in (0, 8)]
        write_records(tmp_path / RECORDS_FOLDER, 0, uses, SETTINGS)
    return tmp_path


def test_without_a_wish_the_visit_of_the_largest_drift_is_shown() -> None:
    assert choose(ENTRIES, {}) is ENTRIES[3]
    assert choose(ENTRIES, {"trajectory_id": 0}) is ENTRIES[2]
    assert choose(ENTRIES, {"trajectory_id": 8, "use": 1}) is ENTRIES[1]
    assert choose(ENTRIES, {"step": 4}) is ENTRIES[4]
    assert choose(ENTRIES[:2], {}) is ENTRIES[0], "of equals the first"


def test_a_trajectory_that_was_not_dumped_is_answered_with_some_that_were() -> None:
    with pytest.raises(
        DataError, match=r"trajectory=5 was not recorded: there are the trajectories 0, 8, 16 of steps 1"
    ):
        choose(ENTRIES, {"trajectory_id": 5})
    with pytest.raises(DataError, match=r"trajectory=16 use=1 was not recorded"):
        choose(ENTRIES, {"trajectory_id": 16, "use": 1})


def test_the_overview_begins_with_the_largest_drift_and_counts_the_rest() -> None:
    lines = overview([*ENTRIES, *(entry(100 + number, 9, 1, 0.0) for number in range(10))]).splitlines()
    assert lines[1].split() == ["8", "2", "2", "1", "10", "0.3"]
    assert len(lines) == 14 and lines[-1] == "and 3 more, of smaller drift"


def test_the_command_writes_one_page_and_tells_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "trajectory=8"])
    told = capsys.readouterr().out
    assert told == f"{run / RECORDS_FOLDER / 'trajectory-8.html'}\n"
    page = Path(told.strip()).read_text(encoding="utf-8")
    assert "Trajectory 8" in page and '"use": 1' in page and '"use": 2' in page


def test_without_a_trajectory_the_command_lists_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "elsewhere" / "page.html"
    main([str(run), "--out", str(out)])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6 and told[-1] == str(out) and out.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trajectory=5"], "trajectory=5 was not recorded: there are the trajectories 0, 8 of steps 1 to 2"),
        (["trajectory=x"], "'trajectory=x' is not understood: give trajectory=ID, step=N or use=N"),
        (["slot=8"], "'slot=8' is not understood"),
        (["--out", "/dev/null/page.html"], "choose another place with --out"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(run), *arguments])
    told = capsys.readouterr()
    assert ended.value.code == 1 and told.out == ""
    assert told.err.startswith("opd_ray: error: ") and words in told.err and told.err.count("\n") == 1


def test_a_step_that_dumped_another_trajectory_under_the_same_slot_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made_use(["4", "2", "\n"], trajectory_id=0, step=3, response_token_ids=np.array([7, 7, 7]))
    write_records(run / RECORDS_FOLDER, 0, [other], SETTINGS)
    with pytest.raises(SystemExit):
        main([str(run), "trajectory=0"])
    assert "id 0 stands for several trajectories" in capsys.readouterr().err
