"""The gate's calibration, sampled drift, weight cap and log-gate."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import GateResult, block_segments, drift_gate

NAN, INF = float("nan"), float("inf")
STATISTICS = ("signed_mean", "mean_abs", "rms", "k3")


def gate(drift: Tensor, mask: Tensor | None = None, block: int = 2, **options: Any) -> GateResult:
    """Gate whose behaviour log-probs are -2 and whose current ones are off by `drift`."""
    behavior = torch.full_like(drift, -2.0)
    mask = torch.ones_like(drift, dtype=torch.bool) if mask is None else mask
    segments = block_segments(torch.full(drift.shape[:1], drift.shape[1]), drift.shape[1], block)
    defaults: dict[str, Any] = {"tau": 1.0, "statistic": "signed_mean", "normalize": "step"}
    return drift_gate(behavior + drift, behavior, mask, segments, **(defaults | options))


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Current, behaviour (float64), a mask with holes and segments of 3, `[4, 13]`."""
    generator = torch.Generator().manual_seed(seed)
    behavior = -3 * torch.rand(4, 13, generator=generator, dtype=torch.float64)
    current = behavior + torch.randn(4, 13, generator=generator, dtype=torch.float64)
    segments = block_segments(torch.randint(1, 14, (4,), generator=generator), 13, 3)
    return current, behavior, (torch.rand(4, 13, generator=generator) < 0.8) & (segments >= 0), segments


def test_floor_by_hand() -> None:
    # s = 0.5, -0.3, 0.1 less 0.2, not below 0, sign kept.
    drift = torch.tensor([[0.5, 0.5, -0.3, -0.3, 0.1, 0.1]], dtype=torch.float64)
    got = gate(drift, drift_floor=0.2, tau=2.0, normalize="none")
    assert got.segment_drift[0].tolist() == pytest.approx([0.3, -0.1, 0.0], abs=1e-15)
    assert got.segment_gate[0].tolist() == pytest.approx([math.exp(-0.6), math.exp(-0.2), 1.0], rel=1e-14)


def test_floor_per_segment() -> None:
    drift = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    got = gate(drift, drift_floor=torch.tensor([[0.1, 0.7]]), normalize="none")
    assert got.segment_drift[0].tolist() == pytest.approx([0.4, 0.0], rel=1e-7)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_floor_above_all_drift_is_the_ungated_path_bit_for_bit(statistic: str) -> None:
    current, behavior, mask, segments = ragged(1)
    got = drift_gate(current, behavior, mask, segments, tau=9.0, statistic=statistic, normalize="step", drift_floor=1e3)
    assert got.token_weights.equal(mask.double()) and got.segment_drift.eq(0).all()


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("normalize", ["step", "sequence", "none"])
def test_the_options_that_change_nothing_change_no_bit(statistic: str, normalize: Any) -> None:
    data = ragged(2)
    plain = drift_gate(*data, tau=1.5, statistic=statistic, normalize=normalize)
    options: dict[str, Any] = {"drift_floor": torch.zeros_like(plain.segment_drift)}
    options["measured_mask"] = torch.ones_like(data[2])
    options["max_weight"] = None if normalize == "none" else 1e9
    got = drift_gate(*data, tau=1.5, statistic=statistic, normalize=normalize, **options)
    for name in ("token_weights", "segment_gate", "segment_drift", "segment_tokens", "segment_log_gate"):
        assert getattr(got, name).equal(getattr(plain, name))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_statistic_is_taken_over_measured_tokens_only(statistic: str) -> None:
    current, behavior, mask, segments = ragged(3)
    measured = torch.rand(4, 13, generator=torch.Generator().manual_seed(4)) < 0.5
    got = drift_gate(
        torch.where(measured, current, NAN), behavior, mask, segments, tau=1.5, statistic=statistic,
        normalize="none", measured_mask=measured,
    )  # fmt: skip
    small = drift_gate(current, behavior, mask & measured, segments, tau=1.5, statistic=statistic, normalize="none")
    assert got.segment_drift.equal(small.segment_drift) and got.segment_log_gate.equal(small.segment_log_gate)
    # Every valid token gets its segment's weight and counts, measured or not.
    gates = got.segment_gate.gather(1, segments.clamp(min=0))
    assert got.token_weights.equal(torch.where(mask, gates, 0.0))
    assert int(got.num_tokens) == int(mask.sum())


def test_a_measured_token_without_a_finite_log_prob_is_not_valid() -> None:
    drift = torch.tensor([[0.4, NAN, NAN, NAN]], dtype=torch.float64)
    got = gate(drift, block=4, measured_mask=torch.tensor([[1, 1, 0, 0]]), normalize="none")
    assert got.token_weights[0].tolist() == pytest.approx([math.exp(-0.4), 0.0, math.exp(-0.4), math.exp(-0.4)])
    assert got.segment_tokens.tolist() == [[3]]


