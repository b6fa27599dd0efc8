"""The teacher's forward pass: log-probs of sampled tokens and of a support of K ids at every response position.

Imports torch and transformers: teacher workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.config.choices import Dtype
from opd_ray.data.packing import least_work, together
from opd_ray.errors import SchemaError
from opd_ray.models.loading import PaddedRows, hidden_states, load_causal_lm, pad_rows
from opd_ray.models.prefix_tree import takes_prefix_trees

Ids = npt.NDArray[np.int32]
# Logits that exist at once, so that [N, V] never does as a whole: 2^25 float32 are 128 MiB.
MAX_LOGITS = 2**25
# Columns of a group in `top_entries`.
GROUP = 64
# What one forward pass costs beside its tokens' share, in tokens (small products, kernel launches).
BATCH_COST = {"cpu": 32, "cuda": 1024}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One response of T tokens as the teacher sees it: raw log-probs (nats) over the ids shared with the student."""

    logprobs: npt.NDArray[np.float32]  # [T], of the sampled tokens
    topk_ids: Ids  # [T, K], the support: best first where the teacher chose it, else as given
    topk_logprobs: npt.NDArray[np.float32]  # [T, K], at the support


class TeacherModel:
    """A causal language model that scores responses; on the GPU where there is one."""

    def __init__(self, path: str, dtype: Dtype, pad_id: int, vocab_size: int, max_batch_tokens: int) -> None:
        """`vocab_size` ids mean the same to student and teacher; `max_batch_tokens` counts padding. `ModelError`."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = load_causal_lm(path, dtype).to(self._device).eval()
        self._head: Tensor = self._model.get_output_embeddings().weight[:vocab_size].detach()
        # Kept: to have pages of this size again for every chunk costs a CPU as much time as a pass over them.
        self._logits = self._head.new_empty(max(1, MAX_LOGITS // len(self._head)), len(self._head))
        self._takes_trees = takes_prefix_trees(self._model)
        self._pad_id = pad_id
        self._max_batch_tokens = max_batch_tokens

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Ids], support: int | Sequence[Ids]
    ) -> list[Scores]:
        """Scores of each response [T] after its prompt; `support` is K, for the teacher's own top-K, or ids [T, K].

        Raises `SchemaError` when an id is none of those that student and teacher share.
        """
        given = None if isinstance(support, int) else support
        self._check_shared("response_token_ids", responses)
        self._check_shared("student_topk_ids", given or ())
        # The last token predicts nothing that is asked for, and is left out.
        lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
        results: dict[int, Scores] = {}
        for members in self._batches(prompts, lengths):
            block = pad_rows(
                [np.asarray(prompts[i], dtype=np.int32) for i in members],
                [responses[i] for i in members],
                self._pad_id,
                self._device,
                with_tree=self._takes_trees,
            )
            wanted = self._joined([responses[i] for i in members])
            at = support if given is None else self._joined([given[i] for i in members])
            with torch.inference_mode():
                outputs = self._score_block(block, wanted, at)
            parts = [torch.split(value.cpu(), list(block.lengths)) for value in outputs]
            for member, *row in zip(members, *parts, strict=True):
                results[member] = Scores(*(value.numpy() for value in row))
        return [results[index] for index in range(len(prompts))]

    def _batches(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        cost = BATCH_COST[self._device.type]
        if not self._takes_trees:
            return batches_by_length(lengths, self._max_batch_tokens, cost)
        numbers: dict[tuple[int, ...], int] = {}
        # A prompt's last token is part of what is computed once, too.
        keys = [(str(numbers.setdefault(tuple(prompt), len(numbers))), len(prompt)) for prompt in prompts]
        longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return least_work(together(longest_first, keys), lengths, keys, self._max_batch_tokens, cost)

    def shutdown(self) -> None:
        """Nothing was started."""

    def _check_shared(self, column: str, arrays: Sequence[Ids]) -> None:
        largest = max((int(array.max()) for array in arrays if array.size), default=-1)
        if largest >= len(self._head):
            raise SchemaError(
                f"column {column!r} has the id {largest} and student and teacher share {len(self._head)} ids: "
                "choose a teacher with the student's vocabulary size"
            )

    def _joined(self, arrays: Sequence[Ids]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(self._device)

    def _score_block(self, block: PaddedRows, sampled_ids: Tensor, support: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled log-probs [N], support ids int32 [N, K] and their log-probs [N, K] of one padded block."""
        hidden = hidden_states(self._model, block)
        parts = []
        for start in range(0, len(hidden), len(self._logits)):
            part = slice(start, start + len(self._logits))
            wanted = support if isinstance(support, int) else support[part]
            parts.append(self._score_chunk(hidden[part], sampled_ids[part], wanted))
        sampled, ids, logprobs = (torch.cat(values) for values in zip(*parts, strict=True))
        return sampled, ids.to(torch.int32), logprobs

    def _score_chunk(self, hidden: Tensor, sampled_ids: Tensor, support: int | Tensor) -> tuple[Tensor, ...]:
        # Raw log-probs, at temperature 1, over the ids that the student has too.
        logits = torch.mm(hidden, self._head.T, out=self._logits[: len(hidden)]).float()
        if isinstance(support, int):
            chosen, ids = top_entries(logits, support)
            largest = chosen[:, :1]
        else:
            chosen, ids = logits.gather(1, support), support
            largest = logits.amax(-1, keepdim=True)
        sampled = logits.gather(1, sampled_ids[:, None])
        # In place: a second [n, V] would cost more than the sum itself.
        log_total = largest + logits.sub_(largest).exp_().sum(-1, keepdim=True).log()
        return (sampled - log_total)[:, 0], ids, chosen - log_total


def top_entries(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [n, V], largest first, and their columns; the same as ``values.topk(k)`` up to ties.

    Where V is large, they are looked for in the k groups of columns with the largest maxima only: no entry of another
    group can be among them, as the maxima of those k groups are k entries that are as large.
    """
    num_groups, rest = divmod(values.shape[1], GROUP)
    if rest or num_groups < 4 * k:
        found = values.topk(k, dim=-1)
        return found.values, found.indices
    grouped = values.view(len(values), num_groups, GROUP)
    groups = grouped.amax(-1).topk(k, dim=-1).indices
    candidates = grouped.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    found = candidates.topk(k, dim=-1)
    return found.values, groups.gather(1, found.indices // GROUP) * GROUP + found.indices % GROUP


def batches_by_length(lengths: Sequence[int], max_batch_tokens: int, batch_cost: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most `max_batch_tokens` padded tokens (or one sequence).

    The batches are those with the least work in all, which is their padded tokens and `batch_cost` tokens for each
    batch: longest first, found by dynamic programming over the sorted lengths.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # work[i] is the least for the sequences from the i-th longest on, whose first batch ends before the cut[i]-th.
    work = [0] * (len(order) + 1)
    cut = [0] * len(order)
    for first in reversed(range(len(order))):
        width = lengths[order[first]]
        last = min(len(order), first + max(1, max_batch_tokens // width))
        choices = ((width * (end - first) + batch_cost + work[end], end) for end in range(first + 1, last + 1))
        work[first], cut[first] = min(choices)
    batches = []
    first = 0
    while first < len(order):
        batches.append(order[first : cut[first]])
        first = cut[first]
    return batches
