"""Paths of the packaged tiny models."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).resolve().parent / "assets"


def teacher_path() -> Path:
    """Return the folder of the packaged teacher (model and tokenizer, as `save_pretrained` writes them)."""
    return _ASSETS / "teacher"


def student_path() -> Path:
    """Return the folder of the packaged student (model and tokenizer, as `save_pretrained` writes them)."""
    return _ASSETS / "student"