def test_a_segment_of_which_nothing_was_measured_is_not_gated() -> None:
    drift = torch.tensor([[NAN, NAN, 1.0, 1.0]], dtype=torch.float64)
    got = gate(drift, measured_mask=torch.tensor([[0, 0, 1, 1]]), normalize="none")
    assert got.segment_gate[0].tolist() == pytest.approx([1.0, math.exp(-1.0)])
    assert got.segment_tokens.tolist() == [[2, 2]]


def test_unmeasured_tokens_count_in_the_mean_of_one() -> None:
    # Gates 1 (4 tokens, one measured) and 1/2 (4 tokens, all measured): mean 3/4, not 0.6.
    low = math.log(0.5)
    drift = torch.tensor([[0.0, NAN, NAN, NAN, low, low, low, low]], dtype=torch.float64)
    got = gate(drift, block=4, measured_mask=drift.isfinite())
    assert got.token_weights[0].tolist() == pytest.approx([4 / 3] * 4 + [2 / 3] * 4, rel=1e-14)


def test_cap_by_hand() -> None:
    # Gates 1, 1/4, 1/8 over one token each, as in the weights of a step.
    drift = torch.tensor([[0.0, math.log(4), math.log(8)]], dtype=torch.float64)
    got = gate(drift, block=1, max_weight=1.5)
    assert got.token_weights[0].tolist() == pytest.approx([1.5, 1.0, 0.5], rel=1e-13)
    assert got.segment_gate[0].tolist() == pytest.approx([1.0, 0.25, 0.125], rel=1e-13)


def test_cap_of_each_sequence_by_hand() -> None:
    drift = torch.tensor([[0.0, math.log(4), math.log(8)], [0.0, 0.0, 9.0]], dtype=torch.float64)
    got = gate(drift, block=1, max_weight=1.4, normalize="sequence")
    # Row 0: 1.4, then 1.6 split 2 : 1. Row 1: 1.4 twice, the rest gets 0.2.
    assert got.token_weights[0].tolist() == pytest.approx([1.4, 16 / 15, 8 / 15], rel=1e-13)
    assert got.token_weights[1].tolist() == pytest.approx([1.4, 1.4, 0.2], rel=1e-13)


def test_cap_where_every_raw_gate_underflows() -> None:
    drift = torch.tensor([[40.0, 40.01, 41.0]], dtype=torch.float64)
    got = gate(drift, block=1, tau=1000.0, max_weight=1.25)
    assert got.segment_gate.eq(0).all()
    # The first two at the cap; the third takes what is left.
    assert got.token_weights[0].tolist() == pytest.approx([1.25, 1.25, 0.5], rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 4.0, 1000.0]),
    st.sampled_from([1.01, 1.5, 3.0]),
    st.sampled_from(["step", "sequence"]),
    st.sampled_from(STATISTICS),
)
def test_unit_mean_over_valid_tokens_and_nothing_above_the_cap(
    seed: int, tau: float, cap: float, normalize: Any, statistic: str
) -> None:
    current, behavior, mask, segments = ragged(seed)
    got = drift_gate(
        current, behavior, mask, segments, tau=tau, statistic=statistic, normalize=normalize, max_weight=cap
    )
    assert got.token_weights.max().item() <= cap and (got.token_weights[~mask] == 0).all()
    rows = [mask[b] for b in range(4)] if normalize == "sequence" else [mask]
    weights = list(got.token_weights) if normalize == "sequence" else [got.token_weights]
    for valid, of_row in zip(rows, weights, strict=True):
        if valid.any():
            assert of_row[valid].mean().item() == pytest.approx(1.0, rel=1e-13)
    if tau == 0:
        assert got.token_weights.equal(mask.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_gate_does_not_underflow(dtype: torch.dtype) -> None:
    got = gate(torch.tensor([[40.0, 40.0, -2.0, -2.0]], dtype=dtype), tau=100.0)
    assert got.segment_log_gate.dtype == torch.float64
    assert got.segment_log_gate.tolist() == [[-4000.0, -200.0]]
    assert got.segment_gate[0, 0].item() == 0.0 and not got.segment_log_gate.requires_grad


@pytest.mark.parametrize("normalize", ["step", "sequence"])
def test_all_masked_and_empty_batches_with_every_option(normalize: Any) -> None:
    drift = torch.full((2, 4), NAN)
    nothing = torch.zeros(2, 4)
    options: dict[str, Any] = {"normalize": normalize, "max_weight": 1.5, "drift_floor": 0.1}
    got = gate(drift, nothing, measured_mask=nothing, **options)
    assert got.token_weights.equal(nothing) and got.segment_gate.eq(1).all()
    empty = torch.zeros(0, 3)
    assert gate(empty, measured_mask=empty, **options).token_weights.shape == (0, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"drift_floor": -0.1},
        {"drift_floor": NAN},
        {"drift_floor": INF},
        {"drift_floor": torch.zeros(1, 3)},
        {"measured_mask": torch.ones(1, 3)},
        {"max_weight": 1.0},
        {"max_weight": NAN},
        {"max_weight": 2.0, "normalize": "none"},
    ],
)
def test_a_callers_fault_is_one_clear_line(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="; |, ") as caught:
        gate(torch.zeros(1, 4), **changes)
    assert "\n" not in str(caught.value)
