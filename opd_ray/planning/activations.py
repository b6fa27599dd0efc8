"""Memory that a forward pass keeps for the backward pass, per token, for the decoders of `model_shape`.

Counted tensor by tensor from transformers' own modules (RMSNorm in float32, scaled dot-product attention without a
mask, gated MLP): a test compares the sums with what autograd really saves. Of attention the [T, T] scores are never
kept (flash and memory-efficient kernels recompute them, arXiv 2205.14135).
"""

from __future__ import annotations

from opd_ray.planning.model_shape import ModelShape

_FP32 = 4


def layer_bytes(shape: ModelShape, item_bytes: int) -> int:
    """Bytes a token that one layer keeps without gradient checkpointing."""
    hidden, query, kv, inner = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    # Input in float32, 1 / RMS, the normalised state before and after its weight.
    norms = 2 * (_FP32 * hidden + _FP32 + 2 * item_bytes * hidden)
    attention = item_bytes * (2 * query + 2 * kv) + _FP32 * shape.heads
    if shape.has_qk_norm:
        attention += (_FP32 + item_bytes) * (query + kv) + _FP32 * (shape.heads + shape.kv_heads)
    # Gate, its activation, up, their product.
    return norms + attention + 4 * item_bytes * inner


def saved_bytes(shape: ModelShape, item_bytes: int, *, checkpointing: bool) -> int:
    """Bytes a token that the whole decoder keeps between forward and backward, final norm included, its output not.

    With gradient checkpointing only each layer's input is kept (Chen et al., arXiv 1604.06174).
    """
    layer = item_bytes * shape.hidden if checkpointing else layer_bytes(shape, item_bytes)
    return shape.layers * layer + (_FP32 + item_bytes) * shape.hidden + _FP32


def transient_bytes(shape: ModelShape, item_bytes: int, *, checkpointing: bool) -> int:
    """Bytes a token that come and go with one layer in the backward pass.

    The gradients of the MLP's three inner states and of two hidden states in float32; with checkpointing also the
    layer's own states, which are computed again.
    """
    gradients = 3 * item_bytes * shape.intermediate + 2 * _FP32 * shape.hidden
    return gradients + (layer_bytes(shape, item_bytes) if checkpointing else 0)


def inference_bytes(shape: ModelShape, item_bytes: int) -> int:
    """Bytes a token that one layer's forward pass holds at once without gradient, and the state that it adds to."""
    mlp = 3 * item_bytes * shape.intermediate + 2 * item_bytes * shape.hidden
    attention = item_bytes * (3 * shape.query_width + 2 * shape.kv_width) + (_FP32 + item_bytes) * shape.hidden
    return max(mlp, attention) + item_bytes * shape.hidden + _FP32 * shape.hidden


def support_bytes(top_k: int) -> int:
    """Bytes a response token of the learner's sparse head and loss: int64 ids and some float32 values at K ids."""
    return top_k * (8 + 8 * _FP32)
