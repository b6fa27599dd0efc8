import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import geometric_sequence_mask, hard_drop_gate, icepop_weights, truncated_is_weights

NAN, INF = float("nan"), float("inf")


def logs(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_truncated_weights_by_hand() -> None:
    got = truncated_is_weights(logs(0.5, 0.9, 0.2), logs(0.25, 0.9, 0.8), cap=1.5)
    assert got.tolist() == pytest.approx([1.5, 1.0, 0.25], rel=1e-14)


def test_icepop_weights_by_hand_bound_current_over_behaviour() -> None:
    # rho = 2, 1, 0.25, 5: a bound on the inverse ratio would keep other tokens.
    got = icepop_weights(logs(0.5, 0.9, 0.2, 0.5), logs(0.25, 0.9, 0.8, 0.1), low=0.5, high=5.1)
    assert got.tolist() == pytest.approx([2.0, 1.0, 0.0, 5.0], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0, 5.0])
def test_bounds_are_inclusive(dtype: torch.dtype, bound: float) -> None:
    current = torch.tensor([math.log(bound)], dtype=dtype)
    behavior = torch.zeros(1, dtype=dtype)
    rho = float(current.double().exp().to(dtype))
    assert icepop_weights(current, behavior, low=rho, high=rho).item() == rho
    assert icepop_weights(current, behavior, low=0.0, high=rho * (1 - 1e-6)).item() == 0.0
    assert icepop_weights(current, behavior, low=rho * (1 + 1e-6), high=100.0).item() == 0.0
    row, mask = current.unsqueeze(0), torch.ones(1, 1)
    assert geometric_sequence_mask(row, row * 0, mask, low=rho, high=rho).tolist() == [True]
    assert geometric_sequence_mask(row, row * 0, mask, low=0.0, high=rho * (1 - 1e-6)).tolist() == [False]
    assert geometric_sequence_mask(row, row * 0, mask, low=rho * (1 + 1e-6), high=100.0).tolist() == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_that_overflow_get_the_cap_and_underflow_to_zero(dtype: torch.dtype) -> None:
    current, behavior = torch.tensor([0.0, -2000.0, 50.0, -50.0], dtype=dtype), torch.zeros(4, dtype=dtype)
    behavior[0] = -2000.0
    assert truncated_is_weights(current, behavior, cap=3.0).tolist() == pytest.approx(
        [3.0, 0.0, 3.0, math.exp(-50)], rel=1e-6
    )
    assert icepop_weights(current, behavior, low=0.0, high=10.0).tolist() == pytest.approx(
        [0.0, 0.0, 0.0, math.exp(-50)], rel=1e-6
    )


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_weighs_nothing(bad: float, side: int) -> None:
    pair = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0])]
    pair[side][0] = bad
    assert truncated_is_weights(pair[0], pair[1], cap=2.0).tolist() == [0.0, 1.0]
    assert icepop_weights(pair[0], pair[1], low=0.0, high=2.0).tolist() == [0.0, 1.0]
    assert truncated_is_weights(torch.tensor([bad]), torch.tensor([bad]), cap=2.0).item() == 0.0


def test_weights_are_detached_and_widened() -> None:
    current = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    behavior = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    for got in (
        truncated_is_weights(current, behavior, cap=2.0),
        icepop_weights(current, behavior, low=0.5, high=2.0),
        hard_drop_gate(current, limit=1.0),
    ):
        assert not got.requires_grad and got.dtype == torch.float32 and got.tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 20.0]), st.sampled_from([torch.float32, torch.float64]))
def test_weights_equal_the_definition(seed: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    current, behavior = (scale * torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)).to(dtype)
    capped = truncated_is_weights(current, behavior, cap=2.0)
    kept = icepop_weights(current, behavior, low=0.5, high=3.0)
    assert capped.dtype == kept.dtype == dtype and capped.shape == kept.shape == (4, 6)
    for b in range(4):
        for t in range(6):
            rho = math.exp(float(current[b, t]) - float(behavior[b, t]))
            assert capped[b, t].item() == pytest.approx(min(rho, 2.0), rel=1e-6)
            if min(abs(rho - 0.5), abs(rho - 3.0)) > 1e-6:
                assert kept[b, t].item() == pytest.approx(rho if 0.5 <= rho <= 3.0 else 0.0, rel=1e-6)


