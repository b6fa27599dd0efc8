import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.objective import effective_sample_size, gated_token_mean

NAN, INF = float("nan"), float("inf")


def test_mean_by_hand() -> None:
    # (1 * 0.5 + 2 * 2 + 4 * 1) / 3 valid tokens = 8.5 / 3.
    loss = torch.tensor([[1.0, 2.0, 9.0], [4.0, 7.0, 7.0]])
    weights = torch.tensor([[0.5, 2.0, 9.0], [1.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert gated_token_mean(loss, weights, mask).item() == pytest.approx(8.5 / 3)
    assert gated_token_mean(loss, weights, mask, num_loss_tokens=10).item() == pytest.approx(0.85)
    assert gated_token_mean(loss, weights, mask, num_loss_tokens=torch.tensor(10.0)).item() == pytest.approx(0.85)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_what_is_masked_leaves_no_trace(garbage: float) -> None:
    loss = torch.tensor([[1.0, garbage, 3.0]], requires_grad=True)
    weights = torch.tensor([[1.0, garbage, 0.5]])
    mask = torch.tensor([[True, False, True]])
    result = gated_token_mean(loss, weights, mask)
    assert result.item() == 1.25
    result.backward()  # type: ignore[no-untyped-call]
    assert loss.grad is not None and loss.grad.tolist() == [[0.5, 0.0, 0.25]]


def test_a_nan_at_a_valid_position_shows() -> None:
    loss = torch.tensor([1.0, NAN])
    assert gated_token_mean(loss, torch.tensor([1.0, 0.0]), torch.ones(2)).isnan()


@pytest.mark.parametrize("count", [None, 0, 7])
def test_nothing_valid_is_zero_with_a_graph(count: int | None) -> None:
    loss = torch.tensor([[1.0, NAN]], requires_grad=True)
    result = gated_token_mean(loss * 2, torch.ones(1, 2), torch.zeros(1, 2), num_loss_tokens=count)
    assert result.item() == 0.0
    result.backward()  # type: ignore[no-untyped-call]
    assert loss.grad is not None and loss.grad.tolist() == [[0.0, 0.0]]


def test_no_positions_at_all() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    gated_token_mean(empty, torch.zeros(0, 3), torch.zeros(0, 3)).backward()  # type: ignore[no-untyped-call]
    assert effective_sample_size(torch.zeros(0), torch.zeros(0)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    ones = torch.ones(2, 3, dtype=dtype)
    assert gated_token_mean(ones, torch.ones(2, 3), torch.ones(2, 3)).dtype == wanted
    assert effective_sample_size(ones, torch.ones(2, 3)).dtype == wanted


def test_weights_of_one_change_nothing_bit_for_bit() -> None:
    loss = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(7, 33, generator=torch.Generator().manual_seed(1)) < 0.6
    plain = torch.where(mask, loss, 0.0).sum() / mask.sum()
    assert gated_token_mean(loss, mask.float(), mask).equal(plain)


def test_sample_size_by_hand() -> None:
    # (1 + 2 + 3)^2 / (1 + 4 + 9) = 36 / 14; the masked weight does not count.
    weights = torch.tensor([1.0, 2.0, 3.0, NAN])
    assert effective_sample_size(weights, torch.tensor([1, 1, 1, 0])).item() == pytest.approx(36 / 14, rel=1e-6)


def test_sample_size_at_its_bounds() -> None:
    assert effective_sample_size(torch.full((9,), 0.3), torch.ones(9)).item() == pytest.approx(9.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0]), torch.ones(3)).item() == 1.0
    assert effective_sample_size(torch.zeros(3), torch.ones(3)).item() == 0.0
    assert effective_sample_size(torch.ones(3), torch.zeros(3)).item() == 0.0
    tiny = torch.tensor([1e-200, 2e-200], dtype=torch.float64)
    assert effective_sample_size(tiny, torch.ones(2)).item() == pytest.approx(9 / 5)


@settings(max_examples=100, deadline=None)
# Scaling must not itself underflow: smaller weights are left out.
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-200, 1e6)), min_size=1, max_size=20), st.floats(1e-6, 1e6))
def test_sample_size_is_between_one_and_the_count_and_has_no_scale(values: list[float], scale: float) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    size = effective_sample_size(weights, torch.ones(len(values))).item()
    if max(values) == 0:
        assert size == 0
        return
    assert 1 - 1e-9 <= size <= len(values) + 1e-9
    assert effective_sample_size(weights * scale, torch.ones(len(values))).item() == pytest.approx(size, rel=1e-6)
    if max(values) < 1e100 and min(values) > 1e-100:
        assert size == pytest.approx(math.fsum(values) ** 2 / math.fsum(v * v for v in values), rel=1e-9)


def test_faults_are_refused() -> None:
    with pytest.raises(ValueError, match="num_loss_tokens"):
        gated_token_mean(torch.ones(2), torch.ones(2), torch.ones(2), num_loss_tokens=-1)
    with pytest.raises(ValueError, match="shapes differ"):
        gated_token_mean(torch.ones(2), torch.ones(1), torch.ones(2))
    with pytest.raises(ValueError, match="shapes differ"):
        effective_sample_size(torch.ones(2), torch.ones(3))
