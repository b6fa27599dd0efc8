"""Folders appear whole or not at all, and what has its name is on the disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from opd_ray.storage.committed_folder import committed_folder, ended_in_thread


def write(folder: Path, content: str) -> None:
    with committed_folder(folder) as temporary:
        assert temporary != folder
        (temporary / "file").write_text(content)
        (temporary / "part").mkdir()
        (temporary / "part" / "other").write_text(content)


def test_it_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    for content in ("old", "new"):
        write(folder, content)
    assert (folder / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    write(folder, "old")
    with pytest.raises(KeyboardInterrupt), committed_folder(folder) as temporary:
        (temporary / "file").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    rename, fsync = Path.rename, os.fsync

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").resolve().name

    def noting_rename(path: Path, target: Any) -> Path:
        events.append(("rename", Path(target).name))
        return rename(path, target)

    def noting_fsync(descriptor: int) -> None:
        events.append(("fsync", name_of(descriptor)))
        fsync(descriptor)

    monkeypatch.setattr(Path, "rename", noting_rename)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    write(tmp_path / "student", "new")
    named = events.index(("rename", "student"))
    assert sorted(name for _, name in events[:named]) == [".student.partial", "file", "other", "part"]
    assert events[named + 1 :] == [("fsync", tmp_path.name)]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("last_call", [1, 2, 3])
def test_a_process_that_dies_over_the_exchange_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_call: int
) -> None:
    folder = tmp_path / "student"
    write(folder, "old")
    calls = 0
    rename = Path.rename

    def dying_rename(path: Path, target: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == last_call:
            raise Killed
        return rename(path, target)

    def dying_rmtree(path: Path, ignore_errors: bool = False) -> None:
        if calls + 1 == last_call and Path(path).exists():
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", dying_rename)
        patch.setattr(shutil, "rmtree", dying_rmtree)
        write(folder, "new")
    contents = [(path / "file").read_text() for path in tmp_path.iterdir() if (path / "file").exists()]
    assert sorted(contents) == ["new", "old"]
    with pytest.raises(KeyboardInterrupt), committed_folder(folder):
        assert (folder / "file").read_text() == ("new" if last_call == 3 else "old")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [folder]


async def cancelled_twice(task: asyncio.Task[Any], goes_on: threading.Event) -> bool:
    """Cancel a task that waits for a thread, and once more; whether it was still waiting before the thread ended."""
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    was_waiting = not task.done()
    goes_on.set()
    await asyncio.gather(task, return_exceptions=True)
    return was_waiting and task.cancelled()


def test_a_cancelled_writer_ends_after_its_thread() -> None:
    """Else it continues writing where another one has begun: a checkpoint that is cut off, and the resumed run's."""
    goes_on, ended = threading.Event(), []

    def write() -> None:
        goes_on.wait()
        ended.append("whole")

    async def run() -> bool:
        task = asyncio.create_task(ended_in_thread(write))
        await asyncio.sleep(0.01)
        return await cancelled_twice(task, goes_on)

    assert asyncio.run(run())
    assert ended == ["whole"]
