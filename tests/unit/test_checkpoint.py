"""Folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_ray.checkpoint import committed_folder


def test_it_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    for content in ("old", "new"):
        with committed_folder(folder) as temporary:
            (temporary / "file").write_text(content)
            assert temporary != folder
    assert (folder / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    with committed_folder(folder) as temporary:
        (temporary / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), committed_folder(folder) as temporary:
        (temporary / "file").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]
