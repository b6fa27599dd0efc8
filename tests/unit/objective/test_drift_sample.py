import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import block_segments, drift_gate, drift_standard_error, stratified_sample

NAN = float("nan")


def batch(seed: int, rows: int = 3, width: int = 40, block: int = 16) -> tuple[Tensor, Tensor]:
    """Valid mask with holes, segments."""
    generator = torch.Generator().manual_seed(seed)
    segments = block_segments(torch.randint(1, width + 1, (rows,), generator=generator), width, block)
    return (torch.rand(rows, width, generator=generator) < 0.8) & (segments >= 0), segments


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_one_token_of_each_stratum_and_small_segments_whole(seed: int, size: int) -> None:
    valid, segments = batch(seed)
    measured = stratified_sample(valid, segments, tokens_per_segment=size, seeds=[seed, seed + 1, seed + 2])
    assert measured.dtype == torch.bool and not (measured & ~valid).any()
    for b in range(3):
        for s in range(int(segments.max()) + 1):
            inside = [t for t in range(40) if valid[b, t] and int(segments[b, t]) == s]
            taken = [rank for rank, t in enumerate(inside) if measured[b, t]]
            if len(inside) <= size:
                assert taken == list(range(len(inside)))
                continue
            assert len(taken) == size
            for j, rank in enumerate(taken):
                assert j * len(inside) // size <= rank < (j + 1) * len(inside) // size


def test_a_trajectorys_sample_depends_on_its_seed_and_tokens_only() -> None:
    valid, segments = batch(5)
    seeds = [11, 12, 13]
    whole = stratified_sample(valid, segments, tokens_per_segment=4, seeds=seeds)
    order = torch.tensor([2, 0, 1])
    moved = stratified_sample(valid[order], segments[order], tokens_per_segment=4, seeds=[13, 11, 12])
    assert moved.equal(whole[order])
    pad = torch.zeros(1, 9, dtype=torch.bool)
    alone = stratified_sample(
        torch.cat([valid[1:2], pad], 1), torch.cat([segments[1:2], pad.long() - 1], 1), tokens_per_segment=4, seeds=[12]
    )
    assert alone[0, :40].equal(whole[1]) and not alone[0, 40:].any()
    assert not stratified_sample(valid, segments, tokens_per_segment=4, seeds=[1, 2, 3]).equal(whole)


def test_the_global_random_state_is_left_alone() -> None:
    valid, segments = batch(5)
    state = torch.get_rng_state()
    stratified_sample(valid, segments, tokens_per_segment=4, seeds=[1, 2, 3])
    assert torch.get_rng_state().equal(state)


def test_each_token_of_a_stratum_is_as_likely() -> None:
    # 10 tokens in 4 strata of 2, 3, 2, 3.
    valid, segments = torch.ones(1, 10), torch.zeros(1, 10, dtype=torch.int64)
    draws = [stratified_sample(valid, segments, tokens_per_segment=4, seeds=[seed]) for seed in range(1200)]
    shares = torch.stack(draws).double().mean(dim=0)[0]
    assert shares.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3 + [1 / 2] * 2 + [1 / 3] * 3, abs=0.06)  # sd .014


def test_nothing_to_sample() -> None:
    for shape in ((0, 3), (2, 0), (2, 3)):
        nothing = torch.zeros(shape)
        seeds = [0] * shape[0]
        assert not stratified_sample(nothing, nothing.long(), tokens_per_segment=2, seeds=seeds).any()
        assert not stratified_sample(nothing + 1, nothing.long() - 1, tokens_per_segment=2, seeds=seeds).any()


def test_the_sampled_gate_is_near_the_full_one() -> None:
    generator = torch.Generator().manual_seed(3)
    behavior = -torch.rand(4, 256, generator=generator, dtype=torch.float64)
    drift = 0.5 + 0.1 * torch.randn(4, 256, generator=generator, dtype=torch.float64)
    valid, segments = torch.ones(4, 256), block_segments(torch.full((4,), 256), 256, 64)
    measured = stratified_sample(valid, segments, tokens_per_segment=16, seeds=range(4))
    options: dict[str, Any] = {"tau": 1.0, "statistic": "signed_mean", "normalize": "none"}
    full = drift_gate(behavior + drift, behavior, valid, segments, **options)
    sampled = drift_gate(
        torch.where(measured, behavior + drift, NAN), behavior, valid, segments, measured_mask=measured, **options
    )
    errors = drift_standard_error(behavior + drift, behavior, measured, valid, segments)
    off = (full.segment_drift - sampled.segment_drift).abs()
    assert (off > 0).all() and (off < 4 * errors).all()
    wanted = 0.1 * math.sqrt((1 - 16 / 64) / 16)
    assert errors.square().mean().sqrt().item() == pytest.approx(wanted, rel=0.2)  # over 16 segments


