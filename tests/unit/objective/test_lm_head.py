import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ray.objective import lm_head, lm_head_tiles, support_logits, token_logprobs

Head = Callable[[Tensor, Tensor], Tensor]
SPARSE, DENSE = (5, 700, 6, 3), (5, 20, 6, 3)  # N, V, H, K on both sides of V = 32 K


def draw(n: int, v: int, h: int, k: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(v, (n, k), generator=generator)
    if n > 1 and k > 1:
        ids[0, 1] = ids[0, 0]  # the same id twice in a row ...
        ids[1, 0] = ids[0, 0]  # ... and in two rows
    return hidden.requires_grad_(), head.requires_grad_(), ids


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most elements of any float tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements[tuple(tensor.shape)] = tensor.numel()
        return out


@pytest.mark.parametrize("shape", [SPARSE, DENSE])
def test_support_logits_by_a_plain_loop(shape: tuple[int, int, int, int]) -> None:
    hidden, head, ids = draw(*shape)
    got = support_logits(hidden, head, ids)
    for n in range(shape[0]):
        for k in range(shape[3]):
            row = head[ids[n, k]].tolist()
            wanted = sum(a * b for a, b in zip(hidden[n].tolist(), row, strict=True))
            assert got[n, k].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shape", [SPARSE, DENSE, (300, 4000, 8, 5), (1, 100, 4, 2)])
@pytest.mark.parametrize("small", [False, True])
def test_support_gradients_equal_those_of_full_logits(
    shape: tuple[int, int, int, int], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # many chunks, bags of a few rows
        monkeypatch.setattr(lm_head, "GATHER_BYTES", 500)
        monkeypatch.setattr(lm_head, "ROWS_PER_BAG", 3)
    hidden, head, ids = draw(*shape)
    scale = torch.randn(ids.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = torch.autograd.grad((support_logits(hidden, head, ids) * scale).sum(), (hidden, head))
    full = torch.autograd.grad(((hidden @ head.T).gather(1, ids) * scale).sum(), (hidden, head))
    for found, wanted in zip(got, full, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 120, 2, 2), (3, 6, 2, 2)])
def test_support_gradients_against_central_differences(shape: tuple[int, int, int, int]) -> None:
    hidden, head, ids = draw(*shape)
    assert torch.autograd.gradcheck(lambda h, w: support_logits(h, w, ids), (hidden, head))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(2, 400), st.integers(1, 6), st.integers(0, 999))
def test_both_routes_agree(n: int, v: int, k: int, seed: int) -> None:
    hidden, head, ids = draw(n, v, 4, k, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "DENSE_RATIO", 0)
        gathered = torch.autograd.grad(support_logits(hidden, head, ids).square().sum(), (hidden, head))
        patch.setattr(lm_head, "DENSE_RATIO", 10**9)
        dense = torch.autograd.grad(support_logits(hidden, head, ids).square().sum(), (hidden, head))
    for found, wanted in zip(gathered, dense, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 5000, 8, 8), (64, 200, 8, 8)])
def test_neither_route_builds_all_logits(shape: tuple[int, int, int, int]) -> None:
    n, v, h, k = shape
    hidden, head, ids = draw(*shape, dtype=torch.float32)
    with LargestTensor() as seen:
        support_logits(hidden, head, ids).sum().backward()  # type: ignore[no-untyped-call]
    others = {shape: count for shape, count in seen.elements.items() if shape not in {(v, h), (h, v)}}
    assert max(others.values()) < n * v / 4, others


def test_token_logprobs_hold_one_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", 32)
    hidden, head, ids = draw(64, 1000, 8, 1, dtype=torch.float32)
    with LargestTensor() as seen:
        token_logprobs(hidden, head, ids[:, 0], chunk_size=16).sum().backward()  # type: ignore[no-untyped-call]
    others = {shape: count for shape, count in seen.elements.items() if shape not in {(1000, 8), (8, 1000)}}
    assert max(others.values()) <= 64 * 8, others


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_token_logprobs_values_and_gradients(chunk_size: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", tile)
    hidden, head, ids = draw(5, 23, 4, 1)
    token = torch.tensor([0, 22, 7, 7, 13])
    scale = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    got = token_logprobs(hidden, head, token, chunk_size=chunk_size)
    for n in range(5):
        logits = [sum(a * b for a, b in zip(hidden[n].tolist(), row, strict=True)) for row in head.tolist()]
        top = max(logits)
        wanted = logits[int(token[n])] - top - math.log(math.fsum(math.exp(x - top) for x in logits))
        assert got[n].item() == pytest.approx(wanted, rel=1e-12)
    full = (hidden @ head.T).log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    grads = torch.autograd.grad((got * scale).sum(), (hidden, head))
    for found, wanted_grad in zip(grads, torch.autograd.grad((full * scale).sum(), (hidden, head)), strict=True):
        torch.testing.assert_close(found, wanted_grad, rtol=1e-11, atol=1e-13)


def test_token_logprobs_against_central_differences() -> None:
    hidden, head, _ = draw(3, 9, 2, 1)
    token = torch.tensor([8, 0, 3])
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, token, chunk_size=2), (hidden, head))


