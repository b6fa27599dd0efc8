import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import (
    RunningQuantile,
    block_segments,
    drift_gate,
    quantile_tau,
    segment_staleness,
    staleness_tau,
)

NAN, INF = float("nan"), float("inf")


def slow_quantile(drift: list[float], tokens: list[int], share: float) -> float:
    """The smallest drift with at least `share` of all tokens at or below it, token by token."""
    spread = sorted(abs(d) for d, n in zip(drift, tokens, strict=True) for _ in range(n))
    return next(d for i, d in enumerate(spread, start=1) if i >= share * len(spread) - 1e-9)


def test_segment_staleness_is_the_oldest_valid_tokens() -> None:
    staleness = torch.tensor([[3, 2, 2, 9, 1], [7, 7, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 1, 1]])
    segments = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 1, -1]])
    got = segment_staleness(staleness, mask, segments)
    assert got.dtype == torch.int64 and got.tolist() == [[3, 2, 1], [0, 7, 0]]


def test_segment_staleness_of_masked_garbage_and_of_nothing() -> None:
    staleness = torch.tensor([[NAN, -5.0, 2.0]])
    got = segment_staleness(staleness, torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 0]]))
    assert got.tolist() == [[2.0]]
    assert segment_staleness(torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 3), -1)).shape == (2, 0)
    assert segment_staleness(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).long()).shape == (0, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_segment_staleness_equals_the_definition(seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    staleness = torch.randint(0, 5, (3, 9), generator=generator)
    segments = block_segments(torch.randint(1, 10, (3,), generator=generator), 9, block)
    mask = torch.rand(3, 9, generator=generator) < 0.6
    got = segment_staleness(staleness, mask, segments)
    for b in range(3):
        for s in range(int(segments.max()) + 1):
            inside = [int(staleness[b, t]) for t in range(9) if mask[b, t] and int(segments[b, t]) == s]
            assert got[b, s].item() == max(inside, default=0)


@pytest.mark.parametrize("bad", [-1.0, NAN])
def test_a_valid_token_from_the_future_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="negative or NaN"):
        segment_staleness(torch.tensor([[0.0, bad]]), torch.ones(1, 2), torch.zeros(1, 2).long())


def test_staleness_tau_is_proportional_and_leaves_fresh_segments_alone() -> None:
    staleness = torch.tensor([[0, 1], [4, 0]])
    tau = staleness_tau(0.5, staleness)
    assert tau.dtype == torch.float64 and tau.tolist() == [[0.0, 0.5], [2.0, 0.0]]
    behavior = torch.full((2, 4), -1.0, dtype=torch.float64)
    segments = block_segments(torch.tensor([4, 4]), 4, 2)
    got = drift_gate(behavior + 0.3, behavior, torch.ones(2, 4), segments, tau=tau, statistic="rms", normalize="none")
    assert got.segment_gate.flatten().tolist() == pytest.approx([1.0, math.exp(-0.15), math.exp(-0.6), 1.0])


@pytest.mark.parametrize("tau", [-1.0, NAN, INF])
def test_staleness_tau_refuses_what_is_no_strength(tau: float) -> None:
    with pytest.raises(ValueError, match="tau is"):
        staleness_tau(tau, torch.zeros(1, 1))


def test_the_typical_drift_is_gated_by_exp_minus_scale() -> None:
    tau = quantile_tau(0.7, 1e-3)
    assert math.exp(-tau * 1e-3) == pytest.approx(math.exp(-0.7), rel=1e-14)


@pytest.mark.parametrize("value", [None, 0.0, 5e-324])
def test_without_measured_drift_there_is_no_gate(value: float | None) -> None:
    assert quantile_tau(1.0, value) == 0.0


@pytest.mark.parametrize(("scale", "value"), [(-1.0, 1.0), (NAN, 1.0), (INF, 1.0), (1.0, -1.0), (1.0, NAN)])
def test_quantile_tau_refuses_what_is_no_magnitude(scale: float, value: float) -> None:
    with pytest.raises(ValueError, match="; "):
        quantile_tau(scale, value)


def test_quantile_by_hand() -> None:
    # Ten tokens: 0.1 x 7, 0.2 x 2, 0.5 x 1.
    drift, tokens = torch.tensor([0.5, -0.1, 0.2], dtype=torch.float64), torch.tensor([1, 7, 2])
    for share, wanted in ((0.0, 0.1), (0.5, 0.1), (0.7, 0.1), (0.71, 0.2), (0.9, 0.2), (0.91, 0.5), (1.0, 0.5)):
        running = RunningQuantile(share, 0.9)
        assert running.value is None
        running.update(drift, tokens)
        assert running.value == wanted


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0]))
def test_quantile_equals_the_definition(seed: int, size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 7, (size,), generator=generator)
    running = RunningQuantile(share, 0.5)
    running.update(drift, tokens)
    assert running.value == slow_quantile(drift.tolist(), tokens.tolist(), share)


