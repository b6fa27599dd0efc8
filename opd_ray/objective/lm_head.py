"""The parts of the LM head that distillation needs, without ever holding logits `[N,V]`.

`support_logits` touches only the K rows of the head that each position's support names. `token_logprobs`
needs the full log-sum-exp, and takes it tile by tile. Products of bf16 or fp16 operands are added up in
float32, and results are float32: logits rounded to bf16 would carry errors of up to 0.06 nats, more than the
drift that a gate looks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from opd_ray.config.choices import HeadKernel
from opd_ray.objective.inputs import compute_dtype, require_ids_within, require_name, require_rank
from opd_ray.objective.lm_head_tiles import (
    RunningSoftmax,
    add_product,
    choose_within,
    chunks,
    columns_within,
    logit_tiles,
)

GATHER_BYTES = 8 << 20  # gathered head rows held at once; more falls out of a core's cache and is slower
GATHER_BYTES_ACCELERATOR = 64 << 20  # larger, so that a kernel's work outweighs its launch
ROWS_PER_BAG = 1024  # rows of the head whose gradient is formed at once
DENSE_RATIO = 32  # up to V = DENSE_RATIO * K a plain product is cheaper than gathering rows
DENSE_PIECES = 8  # pieces of that product, at least


def support_logits(
    hidden: Tensor, head_weight: Tensor, ids: Tensor, *, kernel: HeadKernel | str = HeadKernel.torch
) -> Tensor:
    """Return the logits of each position's own K tokens, ``hidden[n] @ head_weight[ids[n, k]]``.

    Differentiable in `hidden` and `head_weight`. Beyond its results it holds at most GATHER_BYTES of gathered
    rows (64 MiB on an accelerator; one position's, if larger), forward and backward; the head's gradient is
    `[V,H]` by nature. Up to V = DENSE_RATIO * K it multiplies with the whole head instead, a piece of the
    positions at a time. Ids may repeat.
    Source: the support of arXiv 2603.25562, equation 6, is all that its loss depends on.

    Args:
        hidden: `[N,H]`, the last hidden states, after the final norm.
        head_weight: `[V,H]`, any float dtype.
        ids: `[N,K]` integers in 0..V-1.
        kernel: "torch" is the reference. "triton" reads the rows where they lie, without a gathered copy, in the
            forward pass and for the gradient of `hidden`; for CUDA tensors only. Not measured on a GPU yet.

    Returns:
        Logits `[N,K]`, float32 (float64 if an input is float64). Gradients have their tensor's dtype.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, or a kernel that cannot run here.
    """
    require_head(hidden, head_weight)
    require_name("kernel", kernel, HeadKernel)
    if kernel == "triton":
        _require_triton(hidden)
    require_rank("ids", ids, 2, "[N,K]")
    _require_positions("ids", ids, hidden)
    require_ids_within("ids", ids, head_weight.shape[0])
    ids = ids.long()
    vocabulary, size = head_weight.shape[0], ids.shape[1]
    if ids.numel() and vocabulary <= DENSE_RATIO * size:
        dtype = compute_dtype(hidden, head_weight)
        rows = min(_positions_per_chunk(vocabulary, hidden, dtype), -(-ids.shape[0] // DENSE_PIECES))
        states, head = hidden.to(dtype), head_weight.to(dtype)
        return torch.cat([(states[w] @ head.T).gather(1, ids[w]) for w in chunks(ids.shape[0], rows)])
    result: Tensor = _SupportLogits.apply(hidden, head_weight, ids, kernel)  # type: ignore[no-untyped-call]
    return result


def token_logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor, *, chunk_size: int) -> Tensor:
    """Return the log-prob of each position's token over the full vocabulary, at temperature 1.

    The log-sum-exp runs over tiles of `chunk_size` positions by some thousand rows of the head, and that is all
    it holds, beside one such tile of the head in float32 for a narrower head on the CPU. Under ``torch.no_grad`` no
    graph is kept; otherwise backward computes the tiles again, so that it is differentiable in `hidden` and
    `head_weight` at the same memory.

    Args:
        hidden: `[N,H]`, the last hidden states, after the final norm.
        head_weight: `[V,H]`, any float dtype.
        token_ids: `[N]` integers in 0..V-1.
        chunk_size: positions in a tile, at least 1; larger is faster up to about a thousand, whatever V is.
            Results do not depend on it, up to rounding.

    Returns:
        Log-probs `[N]` in nats, float32 (float64 if an input is float64). Gradients have their tensor's
        dtype.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, or a chunk size below 1.
    """
    require_head(hidden, head_weight)
    require_chunk_size(chunk_size)
    token_ids = check_token_ids(token_ids, hidden, head_weight)
    result: Tensor = _TokenLogprobs.apply(hidden, head_weight, token_ids, chunk_size)  # type: ignore[no-untyped-call]
    return result


class _SupportLogits(torch.autograd.Function):
    """Gathers rows in chunks; backward gathers them again and forms each row of the head's gradient once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, ids: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(hidden, head_weight, ids)
        ctx.kernel = kernel
        dtype = compute_dtype(hidden, head_weight)
        if kernel == "triton":
            from opd_ray.objective.lm_head_triton import gathered_logits

            return gathered_logits(hidden, head_weight, ids, dtype)
        logits = hidden.new_empty(ids.shape, dtype=dtype)
        for where, rows in _gathered_rows(head_weight, ids, dtype):
            logits[where] = torch.bmm(rows, hidden[where].to(dtype).unsqueeze(-1)).squeeze(-1)
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        hidden, head_weight, ids = ctx.saved_tensors
        grad_hidden = grad_head = None
        if ctx.needs_input_grad[0] and ctx.kernel == "triton":
            from opd_ray.objective.lm_head_triton import hidden_gradient

            grad_hidden = hidden_gradient(grad, hidden, head_weight, ids)
        elif ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
            for where, rows in _gathered_rows(head_weight, ids, grad.dtype):
                grad_hidden[where] = torch.bmm(grad[where].unsqueeze(1), rows).squeeze(1).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_head = _head_gradient(grad, hidden.to(grad.dtype), head_weight, ids)
        return grad_hidden, grad_head, None, None


def _gathered_rows(head_weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of positions, their head rows `[c,K,H]` in `dtype`), each at most GATHER_BYTES."""
    size, width = ids.shape[1], head_weight.shape[1]
    for where in chunks(ids.shape[0], _positions_per_chunk(size * width, head_weight, dtype)):
        chunk = ids[where]
        rows = head_weight.index_select(0, chunk.reshape(-1))
        yield where, rows.to(dtype).view(chunk.shape[0], size, width)


def _head_gradient(grad: Tensor, hidden: Tensor, head_weight: Tensor, ids: Tensor) -> Tensor:
    """Add up grad[n, k] * hidden[n] into row ids[n, k]; rows are summed in `grad`'s dtype, written once."""
    result = torch.zeros_like(head_weight)
    if ids.numel() == 0:
        return result
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    scales, positions = grad.reshape(-1)[order], order // ids.shape[1]
    rows, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts = counts.cumsum(0) - counts
    borders = [*starts[::ROWS_PER_BAG].tolist(), positions.shape[0]]
    for where, low, high in zip(chunks(rows.shape[0], ROWS_PER_BAG), borders, borders[1:], strict=False):
        bags = embedding_bag(
            positions[low:high],
            hidden,
            starts[where] - low,
            mode="sum",
            per_sample_weights=scales[low:high],
        )
        result[rows[where]] = bags.to(result.dtype)
    return result


class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at one id a position; keeps the log-sum-exp `[N]`, computes logits again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, token_ids: Tensor, chunk_size: int) -> Tensor:
        dtype = compute_dtype(hidden, head_weight)
        softmax = RunningSoftmax(hidden.shape[0], hidden, dtype)
        chosen = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        for first, _, where, logits in logit_tiles(hidden, head_weight, chunk_size):
            choose_within(logits, token_ids[where], first, chosen[where])
            softmax.add(where, logits)
        normalizer = softmax.logsumexp()
        ctx.save_for_backward(hidden, head_weight, token_ids, normalizer)
        ctx.chunk_size = chunk_size
        return chosen - normalizer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        hidden, head_weight, token_ids, normalizer = ctx.saved_tensors
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_zeros(hidden.shape if wants_hidden else 0, dtype=grad.dtype)
        empty = torch.empty_like if hidden.shape[0] else torch.zeros_like
        grad_head = empty(head_weight) if wants_head else None
        grad_tile = grad.new_zeros(0)
        for first, tile, where, delta in logit_tiles(hidden, head_weight, ctx.chunk_size):
            scale = grad[where].unsqueeze(1)
            delta.sub_(normalizer[where].unsqueeze(1)).exp_().mul_(-scale)
            inside, column = columns_within(token_ids[where], first, tile.shape[0])
            delta.scatter_add_(1, column, torch.where(inside.unsqueeze(1), scale, 0.0))
            if wants_hidden:
                add_product(grad_hidden[where], delta, tile)
            if grad_head is not None:  # a tile's gradient is added up in `grad`'s dtype and rounded once
                if where.start == 0:
                    grad_tile = torch.zeros_like(tile, dtype=grad.dtype)
                add_product(grad_tile, delta.T, hidden[where].to(tile.dtype))
                if where.stop == hidden.shape[0]:
                    grad_head[first : first + tile.shape[0]] = grad_tile
        return grad_hidden.to(hidden.dtype) if wants_hidden else None, grad_head, None, None


