"""What a forward pass keeps, against what autograd really saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from opd_ray.planning.activations import saved_bytes
from opd_ray.planning.model_shape import shape_of

TOKENS = 256
LAYERS = 3


def bytes_saved_by_autograd(config: Any, dtype: torch.dtype, checkpointing: bool) -> float:
    """Bytes a token of all distinct tensors that the decoder saves, its parameters left out."""
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model = model.to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held, so that no address comes twice.
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(2, TOKENS // 2, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()) / TOKENS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_saved_states_are_those_of_autograd(kind: str, dtype: torch.dtype, checkpointing: bool) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    shape = shape_of(config.to_dict(), kind)
    computed = saved_bytes(shape, dtype.itemsize, checkpointing=checkpointing)
    # The cosines and sines of the positions, and the ids, are left out of the formula.
    found = bytes_saved_by_autograd(config, dtype, checkpointing)
    rotary = 2 * shape.head_dim * dtype.itemsize + 8
    assert abs(found - computed) <= rotary + 0.05 * computed
