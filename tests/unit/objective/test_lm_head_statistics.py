import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ray.objective import HeadStatistics, head_statistics, lm_head_tiles, token_logprobs


def draw(n: int, v: int, h: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, head, torch.randint(v, (n,), generator=generator)


def full(hidden: Tensor, head: Tensor, token_ids: Tensor, top_k: int) -> HeadStatistics:
    logits = hidden.double() @ head.double().T
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(top_k, dim=-1)
    return HeadStatistics(
        logprobs=logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1),
        logsumexp=logits.logsumexp(-1),
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        topk_ids=top.indices,
        topk_logprobs=top.values,
    )


def assert_equal(got: HeadStatistics, wanted: HeadStatistics, tolerance: float) -> None:
    for name in ("logprobs", "logsumexp", "entropy", "topk_logprobs"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(wanted, name), rtol=tolerance, atol=tolerance, msg=name
        )
    assert got.topk_ids.dtype == torch.int64
    assert got.topk_ids.equal(wanted.topk_ids)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(2, 60),
    st.integers(1, 13),
    st.integers(1, 70),
    st.integers(0, 8),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.integers(0, 999),
)
def test_every_figure_is_that_of_the_full_softmax(
    n: int, v: int, chunk_size: int, tile: int, top_k: int, scale: float, seed: int
) -> None:
    top_k = min(top_k, v)
    hidden, head, ids = draw(n, v, 5, seed=seed)
    hidden = hidden * scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head_tiles, "TILE_ROWS", tile)
        got = head_statistics(hidden, head, ids, chunk_size=chunk_size, top_k=top_k)
    assert_equal(got, full(hidden, head, ids, top_k), 1e-11)


def test_a_case_by_hand() -> None:
    # Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    head = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    got = head_statistics(torch.ones(1, 1, dtype=torch.float64), head, torch.tensor([1]), chunk_size=4, top_k=2)
    third = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    assert got.logprobs is not None
    torch.testing.assert_close(got.logprobs, third[1:2].log())
    torch.testing.assert_close(got.logsumexp, torch.tensor([8.0], dtype=torch.float64).log())
    torch.testing.assert_close(got.entropy, -(third * third.log()).sum().unsqueeze(0))
    assert got.topk_ids.tolist() == [[2, 1]]
    torch.testing.assert_close(got.topk_logprobs, third[[2, 1]].log().unsqueeze(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_added_up_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", 100)
    hidden, head, ids = draw(40, 1000, 64, dtype)
    got = head_statistics(hidden, head, ids, chunk_size=16, top_k=5)
    assert got.entropy.dtype == got.topk_logprobs.dtype == torch.float32
    assert_equal(got, full(hidden, head, ids, 5), 2e-5)


def test_the_entropy_of_one_certain_token_is_zero_and_of_equal_logits_log_v(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", 7)
    head = torch.zeros(50, 1)
    head[3] = 1.0
    got = head_statistics(torch.tensor([[1e5], [0.0], [-1e5]]), head, None, chunk_size=2)
    assert got.entropy[0].item() == 0
    assert got.entropy[1:].tolist() == pytest.approx([math.log(50), math.log(49)], rel=1e-6)


def test_logprobs_equal_token_logprobs() -> None:
    hidden, head, ids = draw(9, 300, 6, torch.float32)
    got = head_statistics(hidden, head, ids, chunk_size=4)
    torch.testing.assert_close(got.logprobs, token_logprobs(hidden, head, ids, chunk_size=4), rtol=0, atol=2e-6)


def test_without_tokens_and_without_top_k_nothing_is_made_up() -> None:
    hidden, head, _ = draw(3, 20, 4)
    got = head_statistics(hidden, head, None, chunk_size=2)
    assert got.logprobs is None
    assert got.topk_ids.shape == got.topk_logprobs.shape == (3, 0)


def test_no_graph_is_kept() -> None:
    hidden, head, ids = draw(3, 20, 4)
    got = head_statistics(hidden.requires_grad_(), head.requires_grad_(), ids, chunk_size=2, top_k=2)
    assert got.logprobs is not None
    assert not any(x.requires_grad for x in (got.logprobs, got.logsumexp, got.entropy, got.topk_logprobs))


def test_no_positions_give_empty_figures() -> None:
    hidden, head, ids = draw(0, 20, 4)
    got = head_statistics(hidden, head, ids, chunk_size=2, top_k=3)
    assert got.logprobs is not None
    assert got.logprobs.shape == got.logsumexp.shape == got.entropy.shape == (0,)
    assert got.topk_ids.shape == got.topk_logprobs.shape == (0, 3)


def test_two_tiles_of_logits_are_the_most_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", 32)
    hidden, head, ids = draw(64, 1000, 8, torch.float32)
    sizes: list[int] = []

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
            sizes.extend(x.numel() for x in made if tuple(x.shape) not in {(1000, 8), (8, 1000)})
            return out

    with Largest():  # type: ignore[no-untyped-call]
        head_statistics(hidden, head, ids, chunk_size=16, top_k=4)
    assert 16 * 32 <= max(sizes) <= 64 * 8


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, ids = draw(5, 20, 4)
    bad: tuple[Callable[[], object], ...] = (
        lambda: head_statistics(hidden, head, ids, chunk_size=0),
        lambda: head_statistics(hidden, head, ids, chunk_size=2, top_k=21),
        lambda: head_statistics(hidden, head, ids, chunk_size=2, top_k=-1),
        lambda: head_statistics(hidden, head, ids + 20, chunk_size=2),
        lambda: head_statistics(hidden, head, ids[:3], chunk_size=2),
        lambda: head_statistics(hidden[:, :2], head, ids, chunk_size=2),
    )
    for call in bad:
        with pytest.raises(ValueError, match="; "):
            call()
