"""The text of single tokens, for people. Takes a transformers tokenizer: workers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# What a decoder puts where bytes are no character (yet).
_REPLACEMENT = "�"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most
# After so many tokens that complete no character, the text is not waited for any longer.
_MAX_PENDING = 32


def token_pieces(tokenizer: Any, context: Sequence[int], token_ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each of `token_ids` adds after `context`, which ends with a whole character; joined, their text.

    A character that is spread over several tokens belongs to the token that completes it; those before have none of it.
    """
    # The last character before tells a tokenizer that this is not the start of a text.
    ids = [*context[-_LONGEST_CHARACTER:], *token_ids]
    first = len(ids) - len(token_ids)
    start, pending = 0, 0
    emitted = len(_decoded(tokenizer, ids[:first]))
    pieces = []
    for end in range(first + 1, len(ids) + 1):
        text = _decoded(tokenizer, ids[start:end])
        if text.endswith(_REPLACEMENT) and end < len(ids) and pending < _MAX_PENDING:
            # All but the last character can be told already.
            stable, pending = text[:-1], pending + 1
            pieces.append(stable[emitted:])
            emitted = max(emitted, len(stable))
            continue
        pieces.append(text[emitted:])
        start, pending = end - 1 - pending, 0
        emitted = len(_decoded(tokenizer, ids[start:end]))
    return tuple(pieces)


def token_labels(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """A text for each id by itself; where it is no whole character, the tokenizer's own name of it."""
    return {token_id: _label(tokenizer, token_id) for token_id in sorted(set(token_ids))}


def _label(tokenizer: Any, token_id: int) -> str:
    if not 0 <= token_id < len(tokenizer):
        return f"id {token_id}"
    text = _decoded(tokenizer, [token_id])
    if not text or _REPLACEMENT in text:
        text = tokenizer.convert_ids_to_tokens(token_id) or f"id {token_id}"
    return text


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
