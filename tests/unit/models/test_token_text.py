"""The text of single tokens: joined it is the text of the whole, also where a character is spread over several."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_ray.models.token_text import token_labels, token_pieces


def byte_tokenizer() -> Any:
    """Byte-level BPE without a merge: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


BYTES = byte_tokenizer()


def test_a_spread_character_belongs_to_the_token_that_completes_it() -> None:
    ids = BYTES("aé😀\n")["input_ids"]
    assert token_pieces(BYTES, [], ids) == ("a", "", "é", "", "", "", "😀", "\n")


@given(st.text(max_size=40), st.text(max_size=10))
def test_joined_pieces_are_the_text(text: str, before: str) -> None:
    ids = BYTES(text)["input_ids"] if text else []
    context = BYTES(before)["input_ids"] if before else []
    pieces = token_pieces(BYTES, context, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 255), max_size=30))
def test_joined_pieces_are_what_the_tokenizer_makes_of_any_bytes(ids: list[int]) -> None:
    assert "".join(token_pieces(BYTES, [], ids)) == BYTES.decode(ids)


def test_endless_bytes_that_are_no_character_do_not_wait_for_the_end() -> None:
    (lone,) = BYTES.convert_tokens_to_ids(["©"])
    pieces = token_pieces(BYTES, [], [lone] * 100)
    assert "".join(pieces) == "�" * 100
    assert pieces[1] == "�"


@pytest.mark.parametrize(("token_id", "label"), [(500, "id 500"), (-1, "id -1")])
def test_an_id_that_the_tokenizer_does_not_know_is_named_by_its_number(token_id: int, label: str) -> None:
    assert token_labels(BYTES, [token_id]) == {token_id: label}


def test_an_id_that_is_no_character_has_the_tokenizers_name_of_it() -> None:
    first, second = BYTES("é")["input_ids"]
    assert token_labels(BYTES, [second, first]) == {first: "Ã", second: "©"}
    (letter,) = BYTES("x")["input_ids"]
    assert token_labels(BYTES, [letter, letter]) == {letter: "x"}
