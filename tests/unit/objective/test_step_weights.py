import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import block_segments, drift_gate, resampled, segment_weights, shuffled

NAN, INF = float("nan"), float("inf")


def logs(*gates: float) -> Tensor:
    return torch.tensor(gates, dtype=torch.float64).log()


def slow_capped(gates: list[float], tokens: list[int], cap: float) -> list[float]:
    """Weights min(c g, cap) of mean 1: c by bisection on its logarithm."""
    count = sum(tokens)
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        mean = sum(n * min(math.exp(middle) * g, cap) for g, n in zip(gates, tokens, strict=True)) / count
        low, high = (middle, high) if mean < 1 else (low, middle)
    return [min(math.exp(low) * g, cap) if n else 0.0 for g, n in zip(gates, tokens, strict=True)]


@st.composite
def steps(draw: st.DrawFn, steepest: float = 3.0) -> tuple[Tensor, Tensor]:
    size = draw(st.integers(1, 15))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-3, steepest]))
    log_gate = -scale * torch.randn(size, generator=generator, dtype=torch.float64).abs()
    return log_gate, torch.randint(0, 9, (size,), generator=generator)


def test_by_hand() -> None:
    # Gates 1 (3 tokens) and 1/2 (1 token): mean 3.5 / 4.
    got = segment_weights(logs(1.0, 0.5, 0.25), torch.tensor([3, 1, 0]))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([8 / 7, 4 / 7, 0.0], rel=1e-15)


def test_capped_by_hand() -> None:
    # Gates 1, 1/4, 1/8 with one token each: uncapped 24/11 > 1.5. Capped: 1.5, and 1.5 split 2 : 1.
    got = segment_weights(logs(1.0, 0.25, 0.125), torch.ones(3, dtype=torch.int64), max_weight=1.5)
    assert got.tolist() == pytest.approx([1.5, 1.0, 0.5], rel=1e-14)


def test_capping_one_segment_can_lift_the_next_over_the_cap() -> None:
    # Gates 1, 0.5, 0.01 with one token each: uncapped 1.99, 0.99, 0.02; once the first is capped at 1.2 the
    # second would be 1.76; both capped leave 0.6 for the third.
    got = segment_weights(logs(1.0, 0.5, 0.01), torch.ones(3, dtype=torch.int64), max_weight=1.2)
    assert got.tolist() == pytest.approx([1.2, 1.2, 0.6], rel=1e-14)


@pytest.mark.parametrize("cap", [None, 1.0 + 1e-9, 3.0])
@pytest.mark.parametrize("log_gate", [0.0, -0.7, -5000.0, -INF])
def test_equal_gates_give_exactly_one(cap: float | None, log_gate: float) -> None:
    got = segment_weights(torch.full((4,), log_gate), torch.tensor([3, 0, 7, 1]), max_weight=cap)
    assert got.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_gates_that_all_underflow_keep_their_ratio() -> None:
    got = segment_weights(torch.tensor([-4000.0, -4001.0], dtype=torch.float64), torch.tensor([1, 1]))
    low = math.exp(-1)
    assert got.tolist() == pytest.approx([2 / (1 + low), 2 * low / (1 + low)], rel=1e-13)


def test_the_cap_holds_where_gates_underflow_beside_each_other() -> None:
    log_gate = torch.tensor([-1e4, -2e4, -2e4 - math.log(2), -9e4], dtype=torch.float64)
    got = segment_weights(log_gate, torch.tensor([1, 4, 4, 1]), max_weight=2.0)
    # 2 for the first; the other 8 of 10 go 2 : 1 over 4 + 4 tokens.
    assert got.tolist() == pytest.approx([2.0, 4 / 3, 2 / 3, 0.0], rel=1e-10)


def test_a_gate_of_zero_stays_zero_beside_a_positive_one() -> None:
    got = segment_weights(torch.tensor([0.0, -INF], dtype=torch.float64), torch.tensor([2, 2]))
    assert got.tolist() == [2.0, 0.0]


