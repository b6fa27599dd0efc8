"""Loading of causal language models, and the part of their forward pass that both teacher and learner use.

Imports torch and transformers: workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_ray.config.choices import Dtype
from opd_ray.errors import ModelError
from opd_ray.models.prefix_tree import PrefixTree, enable_prefix_trees, prefix_tree


def load_causal_lm(path: str, dtype: Dtype) -> Any:
    """A causal language model of a folder or hub id, which takes prefix trees if it can; raises `ModelError`."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype.name))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model can be loaded from {path!r} ({' '.join(str(error).split())[:200]}): give a folder written by "
            "save_pretrained, or a hub id where the hub can be reached"
        ) from error
    enable_prefix_trees(model)
    return model


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Some sequences as one right-padded block, and where their responses are predicted.

    `input_ids` [B, L], without the sequences' last tokens, which predict nothing that is asked for; `positions` int64
    [N] are indices into the flattened [B * L] whose hidden states predict the response tokens, row after row; `lengths`
    holds each row's response tokens, N = sum(lengths). With a `tree`, a forward pass takes that instead of `input_ids`.
    """

    input_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    tree: PrefixTree | None = None

    @property
    def num_computed(self) -> int:
        """Tokens that a forward pass computes, padding included."""
        return self.input_ids.numel() if self.tree is None else len(self.tree.token_ids)

    @property
    def row_index(self) -> tuple[Tensor, Tensor]:
        """For each of the N positions its row and its response column, to put [N] values into [B, T]."""
        device = self.positions.device
        rows = torch.cat([torch.full((length,), row, device=device) for row, length in enumerate(self.lengths)])
        columns = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        return rows, columns


def pad_rows(
    prompts: Sequence[npt.NDArray[np.int32]],
    responses: Sequence[npt.NDArray[np.int32]],
    pad_id: int,
    device: torch.device,
    *,
    with_tree: bool = False,
) -> PaddedRows:
    """One block of ``prompt + response`` sequences; `with_tree` for models that take one, where it saves something.

    Padding is on the right and attention is causal, so that no valid position ever sees it: no mask is needed.
    """
    rows = [
        np.concatenate([prompt, response[:-1]], dtype=np.int32)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    positions = []
    for number, (row, prompt, response) in enumerate(zip(rows, prompts, responses, strict=True)):
        input_ids[number, : len(row)] = row
        # The state at the last prompt token predicts the first response token.
        positions.append(number * width + len(prompt) - 1 + np.arange(len(response)))
    return PaddedRows(
        input_ids=torch.from_numpy(input_ids).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        lengths=tuple(len(response) for response in responses),
        tree=prefix_tree(rows, width, device) if with_tree else None,
    )


def hidden_states(model: Any, block: PaddedRows) -> Tensor:
    """Final hidden states [N, H] at the block's positions."""
    tree = block.tree
    if tree is None:
        hidden: Tensor = model.base_model(input_ids=block.input_ids, use_cache=False).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])[block.positions]
    outputs = model.base_model(
        input_ids=tree.token_ids[None], position_ids=tree.depths[None], use_cache=False, prefix_tree=tree
    )
    return tree.at(outputs.last_hidden_state[0], block.positions)
