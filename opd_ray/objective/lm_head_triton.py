"""Triton kernels that read the support's head rows where they lie, without the gathered copy `[c,K,H]`.

Imported only when asked for. The torch path of `lm_head` is the reference. With TRITON_INTERPRET=1 the kernels run
on the CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_WIDTH = 128  # columns of the head read at once
MAX_BLOCK_ENTRIES = 32  # support entries read at once


def require_device(tensor: Tensor) -> None:
    """Raise ValueError where the kernels cannot run on `tensor`."""
    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"kernel 'triton' got tensors on {tensor.device}; use kernel 'torch' there")


def gathered_logits(hidden: Tensor, head_weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``hidden[n] @ head_weight[ids[n, k]]`` as `[N,K]`, added up in `dtype`; `ids` int64 in 0..V-1."""
    hidden, head_weight, ids = hidden.contiguous(), head_weight.contiguous(), ids.contiguous()
    count, size = ids.shape
    logits = torch.empty((count, size), dtype=dtype, device=hidden.device)
    block = _entries_per_block(size)
    if logits.numel():
        _logits_kernel[(count, triton.cdiv(size, block))](
            hidden, head_weight, ids, logits, size, hidden.shape[1], _sum_dtype(dtype), block, BLOCK_WIDTH
        )
    return logits


def hidden_gradient(grad: Tensor, hidden: Tensor, head_weight: Tensor, ids: Tensor) -> Tensor:
    """Return sum over k of ``grad[n, k] * head_weight[ids[n, k]]`` as `[N,H]` in `hidden`'s dtype."""
    grad, head_weight, ids = grad.contiguous(), head_weight.contiguous(), ids.contiguous()
    count, size = ids.shape
    result = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if result.numel():
        _gradient_kernel[(count, triton.cdiv(hidden.shape[1], BLOCK_WIDTH))](
            grad,
            head_weight,
            ids,
            result,
            size,
            hidden.shape[1],
            _sum_dtype(grad.dtype),
            _entries_per_block(size),
            BLOCK_WIDTH,
        )
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _logits_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913  (a kernel's arguments)
    hidden,
    head,
    ids,
    logits,
    size,
    width,
    SUM: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: one position and ENTRIES of its support."""
    position = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.load(ids + position * size + entry, mask=entry < size, other=0)
    total = tl.zeros([ENTRIES], dtype=SUM)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        state = tl.load(hidden + position * width + column, mask=column < width, other=0.0).to(SUM)
        inside = (entry < size)[:, None] & (column < width)[None, :]
        part = tl.load(head + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(SUM)
        total += tl.sum(part * state[None, :], axis=1)
    tl.store(logits + position * size + entry, total, mask=entry < size)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913  (a kernel's arguments)
    grad,
    head,
    ids,
    result,
    size,
    width,
    SUM: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: one position and WIDTH columns of its gradient."""
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=SUM)
    for start in range(0, size, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        row = tl.load(ids + position * size + entry, mask=entry < size, other=0)
        scale = tl.load(grad + position * size + entry, mask=entry < size, other=0.0).to(SUM)
        inside = (entry < size)[:, None] & (column < width)[None, :]
        part = tl.load(head + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(SUM)
        total += tl.sum(part * scale[:, None], axis=0)
    tl.store(result + position * width + column, total.to(result.dtype.element_ty), mask=column < width)


def _entries_per_block(size: int) -> int:
    return min(MAX_BLOCK_ENTRIES, int(triton.next_power_of_2(max(1, size))))


def _sum_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
