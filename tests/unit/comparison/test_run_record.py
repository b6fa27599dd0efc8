import json
from pathlib import Path

import pytest

from opd_ray.comparison.run_record import find_runs, read_run
from opd_ray.errors import DataError
from tests.unit.run_folders import write_run


def test_finds_runs_once_below_folders_and_through_links(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", "lsm", 0), write_run(tmp_path / "a" / "multirun" / "x", "lsm", 1)
    (tmp_path / "a" / "latest").symlink_to(first.name)
    (tmp_path / "a" / "notes.txt").write_text("not a run")
    # Inside a run nothing is looked for, nor in what begins with a point.
    write_run(first / "wandb", "lsm", 7)
    write_run(tmp_path / "a" / ".half.partial", "lsm", 8)
    every = [tmp_path / "a", first, tmp_path / "a" / "latest", tmp_path / "a" / "notes.txt"]
    assert find_runs(every) == sorted([first, second])


def test_what_is_not_there_or_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no .*nowhere: give run folders"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no run folder"):
        find_runs([tmp_path])


def test_reads_the_config_as_dotted_text(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "lsm_block64", 3, changes={"objective": {"mask_rules": ["special_tokens"]}}))
    assert (run.experiment, run.seed, run.status, run.error) == ("lsm_block64", 3, "finished", None)
    assert run.config["gate.kind"] == "block" and run.config["gate.tau"] == "1.0"
    assert run.config["objective.mask_rules"] == '["special_tokens"]' and run.config["data.fields"] == "{}"
    assert run.summary["steps"] == 40


def test_a_gate_that_is_off_stays_the_word(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path, "lsm", 0)).config["gate.kind"] == "off"


def test_failed_and_unmarked_runs(tmp_path: Path) -> None:
    failed = read_run(write_run(tmp_path, "lsm", 0, status="failed"))
    assert (failed.status, failed.error, failed.summary) == ("failed", "it broke", {})
    bare = write_run(tmp_path, "lsm", 1)
    (bare / "status.json").unlink()
    (bare / "summary.json").write_text("[1]")
    assert (read_run(bare).status, read_run(bare).summary) == ("unknown", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("[1, 2]", "has no seed"),
        ("experiment: lsm", "has no seed"),
        ("seed: x", "has no seed"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


def test_a_run_without_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"status": "finished"}))
    assert find_runs([tmp_path]) == [tmp_path.resolve()]
    with pytest.raises(DataError, match=r"config.yaml: No such file"):
        read_run(tmp_path)


def test_newer_runs_have_the_higher_age_key(tmp_path: Path) -> None:
    folders = ["lsm-tiny-s0-20260101-120000", "lsm-tiny-s0-20260101-120000-2", "lsm-tiny-s0-20260101-120000-10"]
    folders += ["lsm-tiny-s0-20260102-000000"]
    keys = [read_run(write_run(tmp_path, "lsm", 0, folder=folder)).age_key for folder in folders]
    assert keys == sorted(keys)
