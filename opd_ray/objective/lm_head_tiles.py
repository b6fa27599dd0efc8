"""Logits of a head, tile by tile, and the softmax sums that run over the tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype

TILE_ROWS = 2048  # rows of the head in a tile: with 512 positions and more the logits stay in a core's reach
TILE_ROWS_ACCELERATOR = 16384  # larger, so that a kernel's work outweighs its launch


def logit_tiles(hidden: Tensor, head_weight: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """Yield (first head row, head rows `[R,H]`, slice of positions, logits `[c,R]`), positions innermost.

    The logits are float32 (float64 if an input is float64) and lie in one buffer, which the next tile
    overwrites and the caller may. bf16 operands on CUDA are multiplied as they are, with float32 sums and
    results; elsewhere a tile of a narrower head is widened first (exact, and faster than a bf16 product on
    processors without matrix units).
    """
    dtype = compute_dtype(hidden, head_weight)
    operand = torch.bfloat16 if _has_wide_product(hidden, head_weight) else dtype
    states = hidden.to(operand)
    vocabulary, count = head_weight.shape[0], hidden.shape[0]
    rows = min(vocabulary, TILE_ROWS if hidden.device.type == "cpu" else TILE_ROWS_ACCELERATOR)
    logits = hidden.new_empty(min(chunk_size, count) * rows, dtype=dtype)
    widened = None
    if head_weight.dtype != operand:
        widened = head_weight.new_empty((rows, head_weight.shape[1]), dtype=operand)
    for first in range(0, vocabulary if count else 0, rows):
        tile = head_weight[first : first + rows]
        if widened is not None:
            tile = widened[: tile.shape[0]].copy_(tile)
        for where in chunks(count, chunk_size):
            part = states[where]
            out = logits[: part.shape[0] * tile.shape[0]].view(part.shape[0], tile.shape[0])
            yield first, tile, where, wide_product(part, tile.T, out)


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return a @ b in `out`, whose dtype may be wider than that of the operands."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `out`. Where only `b` is narrow, `a` goes as two narrow parts, high and low: exact to 2^-16."""
    if a.dtype == b.dtype:
        out.addmm_(a, b)
        return
    high = a.to(b.dtype)
    low = (a - high).to(b.dtype)
    for part in (high, low):
        out.add_(torch.mm(part, b, out_dtype=out.dtype))


def chunks(count: int, chunk_size: int) -> Iterator[slice]:
    """Cut ``range(count)`` into slices of `chunk_size`; the last may be shorter."""
    for start in range(0, count, chunk_size):
        yield slice(start, min(start + chunk_size, count))


def choose_within(logits: Tensor, token_ids: Tensor, first: int, chosen: Tensor) -> None:
    """Write the logit of each position's token into `chosen [c]` where this tile, from row `first`, holds it."""
    inside, column = columns_within(token_ids, first, logits.shape[1])
    chosen.copy_(torch.where(inside, logits.gather(1, column).squeeze(1), chosen))


def columns_within(token_ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return (is the token in this tile `[c]`, its column there `[c,1]`, clamped into the tile)."""
    column = token_ids - first
    return (column >= 0) & (column < rows), column.clamp(0, rows - 1).unsqueeze(1)


class RunningSoftmax:
    """Adds up softmax sums over tiles, scaled by the largest logit so far (Milakov & Gimelshein, arXiv 1805.02867).

    With ``entropy=True`` it also keeps the mean of the logits under the softmax, at the price of one more buffer
    of the size of a tile.
    """

    def __init__(self, count: int, like: Tensor, dtype: torch.dtype, *, entropy: bool = False) -> None:
        # The least finite number, not -inf: the first shift is then 0 * finite, not 0 * inf.
        self._top = like.new_full((count,), torch.finfo(dtype).min, dtype=dtype)
        self._total = torch.zeros_like(self._top)
        self._moment = torch.zeros_like(self._top) if entropy else None

    def add(self, where: slice, logits: Tensor) -> None:
        """Take in the logits `[c,R]` of the positions `where`; `logits` is overwritten."""
        old = self._top[where]
        top = torch.maximum(old, logits.amax(dim=1))
        shift = old - top
        scale = shift.exp()
        logits.sub_(top.unsqueeze(1))
        if self._moment is None:
            powers = logits.exp_()
        else:
            powers = logits.exp()
            moment = (self._moment[where] + shift * self._total[where]) * scale
            self._moment[where] = moment + logits.mul_(powers).sum(dim=1)
        self._total[where] = self._total[where] * scale + powers.sum(dim=1)
        self._top[where] = top

    def logsumexp(self) -> Tensor:
        """Return `[N]`, the log-sum-exp of all logits taken in."""
        return self._top + self._total.log()

    def entropy(self) -> Tensor:
        """Return `[N]`, in nats; needs ``entropy=True``."""
        if self._moment is None:
            raise ValueError("no entropy was added up; make the RunningSoftmax with entropy=True")
        return self._total.log() - self._moment / self._total


def _has_wide_product(hidden: Tensor, head_weight: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == head_weight.dtype == torch.bfloat16
