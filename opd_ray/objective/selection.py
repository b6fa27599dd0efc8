"""Selection of the response positions that take part in the loss: by entropy, or by token id."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_ray.objective.inputs import require_rank, require_same_shape

# top_share * tokens is a whole number of tokens if it is one up to rounding.
ROUNDING = 1e-9


def select_by_entropy(entropy: Tensor, response_mask: Tensor, *, top_share: float) -> Tensor:
    """Keep the valid positions of highest entropy in each response: ceil(top_share * valid) of them.

    Of equal entropies the earlier position goes first; NaN counts as lowest.

    Source: Wang et al., "Beyond the 80/20 Rule", arXiv 2506.01939 (there over a batch; here in each response,
    so that the choice does not depend on the batch).

    Args:
        entropy: `[B,T]`, of the student's next-token distribution, in nats; anything at masked positions.
        response_mask: `[B,T]`, bool or 0/1.
        top_share: in (0, 1]; 1 keeps every valid position.

    Returns:
        `[B,T]` bool.

    Raises:
        ValueError: shapes differ or are not `[B,T]`, or a share out of range.
    """
    require_rank("entropy", entropy, 2, "[B,T]")
    require_same_shape(entropy=entropy, response_mask=response_mask)
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share is {top_share}; use a number above 0 and at most 1")
    valid = response_mask > 0
    keep = (top_share * valid.sum(dim=1, keepdim=True).double() - ROUNDING).ceil()
    height = torch.where(entropy.isnan(), -math.inf, entropy.detach())
    by_entropy = height.argsort(dim=1, descending=True, stable=True)
    # A second stable sort puts valid positions first and leaves the order among them.
    order = by_entropy.gather(1, (~valid).gather(1, by_entropy).long().argsort(dim=1, stable=True))
    rank = torch.arange(valid.shape[1], device=valid.device).expand_as(order)
    return torch.zeros_like(valid).scatter(1, order, rank < keep) & valid


def first_occurrence(token_ids: Tensor, response_window: Tensor, ids: Sequence[int]) -> Tensor:
    """Mark the first occurrence of each of `ids` in each response.

    This is the rule of the special-token mask in the code of arXiv 2603.25562: the ids of a few strings such as
    "<think>" are looked up one by one, and the first position of each leaves the loss.

    Args:
        token_ids: `[B,T]` integers, response tokens.
        response_window: `[B,T]`, bool or 0/1, the response's own positions, whether in the loss or not.
        ids: token ids; repeated ones change nothing.

    Returns:
        `[B,T]` bool, one position at most per row and id.

    Raises:
        ValueError: shapes differ or are not `[B,T]`.
    """
    require_rank("token_ids", token_ids, 2, "[B,T]")
    require_same_shape(token_ids=token_ids, response_window=response_window)
    marked = torch.zeros_like(token_ids, dtype=torch.bool)
    for wanted in ids:
        hits = (token_ids == wanted) & (response_window > 0)
        marked |= hits & (hits.cumsum(dim=1) == 1)
    return marked


def any_occurrence(token_ids: Tensor, ids: Sequence[int]) -> Tensor:
    """Mark every token that is one of `ids`.

    Args:
        token_ids: integers of any shape.
        ids: token ids; none marks nothing.

    Returns:
        Same shape, bool.
    """
    return torch.isin(token_ids, torch.tensor(list(ids), dtype=token_ids.dtype, device=token_ids.device))
