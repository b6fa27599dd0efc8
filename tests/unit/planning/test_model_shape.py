"""Shapes read from configs: parameters against models that transformers builds, and what is said without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.errors import ModelError
from opd_ray.planning.known_models import CONFIGS
from opd_ray.planning.model_files import read_shape, shape_of_loaded, stored_parameters
from opd_ray.planning.model_shape import shape_of
from opd_ray.tiny.paths import student_path, teacher_path

SIZES: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
}


def counted_by_transformers(config: Any) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Qwen3", {"attention_bias": True}),
    ],
)
def test_parameters_are_those_of_the_real_model(kind: str, more: dict[str, Any], tied: bool) -> None:
    given_sizes = dict(SIZES)
    if kind == "Qwen2":
        # Its config has no head_dim.
        del given_sizes["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**given_sizes, **more, tie_word_embeddings=tied)
    assert shape_of(config.to_dict(), kind).num_parameters == counted_by_transformers(config)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 64), st.integers(1, 5))
def test_parameters_of_any_size(layers: int, groups: int, kv_heads: int, inner: int, half: int) -> None:
    config = transformers.Qwen3Config(
        vocab_size=17,
        hidden_size=24,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
    )
    assert shape_of(config.to_dict(), "model").num_parameters == counted_by_transformers(config)


@pytest.mark.parametrize("folder", [student_path(), teacher_path()])
def test_the_embedded_models_are_counted_and_stored_alike(folder: Path) -> None:
    shape = read_shape(str(folder))
    assert shape.num_parameters == stored_parameters(folder / "model.safetensors") == 449_088


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen3-1.7B-Base", 1_720_574_976),
        ("Thinking-Space/Qwen3-4B-Base-GRPO", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_known_models_have_their_published_size(name: str, parameters: int) -> None:
    assert read_shape(name).num_parameters == parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_known_shapes_are_what_transformers_builds(name: str) -> None:
    config = dict(CONFIGS[name])
    made = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    assert shape_of(CONFIGS[name], name).num_parameters == counted_by_transformers(made)


def write_unknown(folder: Path) -> dict[str, Any]:
    config = SIZES | {"model_type": "phi3"}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_an_unknown_architecture_is_counted_from_its_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config = write_unknown(tmp_path)
    with pytest.raises(ModelError, match=r"'phi3'\) are unknown: give a folder with its safetensors"):
        read_shape(str(tmp_path))
    assert shape_of_loaded(config, str(tmp_path)) is None
    import numpy as np

    save_file({"a": np.zeros((3, 5), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros((7,), np.float16), "c": np.zeros((), np.float32)}, tmp_path / "model-2.safetensors")
    assert read_shape(str(tmp_path)).num_parameters == 3 * 5 + 7 + 1


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ModelError, match="has no num_hidden_layers"):
        read_shape(str(tmp_path))
    write_unknown(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ModelError, match="is no safetensors file"):
        read_shape(str(tmp_path))
    with pytest.raises(ModelError, match="the shape of 'nobody/nothing' is unknown") as caught:
        read_shape("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_kv_cache_of_a_token() -> None:
    # Qwen3-1.7B: 2 x 28 layers x 8 heads x 128 x 2 bytes.
    assert read_shape("Qwen/Qwen3-1.7B").kv_bytes(2) == 114_688


def test_a_window_counts_only_where_it_is_used() -> None:
    config = SIZES | {"model_type": "qwen2", "sliding_window": 9}
    assert shape_of(config | {"use_sliding_window": False}, "model").window is None
    assert shape_of(config | {"use_sliding_window": True}, "model").window == 9
    assert shape_of(config, "model").least_cached_tokens(100) == 9
