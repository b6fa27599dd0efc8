"""Cut responses into segments: fixed blocks, or spans that end at newlines.

A segmentation is `segment_ids [B,T]` int64: 0, 1, 2, ... along each response, -1 past its end. Segments count
raw response positions from the first response token on, masked ones included, so they do not depend on the
loss mask. Source: "Block64" and "NewlineSpan" of arXiv 2606.24084, section 3. The paper gives no lengths for
newline spans; the rules here are this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ray.objective.inputs import require_rank


def block_segments(response_lengths: Tensor, num_tokens: int, block_size: int | None) -> Tensor:
    """Cut each response into blocks of `block_size` tokens; the last block of a response may be shorter.

    Args:
        response_lengths: `[B]` integers, response tokens of each sequence, 0 to `num_tokens`.
        num_tokens: T, the width of the result.
        block_size: tokens in a block; 1 makes each token a segment, None makes each sequence one segment.

    Returns:
        segment_ids `[B,T]` int64, -1 past the end, on the device of `response_lengths`.

    Raises:
        ValueError: a length outside 0..T, or a block size below 1.
    """
    lengths = _checked_lengths(response_lengths, num_tokens)
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; use at least 1, or None for one segment a sequence")
    position = torch.arange(num_tokens, dtype=torch.int64, device=lengths.device)
    block = torch.zeros_like(position) if block_size is None else position // block_size
    return torch.where(position < lengths.unsqueeze(-1), block, -1)


def newline_segments(
    newline_mask: Tensor, response_lengths: Tensor, *, min_len: int, max_len: int, fallback_block: int
) -> Tensor:
    """Cut each response after its newline tokens, then merge short spans and split long ones.

    1. A token marked in `newline_mask` closes its span (masked or not in the loss); the response's end closes
    the last.
    2. Left to right, a span under `min_len` tokens merges into the next one; a short last one into the
    previous.
    3. A span over `max_len` is split into the fewest pieces that fit, near-equal, the longer pieces first.
    A response without any newline is cut into blocks of `fallback_block` instead. Span lengths are in
    `min_len .. max_len` whenever ``max_len >= 2 * min_len - 1`` and the response has at least `min_len`
    tokens.

    Args:
        newline_mask: `[B,T]` bool (or numbers, not 0 = true), true where a token's text contains a newline.
            Entries past a response's end may hold anything.
        response_lengths: `[B]` integers, response tokens of each sequence, 0 to T.
        min_len: shortest span in tokens, at least 1.
        max_len: longest span in tokens, at least `min_len`.
        fallback_block: block size in tokens for responses without a newline, at least 1.

    Returns:
        segment_ids `[B,T]` int64, -1 past the end, on the device of `newline_mask`. Spans are found on the
        CPU.

    Raises:
        ValueError: shapes that do not fit, a length outside 0..T, or limits out of order.
    """
    require_rank("newline_mask", newline_mask, 2, "[B,T]")
    if not 1 <= min_len <= max_len:
        raise ValueError(f"min_len is {min_len} and max_len {max_len}; use 1 <= min_len <= max_len")
    batch, num_tokens = newline_mask.shape
    lengths = _checked_lengths(response_lengths.cpu(), num_tokens)
    if lengths.shape[0] != batch:
        raise ValueError(f"newline_mask has {batch} rows but there are {lengths.shape[0]} lengths; give one a row")
    segment_ids = block_segments(lengths, num_tokens, fallback_block)
    newlines = newline_mask.bool().cpu()
    for row, length in enumerate(lengths.tolist()):
        ends = (newlines[row, :length].nonzero().flatten() + 1).tolist()
        if not ends:
            continue
        spans = _split_long(_merge_short(_span_lengths(ends, length), min_len), max_len)
        counts = torch.tensor(spans, dtype=torch.int64)
        segment_ids[row, :length] = torch.arange(len(spans), dtype=torch.int64).repeat_interleave(counts)
    return segment_ids.to(newline_mask.device)


def _checked_lengths(response_lengths: Tensor, num_tokens: int) -> Tensor:
    require_rank("response_lengths", response_lengths, 1, "[B]")
    if response_lengths.numel():
        low, high = (int(bound) for bound in torch.aminmax(response_lengths))
        if low < 0 or high > num_tokens:
            raise ValueError(
                f"response lengths range from {low} to {high}, but there are {num_tokens} columns; "
                f"give lengths from 0 to {num_tokens}"
            )
    return response_lengths


def _span_lengths(ends: list[int], length: int) -> list[int]:
    """Lengths of the spans that end at `ends` (exclusive, rising); what follows the last is a span too."""
    if ends[-1] < length:
        ends = [*ends, length]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _merge_short(spans: list[int], min_len: int) -> list[int]:
    merged: list[int] = []
    carried = 0
    for span in spans:
        carried += span
        if carried >= min_len:
            merged.append(carried)
            carried = 0
    if carried and merged:
        merged[-1] += carried
    elif carried:
        merged.append(carried)
    return merged


def _split_long(spans: list[int], max_len: int) -> list[int]:
    pieces: list[int] = []
    for span in spans:
        count = -(-span // max_len)
        short, longer = divmod(span, count)
        pieces += [short + 1] * longer + [short] * (count - longer)
    return pieces
