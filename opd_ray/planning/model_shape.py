"""The sizes of a decoder that decide its memory, read from its config, and the number of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_ray.errors import ModelError

_SIZES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}
# Decoders with RMSNorm, rotary positions and a gated MLP of three matrices, whose parameters can be counted.
COUNTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; `source` says where they were read. Numbers are per model, `head_dim` per head.

    `window` is the tokens that some layers look back (None: all layers see everything).
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    num_parameters: int
    source: str
    window: int | None = None

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised by head."""
        return self.model_type == "qwen3"

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest matrix: the embedding, in all models that this project meets."""
        return self.vocab * self.hidden

    def kv_bytes(self, item_bytes: int) -> int:
        """Bytes of KV cache that one token takes: keys and values of every layer."""
        return 2 * self.layers * self.kv_width * item_bytes

    def least_cached_tokens(self, num_tokens: int) -> int:
        """Of a sequence of `num_tokens`, those whose keys every layer keeps for sure; 0 where nobody knows."""
        if self.model_type not in COUNTED_TYPES:
            return 0
        return num_tokens if self.window is None else min(num_tokens, self.window)


def shape_of(config: Mapping[str, Any], source: str, num_parameters: int | None = None) -> ModelShape:
    """The shape that a model's ``config.json`` describes.

    `num_parameters` is what its weight files hold; it is used where the architecture's parameters cannot be counted.
    Raises `ModelError` where a size is missing, or neither is known.
    """
    missing = [key for key in _SIZES.values() if not isinstance(config.get(key), int)]
    if missing:
        raise ModelError(f"the config of {source} has no {missing[0]}: give a decoder whose config.json says its sizes")
    sizes = {name: int(config[key]) for name, key in _SIZES.items()}
    model_type = str(config.get("model_type", "unknown"))
    kv_heads = int(config.get("num_key_value_heads") or sizes["heads"])
    head_dim = int(config.get("head_dim") or sizes["hidden"] // sizes["heads"])
    tied = bool(config.get("tie_word_embeddings", False))
    counted = None
    if model_type in COUNTED_TYPES:
        counted = _count(config, model_type, sizes, sizes["heads"] * head_dim, kv_heads * head_dim, head_dim, tied)
    total = counted or num_parameters
    if total is None:
        raise ModelError(
            f"the parameters of {source} (model_type {model_type!r}) are unknown: give a folder with its safetensors "
            f"files, or a model of type {', '.join(COUNTED_TYPES)}"
        )
    return ModelShape(
        model_type=model_type,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=tied,
        num_parameters=total,
        source=source,
        window=int(config["sliding_window"]) if _has_window(config) else None,
        **sizes,
    )


def _has_window(config: Mapping[str, Any]) -> bool:
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True) is not False


def _count(  # noqa: PLR0913  (the sizes that all terms share)
    config: Mapping[str, Any],
    model_type: str,
    sizes: Mapping[str, int],
    query: int,
    kv: int,
    head_dim: int,
    tied: bool,
) -> int:
    """Parameters as transformers builds them; a tied head is counted once."""
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    in_bias = model_type == "qwen2" or (model_type != "mistral" and bool(config.get("attention_bias")))
    out_bias = model_type in ("llama", "qwen3") and bool(config.get("attention_bias"))
    attention = 2 * hidden * query + 2 * hidden * kv + in_bias * (query + 2 * kv) + out_bias * hidden
    if model_type == "qwen3":
        attention += 2 * head_dim
    mlp = 3 * hidden * inner
    if model_type == "llama" and config.get("mlp_bias"):
        mlp += 2 * inner + hidden
    embedding = sizes["vocab"] * hidden
    return embedding * (1 if tied else 2) + hidden + sizes["layers"] * (attention + mlp + 2 * hidden)
