"""Figures of the full softmax for diagnostics: log-probs, log-sum-exp, entropy and top-K in one pass over the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype
from opd_ray.objective.lm_head import check_token_ids, require_chunk_size, require_head
from opd_ray.objective.lm_head_tiles import RunningSoftmax, choose_within, logit_tiles


@dataclass(frozen=True)
class HeadStatistics:
    """What `head_statistics` returns; floats are float32 (float64 if an input is float64), in nats, without graph."""

    logprobs: Tensor | None  # [N], of the given tokens; None if none were given
    logsumexp: Tensor  # [N], of the full vocabulary's logits
    entropy: Tensor  # [N], of the full softmax
    topk_ids: Tensor  # [N, top_k] int64, most likely first
    topk_logprobs: Tensor  # [N, top_k], over the full vocabulary


def head_statistics(
    hidden: Tensor, head_weight: Tensor, token_ids: Tensor | None, *, chunk_size: int, top_k: int = 0
) -> HeadStatistics:
    """Return log-probs, log-sum-exp, entropy and the most likely tokens of each position, at temperature 1.

    One pass over tiles of the head, as in `token_logprobs`, which holds one tile of logits more here, and the top
    of a tile. Tokens of equal logit may come in any order.

    Args:
        hidden: `[N,H]`, the last hidden states, after the final norm.
        head_weight: `[V,H]`, any float dtype.
        token_ids: `[N]` integers in 0..V-1, or None.
        chunk_size: positions in a tile, at least 1.
        top_k: how many of the most likely tokens to return, 0 to V.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, a chunk size below 1, or `top_k` outside
            0..V.
    """
    require_head(hidden, head_weight)
    require_chunk_size(chunk_size)
    if token_ids is not None:
        token_ids = check_token_ids(token_ids, hidden, head_weight)
    if not 0 <= top_k <= head_weight.shape[0]:
        raise ValueError(
            f"top_k is {top_k}, but the head has {head_weight.shape[0]} rows; use 0 to {head_weight.shape[0]}"
        )
    with torch.no_grad():
        return _statistics(hidden, head_weight, token_ids, chunk_size, top_k)


def _statistics(
    hidden: Tensor, head_weight: Tensor, token_ids: Tensor | None, chunk_size: int, top_k: int
) -> HeadStatistics:
    dtype, count = compute_dtype(hidden, head_weight), hidden.shape[0]
    softmax = RunningSoftmax(count, hidden, dtype, entropy=True)
    chosen = hidden.new_zeros(count, dtype=dtype)
    top = hidden.new_full((count, top_k), -torch.inf, dtype=dtype)
    top_ids = torch.zeros((count, top_k), dtype=torch.int64, device=hidden.device)
    for first, _, where, logits in logit_tiles(hidden, head_weight, chunk_size):
        if token_ids is not None:
            choose_within(logits, token_ids[where], first, chosen[where])
        if top_k:
            values, columns = logits.topk(min(top_k, logits.shape[1]), dim=1)
            both, both_ids = torch.cat([top[where], values], 1), torch.cat([top_ids[where], columns + first], 1)
            top[where], order = both.topk(top_k, dim=1)
            top_ids[where] = both_ids.gather(1, order)
        softmax.add(where, logits)
    logsumexp = softmax.logsumexp()
    return HeadStatistics(
        logprobs=None if token_ids is None else chosen - logsumexp,
        logsumexp=logsumexp,
        entropy=softmax.entropy(),
        topk_ids=top_ids,
        topk_logprobs=top - logsumexp.unsqueeze(1),
    )
