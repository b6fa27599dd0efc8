"""Spreads a step's trajectories over ranks and microbatches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from opd_ray.errors import ConfigError, DataError

Plan = tuple[tuple[tuple[int, ...], ...], ...]


def plan_microbatches(lengths: Sequence[int], num_ranks: int, tokens_per_microbatch: int) -> Plan:
    """Indices of trajectories by [rank][microbatch]; `lengths` are in tokens, prompt and response together.

    Each index appears once. A microbatch is padded to its longest row, and rows x longest stays within
    `tokens_per_microbatch`; a single trajectory longer than that gets a microbatch of its own (nothing is
    dropped). Ranks differ by at most the longest trajectory in tokens (longest first, to the rank with the
    fewest). All ranks have the same number of microbatches, the longest rows first; a rank with fewer gets
    empty ones at the end, for which a learner runs a dummy of zero loss so that collectives match. The plan
    depends on the arguments alone. Raises `ConfigError` on a bad size, `DataError` on a length under 1.
    """
    if num_ranks < 1 or tokens_per_microbatch < 1:
        raise ConfigError(f"{num_ranks} ranks and {tokens_per_microbatch} tokens a microbatch: give at least 1 of each")
    if lengths and min(lengths) < 1:
        raise DataError(f"trajectory {list(lengths).index(min(lengths))} has {min(lengths)} tokens: give at least 1")
    by_rank = [_pack(rank, lengths, tokens_per_microbatch) for rank in _assign(lengths, num_ranks)]
    most = max(len(microbatches) for microbatches in by_rank)
    return tuple((*microbatches, *((),) * (most - len(microbatches))) for microbatches in by_rank)


def _assign(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Trajectories of each rank, longest first: each goes to the rank with the fewest tokens so far."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    # Tokens, trajectories and number of each rank: a search among hundreds of ranks for each trajectory takes seconds.
    fewest = [(0, 0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, count, rank = fewest[0]
        ranks[rank].append(index)
        heapq.heapreplace(fewest, (tokens + lengths[index], count + 1, rank))
    return ranks


def _pack(indices: list[int], lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Cut `indices`, longest first, into microbatches: the first row sets the padded width."""
    microbatches: list[tuple[int, ...]] = []
    start = 0
    while start < len(indices):
        rows = max(1, budget // lengths[indices[start]])
        microbatches.append(tuple(indices[start : start + rows]))
        start += rows
    return microbatches
