"""Dumped trajectories: what is written is what is read, whole or not at all; a run that goes back drops its future."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_ray.config.choices import WandbMode
from opd_ray.config.schema import TelemetryConfig
from opd_ray.errors import DataError, RunFolderError
from opd_ray.run.folder import RunFolder
from opd_ray.run.trajectory_records import (
    RECORDS_FOLDER,
    VERSION_KEY,
    RecordedUse,
    drop_after,
    read_settings,
    read_uses,
    record_entries,
    record_file,
    write_records,
)
from opd_ray.telemetry.progress import Progress
from opd_ray.training.outputs import RunOutputs
from tests.unit.dumped import SETTINGS, made_use

PIECES = ["6", " times", " 7", "\n", "", "é", " is 42"]


def dumped(run: Path, *uses: RecordedUse, rank: int = 0) -> Path:
    return write_records(run / RECORDS_FOLDER, rank, uses, SETTINGS)


def test_a_visit_is_read_as_it_was_written(tmp_path: Path) -> None:
    drift = np.array([0.5, np.nan, -0.25, 0, 0, 0, 0], dtype=np.float32)
    uses = [made_use(PIECES, trajectory_id=4, drift=drift), made_use(["a"], trajectory_id=2, top_k=4)]
    dumped(tmp_path, *uses)
    found = read_uses(record_entries(tmp_path))
    assert [use.trajectory_id for use in found] == [2, 4], "in order of step and trajectory"
    for use, expected in zip(found, reversed(uses), strict=True):
        for field in fields(RecordedUse):
            have, want = getattr(use, field.name), getattr(expected, field.name)
            if isinstance(want, np.ndarray):
                assert have.dtype == want.dtype and have.shape == want.shape, field.name
                np.testing.assert_array_equal(have, want, err_msg=field.name)
            else:
                assert have == want, field.name


def test_the_overview_tells_the_largest_measured_drift(tmp_path: Path) -> None:
    segment_drift = np.array([0.1, -0.4, np.nan], dtype=np.float32)
    path = dumped(tmp_path, made_use(PIECES, segment_drift=segment_drift))
    (entry,) = record_entries(tmp_path)
    assert (entry.path, entry.row, entry.trajectory_id, entry.step, entry.use, entry.num_tokens) == (
        path,
        0,
        3,
        2,
        2,
        7,
    )
    assert entry.drift_abs_max == pytest.approx(0.4)
    assert read_settings(path) == SETTINGS


def test_the_ranks_of_a_step_are_read_together(tmp_path: Path) -> None:
    dumped(tmp_path, made_use(PIECES, trajectory_id=9, step=11), rank=1)
    dumped(tmp_path, made_use(PIECES, trajectory_id=5, step=11), rank=0)
    dumped(tmp_path, made_use(PIECES, trajectory_id=7, step=2), rank=0)
    assert [(entry.step, entry.trajectory_id) for entry in record_entries(tmp_path)] == [(2, 7), (11, 5), (11, 9)]


def test_a_step_done_again_replaces_its_file(tmp_path: Path) -> None:
    dumped(tmp_path, made_use(PIECES, trajectory_id=1))
    dumped(tmp_path, made_use(PIECES, trajectory_id=2))
    assert [entry.trajectory_id for entry in record_entries(tmp_path)] == [2]
    assert [path.name for path in (tmp_path / RECORDS_FOLDER).iterdir()] == ["step-000002-rank-0.parquet"]


def test_a_write_that_fails_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    record_file(tmp_path / RECORDS_FOLDER, 2, 0).mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"telemetry\.record_trajectories=0"):
        dumped(tmp_path, made_use(PIECES))
    assert [path.name for path in (tmp_path / RECORDS_FOLDER).iterdir()] == ["step-000002-rank-0.parquet"]


def test_what_lies_beyond_a_step_is_dropped_and_half_written_files_with_it(tmp_path: Path) -> None:
    for step in (2, 3, 10):
        dumped(tmp_path, made_use(PIECES, step=step))
    folder = tmp_path / RECORDS_FOLDER
    (folder / ".step-000003-rank-0.parquet.0123.tmp").write_bytes(b"half")
    (folder / "trajectory-3.html").write_text("a page of the user's")
    drop_after(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000002-rank-0.parquet",
        "step-000003-rank-0.parquet",
        "trajectory-3.html",
    ]
    drop_after(tmp_path / "nowhere", 0)


def test_a_run_that_goes_back_to_a_checkpoint_drops_the_dump_of_the_steps_after_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    cfg = TelemetryConfig(wandb=WandbMode.disabled, progress=False)
    with Progress(3, open("/dev/null", "w"), False) as progress:  # noqa: SIM115
        outputs = RunOutputs(cfg, folder, {}, progress)
        notes = outputs.notes()
        for step in (1, 2, 3):
            dumped(folder.path, made_use(PIECES, step=step))
        outputs.roll_back_to(notes, 1)
        outputs.close()
    folder.close()
    assert [entry.step for entry in record_entries(folder.path)] == [1]


def test_a_run_without_a_dump_names_the_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no recorded trajectories: run it with telemetry\.record_trajectories=1"):
        record_entries(tmp_path)
    with pytest.raises(DataError, match="is no folder: give a run folder"):
        record_entries(tmp_path / "typo")


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    path = dumped(tmp_path, made_use(PIECES))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"no parquet at all", "empty": b""}[damage])
    with pytest.raises(DataError, match=r"step-000002-rank-0\.parquet is damaged"):
        record_entries(tmp_path)


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """As 0.4.0 wrote it: with slots and visits."""
    use = made_use(PIECES, trajectory_id=4)
    path = dumped(tmp_path, use)
    table = pq.read_table(path, partitioning=None)
    names = {"trajectory_id": "slot", "use": "visit"}
    metadata = {**table.schema.metadata, VERSION_KEY: b"1"}
    old = table.rename_columns([names.get(name, name) for name in table.column_names])
    pq.write_table(old.replace_schema_metadata(metadata), path)
    (entry,) = record_entries(tmp_path)
    assert (entry.trajectory_id, entry.use) == (4, use.use)
    assert read_uses([entry])[0].response_token_ids.tolist() == use.response_token_ids.tolist()
    assert read_settings(path) == SETTINGS


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = dumped(tmp_path, made_use(PIECES))
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, VERSION_KEY: b"99"}), path)
    with pytest.raises(DataError, match="has version '99' and '2' is expected"):
        record_entries(tmp_path)
    pq.write_table(table.select(["trajectory_id"]), path)
    with pytest.raises(DataError, match="damaged"):
        record_entries(tmp_path)
