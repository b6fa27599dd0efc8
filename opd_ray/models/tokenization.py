"""Prompts to token ids, and what makes two tokenizers the same. Imports transformers: workers only."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_ray.config.choices import Template
from opd_ray.data.templates import render
from opd_ray.errors import ModelError
from opd_ray.types import Prompt


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; raises `ModelError`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise cannot_load("tokenizer", path, error) from error
    return tokenizer


def cannot_load(what: str, path: str, error: Exception) -> ModelError:
    """The error for a part of a model that is not where `path` says."""
    return ModelError(
        f"no {what} can be loaded from {path!r} ({type(error).__name__}): give a folder written by "
        "save_pretrained, or a hub id where the hub can be reached"
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the mapping from tokens to ids: equal if and only if the same ids mean the same text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def newline_token_mask(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> npt.NDArray[np.bool_]:
    """[V] bool: the token's text contains a newline."""
    mask = np.zeros(vocab_size, dtype=np.bool_)
    for token_id in range(min(len(tokenizer), vocab_size)):
        mask[token_id] = "\n" in tokenizer.decode([token_id])
    return mask


class PromptTokenizer:
    """Renders a prompt with a template and encodes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, path: str) -> None:
        self._tokenizer: Any = tokenizer
        self._template = template
        if template.name not in ("completion", "completion_with_solution") and not self._tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {path!r} has no chat template, which template {template.name!r} needs: "
                "set data.template=completion and teacher.template=completion or completion_with_solution"
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt up to where the response starts."""
        rendered = render(self._template.name, prompt)
        if rendered.kind == "chat":
            ids = self._tokenizer.apply_chat_template(
                list(rendered.messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            ids = self._tokenizer(rendered.text)["input_ids"]
        return [int(token_id) for token_id in ids]
