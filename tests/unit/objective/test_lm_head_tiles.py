"""The route of bf16 products on CUDA, with products that a CPU can do in the place of the GPU's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ray.objective import lm_head_tiles, token_logprobs
from opd_ray.objective.lm_head_tiles import RunningSoftmax, add_product, logit_tiles


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """Let the CPU pass for a device whose mm takes bf16 and returns float32; records the operands' dtypes."""
    seen = []
    plain = torch.mm

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return plain(a, b, out=out) if out is not None else plain(a, b)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        seen.append((a.dtype, b.dtype))
        result = plain(a.float(), b.float())
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(lm_head_tiles, "_has_wide_product", lambda h, w: h.dtype == w.dtype == torch.bfloat16)
    return seen


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(70, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, head, torch.randint(70, (11,), generator=generator)


def test_bf16_operands_stay_bf16_and_nothing_is_lost(wide_products: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", 32)
    hidden, head, ids = draw(torch.bfloat16)
    exact = (hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_())
    got = token_logprobs(hidden, head, ids, chunk_size=4)
    wanted = token_logprobs(exact[0], exact[1], ids, chunk_size=4)
    assert len(wide_products) == 9  # 3 tiles of the head by 3 chunks of positions
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(got.square().sum(), (hidden, head))
    assert len(wide_products) == 9 + 9 * 5  # the logits again, and two parts for each of two gradients
    for found, want in zip(grads, torch.autograd.grad(wanted.square().sum(), exact), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), want, rtol=2**-8, atol=1e-4)


def test_other_dtypes_do_not_take_that_route(wide_products: list[Any]) -> None:
    hidden, head, ids = draw(torch.float32)
    token_logprobs(hidden, head.detach().bfloat16(), ids, chunk_size=4).sum().backward()  # type: ignore[no-untyped-call]
    token_logprobs(hidden.detach().half(), head.half(), ids, chunk_size=4)
    assert not wide_products


def test_a_product_in_two_parts_is_far_finer_than_bf16(wide_products: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 200, generator=generator)
    b = torch.randn(200, 8, generator=generator).bfloat16()
    exact = a.double() @ b.double()
    got = torch.zeros(8, 8)
    add_product(got, a, b)
    rounded = (a.bfloat16().double() @ b.double() - exact).abs().max()
    assert len(wide_products) == 2
    assert (got.double() - exact).abs().max() < rounded / 100


def test_tiles_cover_the_head_and_the_positions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", 32)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, _ = (x.detach() for x in draw(dtype))
        logits = torch.full((11, 70), torch.nan)
        for first, tile, where, part in logit_tiles(hidden, head, 4):
            assert tile.equal(head[first : first + 32].to(tile.dtype))
            assert logits[where, first : first + 32].isnan().all()
            logits[where, first : first + 32] = part
        torch.testing.assert_close(logits, hidden.float() @ head.float().T)


def test_a_running_softmax_has_entropy_only_if_asked_for() -> None:
    softmax = RunningSoftmax(2, torch.zeros(1), torch.float32)
    softmax.add(slice(0, 2), torch.tensor([[-torch.inf, 1.0], [200.0, 200.0]]))
    softmax.add(slice(0, 2), torch.tensor([[-300.0, 1.0], [-torch.inf, -torch.inf]]))
    torch.testing.assert_close(softmax.logsumexp(), torch.tensor([1.0, 200.0]) + torch.tensor(2.0).log())
    with pytest.raises(ValueError, match="entropy=True"):
        softmax.entropy()