def test_a_step_without_tokens_or_segments_has_no_weights() -> None:
    assert segment_weights(logs(0.5, 0.2), torch.tensor([0, 0]), max_weight=2.0).tolist() == [0.0, 0.0]
    empty = torch.zeros(0, dtype=torch.float64)
    for function in (segment_weights, lambda g, n: shuffled(g, n, seed=1), lambda g, n: resampled(g, n, seed=1)):
        assert function(empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@settings(max_examples=120, deadline=None)
@given(steps(), st.sampled_from([None, 1.05, 1.5, 4.0]))
def test_equals_the_definition_with_unit_mean_and_nothing_above_the_cap(
    step: tuple[Tensor, Tensor], cap: float | None
) -> None:
    log_gate, tokens = step
    got = segment_weights(log_gate, tokens, max_weight=cap)
    if not tokens.any():
        assert (got == 0).all()
        return
    wanted = slow_capped(log_gate.exp().tolist(), tokens.tolist(), 1e300 if cap is None else cap)
    assert got.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    assert float((got * tokens).sum() / tokens.sum()) == pytest.approx(1.0, rel=1e-13)
    if cap is not None:
        assert got.max().item() <= cap


@settings(max_examples=100, deadline=None)
@given(steps(steepest=2000.0), st.sampled_from([1.01, 2.0]))
def test_the_capped_mean_is_one_however_steep_the_gates_are(step: tuple[Tensor, Tensor], cap: float) -> None:
    log_gate, tokens = step
    got = segment_weights(log_gate, tokens, max_weight=cap)
    assert (got >= 0).all() and got.max().item() <= cap
    if tokens.any():
        assert float((got * tokens).sum() / tokens.sum()) == pytest.approx(1.0, rel=1e-13)
    for i in range(len(got)):
        for j in range(len(got)):
            if tokens[i] and tokens[j] and log_gate[i] <= log_gate[j]:
                assert got[i] <= got[j]


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(0, 2**31), st.sampled_from([None, 1.5]))
def test_order_and_segments_without_tokens_do_not_change_a_bit(
    step: tuple[Tensor, Tensor], seed: int, cap: float | None
) -> None:
    log_gate, tokens = step
    weights = segment_weights(log_gate, tokens, max_weight=cap)
    order = torch.randperm(len(log_gate), generator=torch.Generator().manual_seed(seed))
    assert segment_weights(log_gate[order], tokens[order], max_weight=cap).equal(weights[order])
    padded = torch.cat([logs(1.0, 1.0), log_gate, logs(0.1)])
    zero = torch.zeros(2, dtype=torch.int64)
    got = segment_weights(padded, torch.cat([zero, tokens, zero[:1]]), max_weight=cap)
    assert got[2:-1].equal(weights)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([None, 1.3]), st.sampled_from([0.3, 300.0]))
