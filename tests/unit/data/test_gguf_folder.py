"""A GGUF file that is missing or broken leaves no folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_ray.data.gguf_folder import convert
from opd_ray.errors import ModelError


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        convert(tmp_path / "nowhere.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be read as a causal language model"):
        convert(tmp_path / "broken.gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "broken.gguf"]
