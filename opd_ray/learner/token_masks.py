"""Token ids that a mask rule names, and the response tokens that it takes out of the loss.

Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from opd_ray.config.choices import MaskRule
from opd_ray.errors import ModelError
from opd_ray.objective import any_occurrence, first_occurrence

# The strings of arXiv 2603.25562's code; each piece of a string that is several tokens counts by itself.
FIRST_THINK_AND_END = ("<", "think", "<|im_end|>")


class TokenMasks:
    """The rules of a run with the token ids that they name under one tokenizer.

    Raises `ModelError` when a rule names no token of the tokenizer.
    """

    def __init__(self, rules: Sequence[MaskRule], tokenizer: Any) -> None:
        self._ids = {rule: _ids_of(rule, tokenizer) for rule in rules}
        for rule, ids in self._ids.items():
            if not ids:
                raise ModelError(
                    f"objective.mask_rules names {rule.name}, but this tokenizer has none of its tokens: leave it out"
                )

    def removed(self, token_ids: Tensor, in_response: Tensor) -> dict[str, Tensor]:
        """[B, T] bool for each rule: the response tokens that it removes; `token_ids`, `in_response` are [B, T]."""
        found = {}
        for rule, ids in self._ids.items():
            if rule is MaskRule.first_think_and_end:
                found[rule.name] = first_occurrence(token_ids, in_response, ids)
            else:
                found[rule.name] = any_occurrence(token_ids, ids) & in_response
        return found


def _ids_of(rule: MaskRule, tokenizer: Any) -> tuple[int, ...]:
    if rule is MaskRule.end_of_sequence:
        ids = {tokenizer.eos_token_id}
    elif rule is MaskRule.special_tokens:
        ids = set(tokenizer.all_special_ids)
    else:
        pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in FIRST_THINK_AND_END]
        ids = {token_id for piece in pieces for token_id in piece} - {tokenizer.unk_token_id}
    return tuple(sorted(int(token_id) for token_id in ids if token_id is not None))
