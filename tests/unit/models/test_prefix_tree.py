"""What sequences begin with alike is computed once, and nothing else changes: states, scores, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from opd_ray.config.choices import Dtype
from opd_ray.models.loading import PaddedRows, hidden_states, load_causal_lm, pad_rows
from opd_ray.models.prefix_tree import FAMILIES, enable_prefix_trees, prefix_tree, takes_prefix_trees
from opd_ray.teacher.transformers_backend import TeacherModel
from opd_ray.tiny.paths import teacher_path

CPU = torch.device("cpu")
VOCAB = 12
Ids = npt.NDArray[np.int32]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Above the standard weights, so that attention is not nearly even.
    "initializer_range": 0.4,
}
# What a family needs beside its sizes to have plain causal attention.
PLAIN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
OTHER: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {"attn_implementation": "eager"},
    "gpt_neox": {},
}


def random_model(family: str, **options: Any) -> Any:
    """A small random model in float64, with trees where it takes them."""
    attention = options.pop("attn_implementation", "sdpa")
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **SIZES, **options)
    make: Any = AutoModelForCausalLM.from_config
    # The grouped product of experts knows no float64.
    model = make(config, attn_implementation=attention, experts_implementation="eager").double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # transformers' own goes through float32 on the way, whatever the model's dtype.
            module.forward = partial(torch.rms_norm, normalized_shape=module.weight.shape, weight=module.weight)
    enable_prefix_trees(model)
    return model


@cache
def llama() -> Any:
    return random_model("llama")


def ids(*tokens: int) -> Ids:
    return np.array(tokens, dtype=np.int32)


def samples(seed: int, shapes: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[Ids], list[Ids]]:
    """Prompts and responses, in a random order, of (prompt tokens, response lengths) for each prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for num_tokens, lengths in shapes:
        prompt = rng.integers(1, VOCAB, num_tokens).astype(np.int32)
        rows += [(prompt, rng.integers(1, VOCAB, length).astype(np.int32)) for length in lengths]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [response for _, response in rows]


def states_and_gradients(model: Any, block: PaddedRows) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Hidden states at the block's positions, and gradients of a fixed random function of them."""
    model.zero_grad()
    states = hidden_states(model, block)
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
    torch.autograd.backward((states.tanh() * direction).sum())
    return states.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(model: Any, prompts: list[Ids], responses: list[Ids], tolerance: float = 1e-10) -> None:
    """With a tree, states and gradients are those of the padded rows."""
    padded = pad_rows(prompts, responses, 0, CPU)
    rows = [np.concatenate([prompt, response[:-1]]) for prompt, response in zip(prompts, responses, strict=True)]
    # Also where it does not pay.
    tree = prefix_tree(rows, padded.input_ids.shape[1], CPU, max_share=1.0)
    assert tree is not None
    assert len(tree.token_ids) == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
    with_tree = PaddedRows(padded.input_ids, padded.positions, padded.lengths, tree)
    expected, found = states_and_gradients(model, padded), states_and_gradients(model, with_tree)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_tree_by_hand() -> None:
    block = pad_rows([ids(5, 6), ids(5, 6), ids(5)], [ids(7, 8, 9), ids(7, 3), ids(4)], 0, CPU, with_tree=True)
    assert block.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 0], [5, 0, 0, 0]]
    tree = block.tree
    assert tree is not None
    # In alphabetical order: the third row, the second, the first.
    assert tree.token_ids.tolist() == [5, 6, 7, 8]
    assert tree.depths.tolist() == [0, 1, 2, 3]
    assert tree.slots.tolist() == [8, 5, 6, 3]
    assert tree.nodes.view(3, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert block.num_computed == 4


def test_no_tree_where_nothing_is_shared() -> None:
    assert pad_rows([ids(1, 2, 3), ids(2, 2, 3)], [ids(4, 5)] * 2, 0, CPU, with_tree=True).tree is None
    # Padding alone is enough.
    block = pad_rows([ids(1, 2, 3), ids(2)], [ids(4, 5)] * 2, 0, CPU, with_tree=True)
    assert (block.num_computed, block.input_ids.numel()) == (6, 8)


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=5)), max_size=4)


@settings(deadline=None, max_examples=25)
@given(SHAPES.filter(len), st.integers(0, 2**31))
def test_any_grouping_has_the_padded_rows_states_and_gradients(shapes: list[tuple[int, list[int]]], seed: int) -> None:
    assert_same(llama(), *samples(seed, shapes))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_the_padded_rows_states_and_gradients(family: str) -> None:
    model = random_model(family, **PLAIN.get(family, {}))
    assert takes_prefix_trees(model)
    # The router's softmax is in float32.
    tolerance = 1e-5 if family == "qwen3_moe" else 1e-10
    assert_same(model, *samples(1, [(7, [9, 4, 12]), (3, [5]), (11, [2, 8])]), tolerance)


def test_the_same_under_gradient_checkpointing() -> None:
    model = random_model("llama").train()
    model.gradient_checkpointing_enable()
    assert_same(model, *samples(2, [(6, [9, 4]), (3, [5, 5])]))


@pytest.mark.parametrize("family", OTHER)
def test_models_with_other_attention_are_left_alone(family: str) -> None:
    model = random_model(family, **OTHER[family])
    before = model.config._attn_implementation
    assert not enable_prefix_trees(model)
    assert not takes_prefix_trees(model)
    assert model.config._attn_implementation == before != "prefix_tree"


def test_rows_without_a_tree_go_through_a_model_that_takes_them_as_before() -> None:
    torch.manual_seed(0)
    prompts, responses = samples(3, [(4, [6, 9]), (2, [3])])
    block = pad_rows(prompts, responses, 0, CPU)
    plain = random_model("llama", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(llama(), block), hidden_states(plain, block), rtol=0, atol=1e-5)


def test_a_saved_model_says_nothing_of_trees(tmp_path: Path) -> None:
    load_causal_lm(str(teacher_path()), Dtype.float32).save_pretrained(tmp_path)
    assert "prefix_tree" not in (tmp_path / "config.json").read_text()


def test_a_node_gets_its_gradients_summed_in_the_same_order_each_time() -> None:
    model = load_causal_lm(str(teacher_path()), Dtype.float32)
    prompts, responses = samples(4, [(40, [30] * 16), (25, [30] * 16)])
    block = pad_rows(prompts, responses, 0, CPU, with_tree=True)
    first, second = (states_and_gradients(model, block) for _ in range(2))
    assert block.tree is not None
    for one, other in zip(first[1], second[1], strict=True):
        assert one is None and other is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("support", ["own", "handed"])
def test_a_teacher_computes_a_prompt_once_and_gives_the_same_scores(
    support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, responses = samples(5, [(30, [12, 4, 9, 10]), (8, [7, 7]), (5, [11])])
    given: Any = 5
    if support == "handed":
        given = [np.tile(np.arange(4, dtype=np.int32), (len(response), 1)) for response in responses]
    model = TeacherModel(str(teacher_path()), Dtype.float32, 0, 44, 130)
    seen: list[int] = []
    model._model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    found = model.score([prompt.tolist() for prompt in prompts], responses, given)
    with_trees = sum(seen)
    seen.clear()
    monkeypatch.setattr(model, "_takes_trees", False)
    expected = model.score([prompt.tolist() for prompt in prompts], responses, given)
    assert sum(seen) > with_trees + 60
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=1e-5)
