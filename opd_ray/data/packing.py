"""Spreads a step's trajectories over ranks and microbatches, and a request's over a teacher's batches."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from opd_ray.errors import ConfigError, DataError

Plan = tuple[tuple[tuple[int, ...], ...], ...]
# What tells a trajectory's prompt from others, and its number of tokens.
PromptKey = tuple[str, int]

# What a slot of the padded block costs in attention, against a token in all the rest of the model.
ATTENTION_COST = 1 / 8
# What a microbatch costs beside its tokens, in tokens (small products, kernel launches, parameters that are gathered).
MICROBATCH_COST = 256


def plan_microbatches(
    lengths: Sequence[int], num_ranks: int, tokens_per_microbatch: int, prompts: Sequence[PromptKey] = ()
) -> Plan:
    """Indices of trajectories by [rank][microbatch]; `lengths` are in tokens, prompt and response together.

    Each index appears once. A microbatch is padded to its longest row, and rows x longest stays within
    `tokens_per_microbatch`; a single trajectory longer than that gets a microbatch of its own (nothing is
    dropped). Ranks differ by at most the longest trajectory in tokens (longest first, to the rank with the
    fewest). All ranks have the same number of microbatches, the longest rows first; a rank with fewer gets
    empty ones at the end, for which a learner runs a dummy of zero loss so that collectives match. The plan
    depends on the arguments alone. Raises `ConfigError` on a bad size, `DataError` on a length under 1.

    With `prompts`, for a learner that computes a prompt once for its trajectories in a microbatch, those may stand
    together, and several of a prompt go to a rank at once: wherever the rank with the most work (`work_of`) then has
    less of it than by the rules above. The bound on padded tokens holds as it does without.
    """
    if num_ranks < 1 or tokens_per_microbatch < 1:
        raise ConfigError(f"{num_ranks} ranks and {tokens_per_microbatch} tokens a microbatch: give at least 1 of each")
    if lengths and min(lengths) < 1:
        raise DataError(f"trajectory {list(lengths).index(min(lengths))} has {min(lengths)} tokens: give at least 1")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ranks = _assign([[index] for index in longest_first], lambda unit: lengths[unit[0]], num_ranks)
    best = [_pack(rank, lengths, tokens_per_microbatch) for rank in ranks]
    if prompts:
        by_prompt = together(longest_first, prompts)
        for size in _sizes(by_prompt, prompts):
            ranks = _assign(_units(by_prompt, prompts, size, lengths), _counter(lengths, prompts), num_ranks)
            orders = [together(sorted(rank, key=lambda i: (-lengths[i], i)), prompts) for rank in ranks]
            other = [least_work(order, lengths, prompts, tokens_per_microbatch, MICROBATCH_COST) for order in orders]
            best = min(best, other, key=lambda plan: _most_work(plan, lengths, prompts))
    most = max(len(microbatches) for microbatches in best)
    return tuple((*_by_width(found, lengths), *((),) * (most - len(found))) for found in best)


def work_of(members: Sequence[int], lengths: Sequence[int], prompts: Sequence[PromptKey], batch_cost: int) -> float:
    """What a batch costs, in tokens: each prompt once and all responses, attention over the padded block, its share."""
    padded = len(members) * max(lengths[index] for index in members)
    return _counter(lengths, prompts)(members) + ATTENTION_COST * padded + batch_cost


def together(order: Sequence[int], prompts: Sequence[PromptKey]) -> list[int]:
    """`order` with the trajectories of a prompt behind its first one."""
    groups: dict[PromptKey, list[int]] = {}
    for index in order:
        groups.setdefault(prompts[index], []).append(index)
    return [index for group in groups.values() for index in group]


def least_work(
    order: Sequence[int], lengths: Sequence[int], prompts: Sequence[PromptKey], budget: int, batch_cost: int
) -> list[tuple[int, ...]]:
    """`order`, in which a prompt's trajectories stand together, cut into batches with the least `work_of` in all.

    Rows x longest of a batch stays within `budget`, or it has one row. Found by dynamic programming.
    """
    # work[i] is the least for what comes from place i on, whose first batch ends before place cut[i].
    work = [0.0] * (len(order) + 1)
    cut = [0] * len(order)
    for first in reversed(range(len(order))):
        tokens = width = 0
        work[first] = float("inf")
        for end in range(first + 1, len(order) + 1):
            index = order[end - 1]
            width = max(width, lengths[index])
            if end - first > 1 and (end - first) * width > budget:
                break
            is_known = end - first > 1 and prompts[order[end - 2]] == prompts[index]
            tokens += lengths[index] - prompts[index][1] * is_known
            total = tokens + ATTENTION_COST * (end - first) * width + batch_cost + work[end]
            if total < work[first]:
                work[first], cut[first] = total, end
    batches = []
    first = 0
    while first < len(order):
        batches.append(tuple(order[first : cut[first]]))
        first = cut[first]
    return batches


def _counter(lengths: Sequence[int], prompts: Sequence[PromptKey]) -> Callable[[Sequence[int]], int]:
    """Tokens of some trajectories, each prompt counted once."""

    def count(members: Sequence[int]) -> int:
        responses = sum(lengths[index] - prompts[index][1] for index in members)
        return responses + sum(tokens for _, tokens in {prompts[index] for index in members})

    return count


def _most_work(
    plan: Sequence[Sequence[tuple[int, ...]]], lengths: Sequence[int], prompts: Sequence[PromptKey]
) -> float:
    """Of the rank that has the most; a placeholder costs what a microbatch costs beside its tokens."""
    most = max(len(microbatches) for microbatches in plan)
    works = (
        sum(work_of(members, lengths, prompts, 0) for members in microbatches) + MICROBATCH_COST * most
        for microbatches in plan
    )
    return max(works)


def _sizes(by_prompt: Sequence[int], prompts: Sequence[PromptKey]) -> list[int]:
    """How many trajectories of a prompt to keep on a rank: all, half as many, and so on down to one."""
    largest = max(Counter(prompts[index] for index in by_prompt).values(), default=1)
    return sorted({-(-largest // 2**power) for power in range(largest.bit_length() + 1)}, reverse=True)


def _units(
    by_prompt: Sequence[int], prompts: Sequence[PromptKey], size: int, lengths: Sequence[int]
) -> list[list[int]]:
    """Up to `size` trajectories of a prompt each, those with the most tokens first."""
    units: list[list[int]] = []
    for index in by_prompt:
        if units and len(units[-1]) < size and prompts[units[-1][0]] == prompts[index]:
            units[-1].append(index)
        else:
            units.append([index])
    count = _counter(lengths, prompts)
    return sorted(units, key=lambda unit: (-count(unit), unit))


def _assign(units: list[list[int]], tokens: Callable[[list[int]], int], num_ranks: int) -> list[list[int]]:
    """Trajectories of each rank, unit after unit: each goes to the rank with the fewest tokens so far."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    # Tokens, trajectories and number of each rank: a search among hundreds of ranks for each unit takes seconds.
    fewest = [(0, 0, rank) for rank in range(num_ranks)]
    for unit in units:
        total, count, rank = fewest[0]
        ranks[rank] += unit
        heapq.heapreplace(fewest, (total + tokens(unit), count + len(unit), rank))
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


def _by_width(microbatches: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    return sorted(microbatches, key=lambda members: -max(lengths[index] for index in members))