def test_only_the_gradients_asked_for() -> None:
    hidden, head, ids = draw(*SPARSE)
    calls: tuple[Head, ...] = (
        lambda h, w: support_logits(h, w, ids),
        lambda h, w: token_logprobs(h, w, ids[:, 0], chunk_size=2),
    )
    for call in calls:
        both = torch.autograd.grad(call(hidden, head).sum(), (hidden, head))
        assert torch.autograd.grad(call(hidden, head.detach()).sum(), hidden)[0].equal(both[0])
        assert torch.autograd.grad(call(hidden.detach(), head).sum(), head)[0].equal(both[1])


def test_no_graph_under_no_grad() -> None:
    hidden, head, ids = draw(*SPARSE)
    with torch.no_grad():
        quiet = token_logprobs(hidden, head, ids[:, 0], chunk_size=2)
        assert not quiet.requires_grad and not support_logits(hidden, head, ids).requires_grad
    assert quiet.equal(token_logprobs(hidden, head, ids[:, 0], chunk_size=2).detach())


def test_logprobs_are_never_positive_and_sum_to_one() -> None:
    hidden, head, _ = draw(4, 50, 6, 1, dtype=torch.float32)
    rows = [token_logprobs(hidden * 20, head, torch.full((4,), v), chunk_size=3) for v in range(50)]
    every = torch.stack(rows, dim=1)
    assert (every <= 0).all()
    torch.testing.assert_close(every.exp().sum(1), torch.ones(4), rtol=1e-5, atol=0)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    got = token_logprobs(hidden, head, torch.tensor([1]), chunk_size=1)
    assert got.tolist() == [-2000.0]
    got.backward(torch.ones(1))  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad.tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize("route", [SPARSE, DENSE, (40, 1000, 16, 8)])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_low_precision_is_added_up_in_float32(route: tuple[int, int, int, int], dtypes: tuple[str, str]) -> None:
    hidden, head, ids = draw(*route)
    hidden = hidden.detach().to(getattr(torch, dtypes[0])).requires_grad_()
    head = head.detach().to(getattr(torch, dtypes[1])).requires_grad_()
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    calls: tuple[Head, ...] = (
        lambda h, w: support_logits(h, w, ids),
        lambda h, w: token_logprobs(h, w, ids[:, 0], chunk_size=3).unsqueeze(1),
    )
    for call in calls:
        got, exact = call(hidden, head), call(exact_hidden, exact_head)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(got.square().sum(), (hidden, head))
        wanted = torch.autograd.grad(exact.square().sum(), (exact_hidden, exact_head))
        for found, want, leaf in zip(grads, wanted, (hidden, head), strict=True):
            assert found.dtype == leaf.dtype
            rounding = 2**-8 if leaf.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found.double(), want, rtol=rounding, atol=1e-4)


def test_a_row_named_often_keeps_its_bf16_gradient() -> None:
    # 2000 contributions of 1 to one row: added one by one in bf16 they would stop at 256.
    hidden = torch.ones(1000, 2, dtype=torch.bfloat16)
    head = torch.zeros(100, 2, dtype=torch.bfloat16, requires_grad=True)
    support_logits(hidden, head, torch.full((1000, 2), 3)).sum().backward()  # type: ignore[no-untyped-call]
    assert head.grad is not None and head.grad[3].tolist() == [2000.0, 2000.0]


def test_int32_ids() -> None:
    hidden, head, ids = draw(*SPARSE)
    assert support_logits(hidden, head, ids.int()).equal(support_logits(hidden, head, ids))
    assert token_logprobs(hidden, head, ids[:, 0].int(), chunk_size=2).equal(
        token_logprobs(hidden, head, ids[:, 0], chunk_size=2)
    )


@pytest.mark.parametrize("n_k", [(0, 3), (4, 0), (0, 0)])
def test_no_positions_or_no_support_keep_the_graph(n_k: tuple[int, int]) -> None:
    hidden, head, _ = draw(n_k[0], 11, 4, 1)
    ids = torch.zeros(n_k, dtype=torch.int64)
    support_logits(hidden, head, ids).sum().backward()  # type: ignore[no-untyped-call]
    assert head.grad is not None and head.grad.equal(torch.zeros_like(head))
    got = token_logprobs(hidden, head, torch.zeros(n_k[0], dtype=torch.int64), chunk_size=2)
    assert got.shape == (n_k[0],)
    got.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("bad", [-1, 700, 10**9])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    hidden, head, ids = draw(*SPARSE)
    ids[2, 1] = bad
    with pytest.raises(ValueError, match="700 rows"):
        support_logits(hidden, head, ids)
    with pytest.raises(ValueError, match="700 rows"):
        token_logprobs(hidden, head, ids[:, 1], chunk_size=2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head, ids = draw(*SPARSE)
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: support_logits(hidden[:, :5], head, ids),
        lambda: support_logits(hidden[:4], head, ids),
        lambda: support_logits(hidden[None], head, ids),
        lambda: support_logits(hidden, head, ids[:, 0]),
        lambda: token_logprobs(hidden, head, ids, chunk_size=2),
        lambda: token_logprobs(hidden, head[:, :3], ids[:, 0], chunk_size=2),
        lambda: token_logprobs(hidden[:3], head, ids[:, 0], chunk_size=2),
        lambda: token_logprobs(hidden, head, ids[:, 0], chunk_size=0),
    )
    for call in calls:
        with pytest.raises(ValueError, match="; |, use"):
            call()
