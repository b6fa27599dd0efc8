import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opd_ray.errors import RunFolderError
from opd_ray.run.folder import RunFolder

NOON = "20260131-120000"


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still."""
    monkeypatch.setattr(time, "strftime", lambda text: NOON)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def fail(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, broken)


def test_create_makes_the_folder_and_says_that_it_runs(tmp_path: Path, noon: None) -> None:
    folder = RunFolder.create(tmp_path / "a" / "runs", "lsm_block64-tiny-s0")
    assert folder.path == tmp_path / "a" / "runs" / f"lsm_block64-tiny-s0-{NOON}"
    assert read(folder.path / "status.json") == {"status": "running", "error": None}
    assert sorted(os.listdir(folder.path)) == [".lock", "status.json"]


def test_a_relative_runs_dir_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("runs", "x")
    monkeypatch.chdir("/")
    folder.mark("finished")
    assert folder.path.parent == tmp_path / "runs"


def test_names_are_made_fit_for_a_file_system(tmp_path: Path, noon: None) -> None:
    assert RunFolder.create(tmp_path, "../a b/c:d").path == tmp_path / f".._a_b_c_d-{NOON}"


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path, noon: None) -> None:
    paths: list[Path] = []
    start = threading.Barrier(8)

    def create() -> None:
        start.wait()
        paths.append(RunFolder.create(tmp_path / "runs", "x").path)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {f"x-{NOON}"} | {f"x-{NOON}-{number}" for number in range(2, 9)}
    assert {path.name for path in paths} == names


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for runs_dir in (file, file / "deeper"):
        with pytest.raises(RunFolderError, match=r"runs_dir=.*file.*: Not a directory; .*runs_dir=FOLDER") as caught:
            RunFolder.create(runs_dir, "x")
        assert "\n" not in str(caught.value)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_made_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail(monkeypatch, Path, "mkdir", number)
    with pytest.raises(RunFolderError, match=os.strerror(number)):
        RunFolder.create(tmp_path / "runs", "x")
    assert os.listdir(tmp_path) == []


@contextmanager
def nobody() -> Iterator[None]:
    """Root, who may write anywhere, becomes the user nobody; other users stay who they are."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_without_permission_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with nobody(), pytest.raises(RunFolderError, match="Permission denied"):
        RunFolder.create(tmp_path / "runs", "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("runs_dir", ["runs", "a/b/runs", "."])
def test_nothing_is_left_of_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_dir: str
) -> None:
    fail(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(RunFolderError, match="No space left on device"):
        RunFolder.create(tmp_path / runs_dir, "x")
    assert os.listdir(tmp_path) == []


def test_a_failed_start_leaves_the_runs_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RunFolder.create(tmp_path / "runs", "other")
    fail(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(RunFolderError):
        RunFolder.create(tmp_path / "runs", "x")
    assert os.listdir(tmp_path / "runs") == [other.path.name]


def test_write_text_replaces_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, "x")
    assert folder.write_text("config.yaml", "a: 1\n") == folder.path / "config.yaml"
    folder.write_text("config.yaml", "a: \u00b5\n")
    assert (folder.path / "config.yaml").read_bytes() == "a: \u00b5\n".encode()

    fail(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(RunFolderError, match="cannot write .*config.yaml: No space left"):
        folder.write_text("config.yaml", "half")
    assert (folder.path / "config.yaml").read_text() == "a: \u00b5\n"
    assert sorted(os.listdir(folder.path)) == [".lock", "config.yaml", "status.json"]


@pytest.mark.parametrize("name", ["a/b", "../b", "/b", "", ".."])
def test_write_text_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, RunFolderError)):
        RunFolder.create(tmp_path / "runs", "x").write_text(name, "text")
    assert not (tmp_path / "runs" / "b").exists()


def test_finish_writes_the_summary_and_names_the_run_latest(tmp_path: Path) -> None:
    first, second = RunFolder.create(tmp_path, "a"), RunFolder.create(tmp_path, "b")
    assert not (tmp_path / "latest").exists()
    for folder in (first, second):
        folder.finish({"steps": 3, "eval": {"before": {"avg_at_8": 0.5}}})
        assert os.readlink(tmp_path / "latest") == folder.path.name  # relative: the runs can be moved
    assert read(tmp_path / "latest" / "summary.json") == {"steps": 3, "eval": {"before": {"avg_at_8": 0.5}}}
    assert read(second.path / "status.json")["status"] == "finished"
    assert sorted(os.listdir(tmp_path)) == sorted(["latest", first.path.name, second.path.name])


def test_a_summary_is_json_that_every_reader_takes(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    folder = RunFolder.create(tmp_path, "a")
    folder.finish({"loss": float("nan"), "n": np.int64(3), "x": [np.float32(0.5), float("inf")], "at": Path("/a")})
    assert read(folder.path / "summary.json") == {"loss": None, "n": 3, "x": [0.5, None], "at": "/a"}


def test_a_file_system_without_links_costs_the_link_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latest").mkdir()  # a folder cannot be replaced by a link
    folder = RunFolder.create(tmp_path, "a")
    folder.finish({})
    assert (folder.path / "summary.json").exists()
    assert "latest does not name this run" in caplog.text
    assert sorted(os.listdir(tmp_path)) == sorted(["latest", folder.path.name])


def test_mark_keeps_the_error(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    folder.mark("failed", "the loss is not finite")
    assert read(folder.path / "status.json") == {"status": "failed", "error": "the loss is not finite"}
