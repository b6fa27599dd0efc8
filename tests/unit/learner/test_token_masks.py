"""Mask rules: the ids that they name under a tokenizer, and the tokens that they remove."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_ray.config.choices import MaskRule
from opd_ray.errors import ModelError
from opd_ray.learner.token_masks import TokenMasks

UNKNOWN = 9


class PieceTokenizer:
    """Knows "<" as one piece, "think" as two, and "<|im_end|>" as a special token; 9 is the unknown token."""

    eos_token_id: int | None = 5
    unk_token_id = UNKNOWN
    all_special_ids = (5, 6)
    pieces: dict[str, list[int]] = {"<": [1], "think": [2, 3], "<|im_end|>": [5]}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self.pieces[text]}


def removed(rule: MaskRule, tokenizer: Any, token_ids: list[int]) -> list[int]:
    ids = torch.tensor([token_ids])
    found = TokenMasks([rule], tokenizer).removed(ids, torch.ones_like(ids, dtype=torch.bool))
    assert list(found) == [rule.name]
    positions: list[int] = found[rule.name][0].nonzero().flatten().tolist()
    return positions


def test_the_first_occurrence_of_each_piece_leaves() -> None:
    assert removed(MaskRule.first_think_and_end, PieceTokenizer(), [7, 2, 1, 2, 1, 3, 5, 5]) == [1, 2, 5, 6]


def test_every_special_token_leaves() -> None:
    assert removed(MaskRule.special_tokens, PieceTokenizer(), [6, 1, 5, 5]) == [0, 2, 3]


def test_every_end_of_sequence_leaves() -> None:
    assert removed(MaskRule.end_of_sequence, PieceTokenizer(), [6, 1, 5, 5]) == [2, 3]


def test_padding_is_not_looked_at() -> None:
    ids = torch.tensor([[7, 5, 5], [7, 7, 5]])
    in_response = torch.tensor([[True, True, False], [True, True, True]])
    found = TokenMasks([MaskRule.end_of_sequence], PieceTokenizer()).removed(ids, in_response)
    assert found["end_of_sequence"].tolist() == [[False, True, False], [False, False, True]]


def test_a_rule_that_names_no_token_is_refused() -> None:
    nameless = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ModelError, match="end_of_sequence"):
        TokenMasks([MaskRule.end_of_sequence], nameless)


def test_unknown_pieces_are_not_taken_for_tokens() -> None:
    tokenizer = PieceTokenizer()
    tokenizer.pieces = {"<": [UNKNOWN], "think": [UNKNOWN], "<|im_end|>": [UNKNOWN]}
    with pytest.raises(ModelError, match="first_think_and_end"):
        TokenMasks([MaskRule.first_think_and_end], tokenizer)
