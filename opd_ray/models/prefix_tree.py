"""Tokens that several sequences begin with go through the model once: above all a prompt, for all of its samples.

In a causal model the state at a token depends on the tokens up to it and on nothing else. Sequences that begin alike so
have the same states there, and a block of them is a tree of distinct prefixes. All that works on one token at a time
(embedding, projections, MLP: nearly all of the arithmetic) gets the tree's nodes as one row without padding. Attention
alone gets the padded rows, put together from the nodes, and thus the kernel, the causal mask and the cost that it has
without the tree; nodes take their gradients from all rows that they stand in. Losses and gradients are those of the
padded rows up to rounding, a microbatch takes no more memory, and a forward pass is still one pass through the modules,
as the collectives of ZeRO 3 want it.

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
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "prefix_tree"
# Families whose layers mix tokens in transformers' attention interface and nowhere else; tests hold each to that.
FAMILIES = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "qwen3_moe", "smollm3"})
# Nodes over padded tokens above which a tree costs more (rows are copied around attention) than it saves.
MAX_SHARE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """The distinct prefixes of B sequences that are padded to L tokens, as U nodes; a node is a prefix's last token.

    `token_ids`, `depths` int64 [U] are each node's token and its place in the sequence. `nodes` int64 [B * L] has the
    node of every slot of the padded block (any node where there is padding), `slots` int64 [U] a slot of every node.
    """

    token_ids: Tensor
    depths: Tensor
    nodes: Tensor
    slots: Tensor
    num_rows: int

    def to_rows(self, states: Tensor) -> Tensor:
        """[B, h, L, d] padded rows of the nodes' states [1, h, U, d]; differentiable."""
        _, heads, num_nodes, size = states.shape
        flat = states[0].transpose(0, 1).reshape(num_nodes, heads * size)
        return _picked(flat, self.nodes).view(self.num_rows, -1, heads, size).transpose(1, 2)

    def to_nodes(self, rows: Tensor) -> Tensor:
        """[1, U, h, d] of padded rows [B, L, h, d]; differentiable."""
        return _picked(rows.flatten(0, 1), self.slots)[None]

    def at(self, states: Tensor, positions: Tensor) -> Tensor:
        """[N, H] of the nodes' states [U, H], at `positions` [N] of the flattened padded block; differentiable."""
        return _picked(states, self.nodes[positions])


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``, whose backward adds up a row's gradients in a fixed order.

    Which of the two forms does depends on the device; the other one uses atomic adds, in the order of threads.
    """
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def prefix_tree(
    rows: Sequence[npt.NDArray[np.int32]], width: int, device: torch.device, max_share: float = MAX_SHARE
) -> PrefixTree | None:
    """The tree of some sequences padded to `width`; None if it has more than `max_share` of the padded tokens."""
    nodes = np.zeros((len(rows), width), dtype=np.int64)
    token_ids, depths, slots = [], [], []
    num_nodes = 0
    before, place = np.empty(0, dtype=np.int32), 0
    # In alphabetical order no sequence has more in common with any earlier one than with the one right before it.
    for row in sorted(range(len(rows)), key=lambda row: rows[row].astype(">u4").tobytes()):
        tokens = rows[row]
        known = _num_common(before, tokens)
        new = np.arange(known, len(tokens))
        nodes[row, :known] = nodes[place, :known]
        nodes[row, known : len(tokens)] = num_nodes + new - known
        token_ids.append(tokens[known:])
        depths.append(new)
        slots.append(row * width + new)
        num_nodes += len(new)
        before, place = tokens, row
    if num_nodes > max_share * nodes.size:
        return None

    def joined(parts: Sequence[npt.NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts, dtype=np.int64)).to(device)

    flat = torch.from_numpy(nodes.reshape(-1)).to(device)
    return PrefixTree(joined(token_ids), joined(depths), flat, joined(slots), len(rows))


def _num_common(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> int:
    """Tokens that two sequences begin with alike."""
    both = min(len(first), len(second))
    differs = first[:both] != second[:both]
    return int(differs.argmax()) if differs.any() else both


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix_tree: PrefixTree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention [1, U, h, d] of a tree's nodes [1, h, U, d] along their sequences; of plain rows without a tree.

    The signature is that of transformers' attention interface.
    """
    if prefix_tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tree = prefix_tree
    query, key, value = (tree.to_rows(states) for states in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return tree.to_nodes(output), None


def enable_prefix_trees(model: Any) -> bool:
    """Let a causal language model take a `PrefixTree`, if it is known to give the same results with one.

    That takes a family of `FAMILIES`, plain causal attention in all layers (no sliding window) and torch's kernels for
    it; others stay as they are.
    """
    config = model.config
    if config.model_type not in FAMILIES or config._attn_implementation != "sdpa" or not _is_plain(config):
        return False
    AttentionInterface.register(ATTENTION, tree_attention)
    model.set_attn_implementation(ATTENTION)
    return takes_prefix_trees(model)


def takes_prefix_trees(model: Any) -> bool:
    """Whether `enable_prefix_trees` found that the model can."""
    return bool(model.config._attn_implementation == ATTENTION)


def _is_plain(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return not (getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None))