def test_standard_error_by_hand() -> None:
    # Segment 0: 3 of 6 measured with d = 0.1, 0.4, 0.2: sum of squared steps 0.09 + 0.04.
    # Segment 1: measured whole. Segment 2: 1 of 2.
    drift = torch.tensor([[0.1, 9.0, 0.4, 9.0, 0.2, 9.0, 0.5, 0.6, 0.3, 9.0]], dtype=torch.float64)
    measured = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1, 1, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 2, 2]])
    current = torch.where(measured > 0, drift - 2, NAN)
    got = drift_standard_error(current, torch.full_like(drift, -2.0), measured, torch.ones(1, 10), segments)
    assert got.dtype == torch.float64 and got.shape == (1, 3)
    assert got[0, 0].item() == pytest.approx(math.sqrt((1 - 3 / 6) / 3 * 0.13 / (2 * 2)), rel=1e-12)
    assert got[0, 1].item() == 0.0 and got[0, 2].isnan()


def test_standard_error_without_valid_tokens_and_with_broken_ones() -> None:
    current = torch.tensor([[0.1, NAN, 0.3, 0.3], [NAN, NAN, NAN, NAN]])
    ones, segments = torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    # The broken token leaves the valid ones: what remains of row 0 is measured whole.
    assert drift_standard_error(current, ones, ones, mask, segments).tolist() == [[0.0], [0.0]]
    assert drift_standard_error(current, ones, ones, mask, segments - 1).shape == (2, 0)
    empty = torch.zeros(0, 4)
    assert drift_standard_error(empty, empty, empty, empty, empty.long()).shape == (0, 0)


def test_standard_error_estimates_the_spread_of_the_sampled_mean() -> None:
    generator = torch.Generator().manual_seed(8)
    drift = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    zero, valid, segments = torch.zeros(1, 64), torch.ones(1, 64), torch.zeros(1, 64, dtype=torch.int64)
    means, variances = [], []
    for seed in range(800):
        measured = stratified_sample(valid, segments, tokens_per_segment=8, seeds=[seed])
        means.append(drift[measured].mean())
        variances.append(drift_standard_error(drift, zero, measured, valid, segments).square())
    assert torch.stack(means).mean().item() == pytest.approx(drift.mean().item(), abs=0.05)
    ratio = (torch.stack(variances).mean() / torch.stack(means).var()).item()
    assert 0.8 < ratio < 1.6  # errs on the high side, by the steps between the strata's means


def test_a_trend_that_stratification_removes_is_mostly_left_out_of_the_error() -> None:
    # d rises from 0 to 63: the plain variance formula gives sqrt((1 - 1/8) / 8 * 341) = 6.1.
    drift = torch.arange(64, dtype=torch.float64).unsqueeze(0)
    valid, segments = torch.ones(1, 64), torch.zeros(1, 64, dtype=torch.int64)
    measured = stratified_sample(valid, segments, tokens_per_segment=8, seeds=[0])
    error = drift_standard_error(drift, drift * 0, measured, valid, segments).item()
    assert 0.8 < error < 3.0  # the true one is sqrt(21/4 / 8) = 0.81


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_segment": 0},
        {"seeds": [1]},
        {"segment_ids": torch.zeros(2, 3).long()},
        {"valid_mask": torch.ones(4)},
    ],
)
def test_a_callers_fault_is_one_clear_line(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"valid_mask": torch.ones(2, 4), "segment_ids": torch.zeros(2, 4).long()}
    arguments |= {"tokens_per_segment": 2, "seeds": [1, 2]} | changes
    with pytest.raises(ValueError, match="; ") as caught:
        stratified_sample(**arguments)
    assert "\n" not in str(caught.value)


def test_standard_error_refuses_shapes_that_differ() -> None:
    good = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="shapes differ"):
        drift_standard_error(good, good, good, good, torch.zeros(2, 3).long())
