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

from opd_ray.objective.inputs import compute_dtype, require_ids_within, require_rank

GATHER_BYTES = 8 << 20  # gathered head rows held at once; more falls out of a core's cache and is slower
ROWS_PER_BAG = 1024  # rows of the head whose gradient is formed at once
TILE_ROWS = 8192  # rows of the head in one tile of the log-sum-exp
DENSE_RATIO = 32  # up to V = DENSE_RATIO * K a plain product is cheaper than gathering rows
DENSE_PIECES = 8  # pieces of that product, at least


def support_logits(hidden: Tensor, head_weight: Tensor, ids: Tensor) -> Tensor:
    """Return the logits of each position's own K tokens, ``hidden[n] @ head_weight[ids[n, k]]``.

    Differentiable in `hidden` and `head_weight`. Beyond its results it holds at most GATHER_BYTES of gathered
    rows (or one position's, if larger), forward and backward; the head's gradient is `[V,H]` by nature. Up to
    V = DENSE_RATIO * K it multiplies with the whole head instead, a piece of the positions at a time. Ids may
    repeat.
    Source: the support of arXiv 2603.25562, equation 6, is all that its loss depends on.

    Args:
        hidden: `[N,H]`, the last hidden states, after the final norm.
        head_weight: `[V,H]`, any float dtype.
        ids: `[N,K]` integers in 0..V-1.

    Returns:
        Logits `[N,K]`, float32 (float64 if an input is float64). Gradients have their tensor's dtype.

    Raises:
        ValueError: shapes that do not fit, or ids outside the vocabulary.
    """
    _require_head(hidden, head_weight)
    require_rank("ids", ids, 2, "[N,K]")
    _require_positions("ids", ids, hidden)
    require_ids_within("ids", ids, head_weight.shape[0])
    ids = ids.long()
    vocabulary, size = head_weight.shape[0], ids.shape[1]
    if ids.numel() and vocabulary <= DENSE_RATIO * size:
        dtype = compute_dtype(hidden, head_weight)
        rows = min(_positions_per_chunk(vocabulary, dtype), -(-ids.shape[0] // DENSE_PIECES))
        states, head = hidden.to(dtype), head_weight.to(dtype)
        return torch.cat([(states[w] @ head.T).gather(1, ids[w]) for w in _chunks(ids.shape[0], rows)])
    result: Tensor = _SupportLogits.apply(hidden, head_weight, ids)  # type: ignore[no-untyped-call]
    return result


def token_logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor, *, chunk_size: int) -> Tensor:
    """Return the log-prob of each position's token over the full vocabulary, at temperature 1.

    The log-sum-exp runs over tiles of `chunk_size` positions by TILE_ROWS rows of the head, and that is all
    it holds, beside one such tile of the head in float32 for a narrower head. Under ``torch.no_grad`` no
    graph is kept; otherwise backward computes the tiles again, so that it is differentiable in `hidden` and
    `head_weight` at the same memory.

    Args:
        hidden: `[N,H]`, the last hidden states, after the final norm.
        head_weight: `[V,H]`, any float dtype.
        token_ids: `[N]` integers in 0..V-1.
        chunk_size: positions in a tile, at least 1; larger is faster up to some hundreds. Results do not
            depend on it, up to rounding.

    Returns:
        Log-probs `[N]` in nats, float32 (float64 if an input is float64). Gradients have their tensor's
        dtype.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, or a chunk size below 1.
    """
    _require_head(hidden, head_weight)
    require_rank("token_ids", token_ids, 1, "[N]")
    _require_positions("token_ids", token_ids, hidden)
    require_ids_within("token_ids", token_ids, head_weight.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 position, 256 is a good start")
    result: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, token_ids.long(), chunk_size
    )
    return result


class _SupportLogits(torch.autograd.Function):
    """Gathers rows in chunks; backward gathers them again and forms each row of the head's gradient once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head_weight, ids)
        dtype = compute_dtype(hidden, head_weight)
        logits = hidden.new_empty(ids.shape, dtype=dtype)
        for where, rows in _gathered_rows(head_weight, ids, dtype):
            logits[where] = torch.bmm(rows, hidden[where].to(dtype).unsqueeze(-1)).squeeze(-1)
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        hidden, head_weight, ids = ctx.saved_tensors
        grad_hidden = grad_head = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
            for where, rows in _gathered_rows(head_weight, ids, grad.dtype):
                grad_hidden[where] = torch.bmm(grad[where].unsqueeze(1), rows).squeeze(1).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_head = _head_gradient(grad, hidden.to(grad.dtype), head_weight, ids)
        return grad_hidden, grad_head, None


def _gathered_rows(head_weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of positions, their head rows `[c,K,H]` in `dtype`), each at most GATHER_BYTES."""
    size, width = ids.shape[1], head_weight.shape[1]
    step = _positions_per_chunk(size * width, dtype)
    for start in range(0, ids.shape[0], step):
        where = slice(start, start + step)
        chunk = ids[where]
        yield (
            where,
            head_weight.index_select(0, chunk.reshape(-1)).to(dtype).view(chunk.shape[0], size, width),
        )


def _head_gradient(grad: Tensor, hidden: Tensor, head_weight: Tensor, ids: Tensor) -> Tensor:
    """Add up grad[n, k] * hidden[n] into row ids[n, k]; rows are summed in `grad`'s dtype, written once."""
    result = torch.zeros_like(head_weight)
    if ids.numel() == 0:
        return result
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    scales, positions = grad.reshape(-1)[order], order // ids.shape[1]
    rows, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    ends = counts.cumsum(0)
    starts = ends - counts
    for first in range(0, rows.shape[0], ROWS_PER_BAG):
        last = min(first + ROWS_PER_BAG, rows.shape[0])
        low, high = int(starts[first]), int(ends[last - 1])
        bags = embedding_bag(
            positions[low:high],
            hidden,
            starts[first:last] - low,
            mode="sum",
            per_sample_weights=scales[low:high],
        )
        result[rows[first:last]] = bags.to(result.dtype)
    return result


class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at one id a position; keeps the log-sum-exp `[N]`, computes logits again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, token_ids: Tensor, chunk_size: int) -> Tensor:
        dtype = compute_dtype(hidden, head_weight)
        states = hidden.to(dtype)
        normalizer = states.new_full(token_ids.shape, -torch.inf)
        chosen = torch.zeros_like(normalizer)
        for first, tile in _head_tiles(head_weight, dtype):
            for where in _chunks(states.shape[0], chunk_size):
                logits = states[where] @ tile.T
                normalizer[where] = torch.logaddexp(normalizer[where], logits.logsumexp(dim=-1))
                inside, column = _within(token_ids[where], first, tile.shape[0])
                chosen[where] = torch.where(inside, logits.gather(1, column).squeeze(1), chosen[where])
        ctx.save_for_backward(hidden, head_weight, token_ids, normalizer)
        ctx.chunk_size = chunk_size
        return chosen - normalizer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        hidden, head_weight, token_ids, normalizer = ctx.saved_tensors
        states = hidden.to(grad.dtype)
        grad_hidden = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        grad_head = torch.empty_like(head_weight) if ctx.needs_input_grad[1] else None
        for first, tile in _head_tiles(head_weight, grad.dtype):
            grad_tile = torch.zeros_like(tile) if grad_head is not None else None
            for where in _chunks(states.shape[0], ctx.chunk_size):
                scale = grad[where].unsqueeze(1)
                delta = (states[where] @ tile.T).sub_(normalizer[where].unsqueeze(1)).exp_().mul_(-scale)
                inside, column = _within(token_ids[where], first, tile.shape[0])
                delta.scatter_add_(1, column, torch.where(inside.unsqueeze(1), scale, 0.0))
                if grad_hidden is not None:
                    grad_hidden[where] += delta @ tile
                if grad_tile is not None:
                    grad_tile.addmm_(delta.T, states[where])
            if grad_head is not None and grad_tile is not None:
                grad_head[first : first + tile.shape[0]] = grad_tile.to(grad_head.dtype)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_head, None, None


def _head_tiles(head_weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows in `dtype`) of each tile of the head."""
    for first in range(0, head_weight.shape[0], TILE_ROWS):
        yield first, head_weight[first : first + TILE_ROWS].to(dtype)


def _chunks(count: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, count, chunk_size):
        yield slice(start, start + chunk_size)


def _within(token_ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return (is the token in this tile `[c]`, its column there `[c,1]`, clamped into the tile)."""
    column = token_ids - first
    return (column >= 0) & (column < rows), column.clamp(0, rows - 1).unsqueeze(1)


def _positions_per_chunk(numbers_per_position: int, dtype: torch.dtype) -> int:
    return max(1, GATHER_BYTES // max(1, numbers_per_position * dtype.itemsize))


def _require_head(hidden: Tensor, head_weight: Tensor) -> None:
    require_rank("hidden", hidden, 2, "[N,H]")
    require_rank("head_weight", head_weight, 2, "[V,H]")
    if hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden has width {hidden.shape[1]} but head_weight {head_weight.shape[1]}; "
            "give the head of the same model"
        )


def _require_positions(name: str, ids: Tensor, hidden: Tensor) -> None:
    if ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"{name} has {ids.shape[0]} rows but hidden {hidden.shape[0]}; give one row a position")