def test_gathered_shards_give_the_whole_batchs_weights(seed: int, shard: int, cap: float | None, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    behavior = -torch.rand(5, 11, generator=generator, dtype=torch.float64)
    current = behavior + scale * torch.randn(5, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 11, generator=generator) < 0.8
    segments = block_segments(torch.randint(1, 12, (5,), generator=generator), 11, 3)
    data = (current, behavior, mask, segments)
    whole = drift_gate(*data, tau=2.0, statistic="rms", normalize="step", max_weight=cap)
    log_gates, tokens, gather = [], [], []
    for start in range(0, 5, shard):
        part = tuple(tensor[start : start + shard] for tensor in data)
        raw = drift_gate(*part, tau=2.0, statistic="rms", normalize="none")
        log_gates.append(raw.segment_log_gate)
        tokens.append(raw.segment_tokens)
        gather.append((part[2] & (part[3] >= 0), part[3].clamp(min=0)))
    flat = segment_weights(
        torch.cat([x.flatten() for x in log_gates]), torch.cat([x.flatten() for x in tokens]), max_weight=cap
    )
    rows = []
    for weights, like, (valid, ids) in zip(
        torch.split(flat, [x.numel() for x in log_gates]), log_gates, gather, strict=True
    ):
        rows.append(torch.where(valid, weights.view(like.shape).gather(1, ids), 0.0))
    torch.testing.assert_close(torch.cat(rows), whole.token_weights, rtol=1e-12, atol=1e-300)


@settings(max_examples=80, deadline=None)
@given(steps(), st.integers(0, 2**31))
def test_shuffle_keeps_the_gates_and_leaves_segments_without_tokens(step: tuple[Tensor, Tensor], seed: int) -> None:
    log_gate, tokens = step
    got = shuffled(log_gate, tokens, seed=seed)
    used = tokens > 0
    assert got[~used].equal(log_gate[~used])
    assert Counter(got[used].tolist()) == Counter(log_gate[used].tolist())
    assert got.equal(shuffled(log_gate, tokens, seed=seed))


@settings(max_examples=80, deadline=None)
@given(steps(), st.integers(0, 2**31))
def test_resampling_draws_from_the_used_gates(step: tuple[Tensor, Tensor], seed: int) -> None:
    log_gate, tokens = step
    got = resampled(log_gate, tokens, seed=seed)
    used = tokens > 0
    assert got[~used].equal(log_gate[~used])
    assert set(got[used].tolist()) <= set(log_gate[used].tolist())
    assert got.equal(resampled(log_gate, tokens, seed=seed))


def test_another_seed_is_another_control() -> None:
    log_gate, tokens = -torch.arange(50.0), torch.ones(50, dtype=torch.int64)
    for control in (shuffled, resampled):
        first, second = control(log_gate, tokens, seed=1), control(log_gate, tokens, seed=2)
        assert not first.equal(second) and not first.equal(log_gate)
        assert first.dtype == torch.float32


def test_the_inputs_of_a_control_stay_as_they_are() -> None:
    log_gate, tokens = logs(0.5, 0.4, 0.3), torch.tensor([1, 2, 3])
    kept = log_gate.clone()
    shuffled(log_gate, tokens, seed=0)
    resampled(log_gate, tokens, seed=0)
    assert log_gate.equal(kept)


def test_every_order_is_as_likely_in_a_shuffle() -> None:
    log_gate, tokens = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([5, 1, 1])
    seen = Counter(tuple(shuffled(log_gate, tokens, seed=seed).tolist()) for seed in range(600))
    assert len(seen) == 6 and max(seen.values()) < 150 and min(seen.values()) > 60  # 100 each, sd 9


def test_resampling_keeps_the_distribution_over_tokens() -> None:
    # Nine tokens of gate a in one segment, one token of gate b in another: a token has gate a in 9 of 10 draws.
    log_gate, tokens = torch.tensor([-1.0, -2.0]), torch.tensor([9, 1])
    drawn = torch.stack([resampled(log_gate, tokens, seed=seed) for seed in range(1000)])
    shares = (drawn == -1.0).double().mean(dim=0)
    assert shares.tolist() == pytest.approx([0.9, 0.9], abs=0.04)  # sd 0.0095


@pytest.mark.parametrize(
    ("log_gate", "tokens", "cap"),
    [
        (torch.zeros(3), torch.ones(2), None),
        (torch.zeros(2, 3), torch.ones(2, 3), None),
        (torch.tensor([0.0, NAN]), torch.ones(2), None),
        (torch.zeros(2), torch.ones(2), 1.0),
        (torch.zeros(2), torch.ones(2), NAN),
    ],
)
def test_a_callers_fault_is_one_clear_line(log_gate: Tensor, tokens: Tensor, cap: float | None) -> None:
    with pytest.raises(ValueError, match="; |, ") as caught:
        segment_weights(log_gate, tokens, max_weight=cap)
    assert "\n" not in str(caught.value)


def test_controls_refuse_shapes_that_differ() -> None:
    for control in (shuffled, resampled):
        with pytest.raises(ValueError, match="shapes differ"):
            control(torch.zeros(3), torch.ones(2), seed=0)