def test_geometric_mask_by_hand() -> None:
    # Means of d: ln 2 (kept); (ln 4 + 0) / 2 = ln 2 with a hole (kept); ln 3; -ln 3; no valid token (kept).
    ln2, ln3 = math.log(2), math.log(3)
    drift = torch.tensor([[ln2, ln2], [2 * ln2, 0.0], [ln3, ln3], [-ln3, -ln3], [9.0, 9.0]], dtype=torch.float64)
    drift = torch.cat([drift, torch.full((5, 1), 50.0, dtype=torch.float64)], dim=1)
    mask = torch.tensor([[1, 1, 0]] * 4 + [[0, 0, 0]])
    behavior = torch.full_like(drift, -1.0)
    got = geometric_sequence_mask(behavior + drift, behavior, mask, low=0.4, high=2.0 + 1e-9)
    assert got.dtype == torch.bool and got.tolist() == [True, True, False, False, True]


def test_geometric_mask_does_not_shrink_with_length() -> None:
    drift = torch.full((2, 400), 0.01)
    mask = torch.ones(2, 400)
    mask[1, 4:] = 0
    assert geometric_sequence_mask(drift, drift * 0, mask, low=1.0, high=1.02).tolist() == [True, True]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_geometric_mask_leaves_out_masked_and_non_finite_tokens(bad: float) -> None:
    current = torch.tensor([[0.0, bad, 0.0], [0.0, 5.0, bad], [bad, bad, bad]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]])
    assert geometric_sequence_mask(current, torch.zeros(2 + 1, 3), mask, low=0.9, high=1.1).tolist() == [True] * 3


def test_geometric_mask_of_huge_drift_and_of_nothing() -> None:
    far = torch.tensor([[5000.0], [-5000.0], [0.0]])
    got = geometric_sequence_mask(far, torch.zeros(3, 1), torch.ones(3, 1), low=0.5, high=2.0)
    assert got.tolist() == [False, False, True]
    empty = torch.zeros(2, 0)
    assert geometric_sequence_mask(empty, empty, empty, low=0.5, high=2.0).tolist() == [True, True]
    assert geometric_sequence_mask(empty.T[:0], empty.T[:0], empty.T[:0], low=0.5, high=2.0).shape == (0,)


def test_hard_drop_by_hand() -> None:
    drift = torch.tensor([[0.1, -0.1], [0.11, -3.0], [0.0, NAN]], dtype=torch.float64)
    got = hard_drop_gate(drift, limit=0.1)
    assert got.dtype == torch.float64 and got.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    assert hard_drop_gate(drift, limit=0.0).sum().item() == 1.0
    assert hard_drop_gate(drift, limit=INF).sum().item() == 5.0


ROW = torch.zeros(1, 3)
FAULTS: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]] = [
    (truncated_is_weights, (ROW, ROW), {"cap": 0.0}),
    (truncated_is_weights, (ROW, ROW), {"cap": NAN}),
    (truncated_is_weights, (ROW, ROW), {"cap": INF}),
    (truncated_is_weights, (ROW, ROW.T), {"cap": 1.0}),
    (icepop_weights, (ROW, ROW), {"low": -0.1, "high": 1.0}),
    (icepop_weights, (ROW, ROW), {"low": 2.0, "high": 1.0}),
    (icepop_weights, (ROW, ROW), {"low": 0.0, "high": INF}),
    (icepop_weights, (ROW, ROW), {"low": NAN, "high": 1.0}),
    (icepop_weights, (ROW, ROW.T), {"low": 0.0, "high": 1.0}),
    (geometric_sequence_mask, (ROW, ROW, ROW), {"low": 2.0, "high": 1.0}),
    (geometric_sequence_mask, (ROW, ROW, ROW.T), {"low": 0.0, "high": 1.0}),
    (geometric_sequence_mask, (ROW[0], ROW[0], ROW[0]), {"low": 0.0, "high": 1.0}),
    (hard_drop_gate, (ROW,), {"limit": -1.0}),
    (hard_drop_gate, (ROW,), {"limit": NAN}),
]


@pytest.mark.parametrize(("function", "tensors", "options"), FAULTS)
def test_a_callers_fault_is_one_clear_line(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="; ") as caught:
        function(*tensors, **options)
    assert "\n" not in str(caught.value)
