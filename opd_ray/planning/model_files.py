"""Finds out a model's shape: from its folder, from what is known of public models, or from the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from opd_ray.errors import ModelError
from opd_ray.planning.known_models import CONFIGS
from opd_ray.planning.model_shape import COUNTED_TYPES, ModelShape, shape_of

_HEADER_LENGTH = 8
_LARGEST_HEADER = 100 * 2**20


def read_shape(path: str) -> ModelShape:
    """The shape of the model in a folder, or of a hub id; raises `ModelError` saying what is unknown."""
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read ({error}): give a folder written by save_pretrained") from error
        return shape_of(config, path, _uncounted(config, folder))
    if path in CONFIGS:
        return shape_of(CONFIGS[path], f"{path} (known shape)")
    return shape_of(_hub_config(path), path)


def shape_of_loaded(config: Mapping[str, Any], path: str) -> ModelShape | None:
    """The shape by a config that transformers has loaded; None where the parameters' number is unknown."""
    folder = Path(path)
    try:
        return shape_of(config, path, _uncounted(config, folder) if folder.is_dir() else None)
    except ModelError:
        return None


def _hub_config(name: str) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        config: dict[str, Any] = json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except Exception as error:  # noqa: BLE001  (whatever the hub's client raises: the shape is unknown)
        raise ModelError(
            f"the shape of {name!r} is unknown ({type(error).__name__}: {' '.join(str(error).split())[:150]}): give a "
            "folder with its config.json, or a hub id where the hub can be reached"
        ) from error
    return config


def _uncounted(config: Mapping[str, Any], folder: Path) -> int | None:
    """Parameters in a folder's safetensors files, where the architecture's cannot be counted."""
    if config.get("model_type") in COUNTED_TYPES:
        return None
    files = sorted(folder.glob("*.safetensors"))
    return sum(stored_parameters(file) for file in files) or None


def stored_parameters(file: Path) -> int:
    """Elements of all tensors in a safetensors file, by its header; raises `ModelError` where it is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_HEADER_LENGTH), "little")
            header = json.loads(stream.read(length)) if length <= _LARGEST_HEADER else None
        if not isinstance(header, dict):
            raise ValueError("no header")
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is no safetensors file ({error}): download the model again") from error