def one_step(running: RunningQuantile, value: float) -> None:
    running.update(torch.tensor([value], dtype=torch.float64), torch.tensor([3]))


def test_the_first_step_sets_the_value_and_the_average_is_not_drawn_to_zero() -> None:
    running = RunningQuantile(0.5, 0.9)
    for _ in range(5):
        one_step(running, 0.25)
        assert running.value == 0.25


def test_steps_weigh_powers_of_the_decay() -> None:
    running, seen = RunningQuantile(0.5, 0.8), [0.3, 0.1, 0.7, 0.2]
    for count, value in enumerate(seen, start=1):
        one_step(running, value)
        weights = [0.8 ** (count - i) for i in range(1, count + 1)]
        mean = sum(w * v for w, v in zip(weights, seen, strict=False)) / sum(weights)
        assert running.value == pytest.approx(mean, rel=1e-13)


def test_no_decay_keeps_the_last_step_only() -> None:
    running = RunningQuantile(0.5, 0.0)
    for value in (0.3, 0.1):
        one_step(running, value)
        assert running.value == pytest.approx(value, rel=1e-15)


def test_steps_without_measured_tokens_change_nothing() -> None:
    running = RunningQuantile(0.5, 0.9)
    nothing: list[tuple[Tensor, Tensor]] = [
        (torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
        (torch.tensor([0.4]), torch.tensor([0])),
        (torch.tensor([NAN, INF]), torch.tensor([4, 4])),
    ]
    for step in nothing:
        running.update(*step)
    assert running.value is None
    one_step(running, 0.5)
    for step in nothing:
        running.update(*step)
    assert running.value == 0.5
    running.update(torch.tensor([0.5, 9.0, NAN]), torch.tensor([1, 0, 8]))
    assert running.value == 0.5


def test_a_restored_quantile_goes_on_as_if_unbroken() -> None:
    whole, first = RunningQuantile(0.5, 0.7), RunningQuantile(0.5, 0.7)
    for value in (0.3, 0.1):
        one_step(whole, value)
        one_step(first, value)
    second = RunningQuantile(0.5, 0.7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in (0.9, 0.2):
        one_step(whole, value)
        one_step(second, value)
    assert second.value == whole.value
    fresh = RunningQuantile(0.5, 0.7)
    fresh.load_state_dict(RunningQuantile(0.5, 0.7).state_dict())
    assert fresh.value is None


@pytest.mark.parametrize(
    "state", [{}, {"value": 1.0}, {"value": None, "num_updates": 2}, {"value": 1.0, "num_updates": 0}]
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="value and num_updates"):
        RunningQuantile(0.5, 0.9).load_state_dict(state)


@pytest.mark.parametrize(
    ("quantile", "decay"), [(-0.1, 0.5), (1.1, 0.5), (NAN, 0.5), (0.5, 1.0), (0.5, -0.1), (0.5, NAN)]
)
def test_a_quantile_or_decay_out_of_range_is_refused(quantile: float, decay: float) -> None:
    with pytest.raises(ValueError, match="; use a number"):
        RunningQuantile(quantile, decay)