def _positions_per_chunk(numbers_per_position: int, like: Tensor, dtype: torch.dtype) -> int:
    held = GATHER_BYTES if like.device.type == "cpu" else GATHER_BYTES_ACCELERATOR
    return max(1, held // max(1, numbers_per_position * dtype.itemsize))


def require_head(hidden: Tensor, head_weight: Tensor) -> None:
    """Raise ValueError unless `hidden` is `[N,H]` and `head_weight` `[V,H]`."""
    require_rank("hidden", hidden, 2, "[N,H]")
    require_rank("head_weight", head_weight, 2, "[V,H]")
    if hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden has width {hidden.shape[1]} but head_weight {head_weight.shape[1]}; "
            "give the head of the same model"
        )


def check_token_ids(token_ids: Tensor, hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Return `token_ids` as int64; raise ValueError unless they are `[N]` and in 0..V-1."""
    require_rank("token_ids", token_ids, 1, "[N]")
    _require_positions("token_ids", token_ids, hidden)
    require_ids_within("token_ids", token_ids, head_weight.shape[0])
    return token_ids.long()


def require_chunk_size(chunk_size: int) -> None:
    """Raise ValueError unless `chunk_size` is at least 1."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 position, 1024 is a good start")


def _require_positions(name: str, ids: Tensor, hidden: Tensor) -> None:
    if ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"{name} has {ids.shape[0]} rows but hidden {hidden.shape[0]}; give one row a position")


def _require_triton(hidden: Tensor) -> None:
    try:
        from opd_ray.objective.lm_head_triton import require_device
    except ImportError as error:
        raise ValueError(f"kernel 'triton' cannot be used ({error}); use kernel 'torch'") from error
    require_device(hidden)
