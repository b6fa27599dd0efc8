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
NORMALIZE = ("step", "sequence", "none")


def gate(drift: Tensor, mask: Tensor | None = None, segments: Tensor | None = None, **options: Any) -> GateResult:
    """Gate whose behaviour log-probs are -2 and whose current ones are off by `drift`."""
    behavior = torch.full_like(drift, -2.0)
    mask = torch.ones_like(drift, dtype=torch.bool) if mask is None else mask
    if segments is None:
        segments = block_segments(torch.full(drift.shape[:1], drift.shape[1]), drift.shape[1], 2)
    defaults: dict[str, Any] = {"tau": 1.0, "statistic": "signed_mean", "normalize": "step"}
    return drift_gate(behavior + drift, behavior, mask, segments, **(defaults | options))


def slow_gate(
    current: Tensor,
    behavior: Tensor,
    mask: Tensor,
    segments: Tensor,
    tau: Any,
    statistic: str,
    normalize: str,
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Weights, gates and statistics by the definition, with Python floats (only where nothing underflows)."""
    batch, width = current.shape
    size = int(segments.max()) + 1
    gates, scores, counts = [], [], []
    for b in range(batch):
        gates.append([1.0] * size)
        scores.append([0.0] * size)
        counts.append([0] * size)
        for s in range(size):
            inside = [t for t in range(width) if mask[b, t] and int(segments[b, t]) == s]
            if not inside:
                continue
            d = [float(current[b, t]) - float(behavior[b, t]) for t in inside]
            score = {
                "signed_mean": sum(d) / len(d),
                "mean_abs": sum(abs(x) for x in d) / len(d),
                "rms": math.sqrt(sum(x * x for x in d) / len(d)),
                "k3": sum(math.exp(x) - 1 - x for x in d) / len(d),
            }[statistic]
            strength = float(tau[b, s]) if isinstance(tau, Tensor) else tau
            scores[b][s], counts[b][s] = score, len(inside)
            gates[b][s] = math.exp(-strength * abs(score))
    rows = [[b] for b in range(batch)] if normalize == "sequence" else [list(range(batch))]
    mean = [1.0] * batch
    for group in rows if normalize != "none" else []:
        tokens = sum(counts[b][s] for b in group for s in range(size))
        total = sum(counts[b][s] * gates[b][s] for b in group for s in range(size))
        for b in group:
            mean[b] = total / tokens if tokens else 1.0
    weights = [
        [gates[b][int(segments[b, t])] / mean[b] if mask[b, t] else 0.0 for t in range(width)] for b in range(batch)
    ]
    return weights, gates, scores


def test_signed_mean_by_hand() -> None:
    # Blocks of 2. Row 0: (0.4, -0.2) -> s = 0.1; (-0.6, masked) -> s = -0.6 over one token.
    # Row 1: (0.3, -0.3) -> s = 0 (they cancel); (1, 1) -> s = 1.
    drift = torch.tensor([[0.4, -0.2, -0.6, 9.0], [0.3, -0.3, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    got = gate(drift, mask, tau=2.0)
    g = [[math.exp(-0.2), math.exp(-1.2)], [1.0, math.exp(-2.0)]]
    # Mean over the seven valid tokens: (2 g00 + 1 g01 + 2 g10 + 2 g11) / 7.
    mean = (2 * g[0][0] + g[0][1] + 2 * g[1][0] + 2 * g[1][1]) / 7
    drifts = torch.tensor([[0.1, -0.6], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(got.segment_drift, drifts, rtol=0, atol=1e-15)
    torch.testing.assert_close(got.segment_gate, torch.tensor(g, dtype=torch.float64))
    assert got.segment_tokens.tolist() == [[2, 1], [2, 2]]
    expected = [
        [g[0][0] / mean, g[0][0] / mean, g[0][1] / mean, 0.0],
        [g[1][0] / mean, g[1][0] / mean, g[1][1] / mean, g[1][1] / mean],
    ]
    torch.testing.assert_close(got.token_weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("signed_mean", (0.3 - 0.1) / 2),
        ("mean_abs", (0.3 + 0.1) / 2),
        ("rms", math.sqrt((0.09 + 0.01) / 2)),
        ("k3", ((math.exp(0.3) - 1 - 0.3) + (math.exp(-0.1) - 1 + 0.1)) / 2),
    ],
)
def test_each_statistic_by_hand(statistic: str, expected: float) -> None:
    got = gate(torch.tensor([[0.3, -0.1]], dtype=torch.float64), statistic=statistic, normalize="none", tau=3.0)
    assert got.segment_drift.item() == pytest.approx(expected, rel=1e-12)
    assert got.segment_gate.item() == pytest.approx(math.exp(-3 * expected), rel=1e-12)


def test_sequence_normalisation_keeps_nothing_between_rows() -> None:
    drift = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    weights = gate(drift, normalize="sequence").token_weights
    low = math.exp(-1)
    row = [2 / (1 + low), 2 / (1 + low), 2 * low / (1 + low), 2 * low / (1 + low)]
    torch.testing.assert_close(weights, torch.tensor([row, [1.0] * 4], dtype=torch.float64))


def test_tau_per_segment() -> None:
    drift = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    got = gate(drift, tau=torch.tensor([[0.0, 4.0]]), normalize="none")
    torch.testing.assert_close(got.segment_gate, torch.tensor([[1.0, math.exp(-2.0)]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    got = gate(torch.tensor([[0.5, 0.25, 0.0, 0.5]], dtype=dtype))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {got.token_weights.dtype, got.segment_gate.dtype, got.segment_drift.dtype} == {wanted}
    assert got.segment_tokens.dtype == torch.int64
    assert got.segment_drift.tolist() == [[0.375, 0.25]]


def test_small_drift_keeps_its_digits_in_float32() -> None:
    behavior = torch.full((1, 2), -2.0)
    current = behavior + torch.tensor([[2.0**-12, -(2.0**-11)]])
    got = drift_gate(
        current, behavior, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64), tau=1.0, statistic="k3",
        normalize="none",
    )  # fmt: skip
    x, y = 2.0**-12, -(2.0**-11)
    exact = ((x * x / 2 + x**3 / 6 + x**4 / 24) + (y * y / 2 + y**3 / 6 + y**4 / 24)) / 2
    assert got.segment_drift.item() == pytest.approx(exact, rel=1e-6)


def test_result_is_detached() -> None:
    drift = torch.tensor([[0.1, 0.4, -0.2, 0.0]], requires_grad=True)
    tau = torch.tensor(1.5, requires_grad=True)
    got = gate(drift, tau=tau)
    for tensor in (got.token_weights, got.segment_gate, got.segment_drift, got.weight_sum):
        assert not tensor.requires_grad


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_weights_are_exactly_one_without_tau_or_drift(statistic: str, normalize: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(5, 77, generator=generator) * 3
    drift[0, 0] = 60.0
    mask = torch.rand(5, 77, generator=generator) < 0.7
    mask[3] = False
    no_tau = gate(drift, mask, tau=0.0, statistic=statistic, normalize=normalize)
    no_drift = gate(torch.zeros_like(drift), mask, tau=3.0, statistic=statistic, normalize=normalize)
    assert no_tau.token_weights.equal(mask.float())
    assert no_drift.token_weights.equal(mask.float())
    assert no_tau.weight_sum.item() == mask.sum().item() == no_tau.num_tokens.item()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_equal_drift_gives_exactly_one(statistic: str) -> None:
    got = gate(torch.full((3, 6), -0.7), statistic=statistic, tau=3.7)
    assert got.token_weights.equal(torch.ones(3, 6))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_of_fifty(statistic: str, sign: float, dtype: torch.dtype) -> None:
    drift = torch.tensor([[50.0, 50.0, 0.0, 0.0], [0.0, 0.0, 50.0, 50.0]], dtype=dtype) * sign
    got = gate(drift, statistic=statistic)
    torch.testing.assert_close(got.token_weights, (drift == 0).to(dtype) * 2, atol=1e-15, rtol=1e-6)


def test_all_raw_gates_underflow() -> None:
    # |s| tau = 4000 and 4001: both gates are 0 even in float64, their ratio is exp(-1).
    got = gate(torch.tensor([[40.0, 40.0, 40.01, 40.01]], dtype=torch.float64), tau=100.0)
    assert got.segment_gate.tolist() == [[0.0, 0.0]]
    low = math.exp(-1)
    expected = [2 / (1 + low)] * 2 + [2 * low / (1 + low)] * 2
    torch.testing.assert_close(got.token_weights, torch.tensor([expected], dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_statistic_that_overflows_counts_as_equally_far() -> None:
    # exp(800) overflows even in float64: both statistics are inf.
    got = gate(torch.full((1, 4), 800.0), statistic="k3")
    assert got.segment_gate.tolist() == [[0.0, 0.0]]
    assert got.token_weights.tolist() == [[1.0] * 4]
    assert gate(torch.full((1, 4), 800.0), statistic="k3", tau=0.0).segment_gate.tolist() == [[1.0, 1.0]]


def test_raw_gates_underflow_in_float32_as_documented() -> None:
    drift = torch.tensor([[87.0, 87.0, 104.0, 104.0]])
    single = gate(drift, normalize="none")
    assert single.segment_gate[0, 0].item() == pytest.approx(math.exp(-87.0), rel=1e-5)
    assert single.segment_gate[0, 1].item() == 0.0
    double = gate(drift.double(), normalize="none")
    assert double.segment_gate[0, 1].item() == pytest.approx(math.exp(-104.0), rel=1e-12)
    assert double.weight_sum.item() == pytest.approx(2 * math.exp(-87.0) + 2 * math.exp(-104.0), rel=1e-12)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["current", "behavior", "both"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_non_finite_logprobs_leave_the_mask(bad: float, side: str, normalize: Any) -> None:
    drift = torch.tensor([[0.5, -0.1, 0.2, 0.9]])
    behavior = torch.full_like(drift, -2.0)
    current = behavior + drift
    if side != "behavior":
        current[0, 1] = bad
    if side != "current":
        behavior[0, 1] = bad
    ids = torch.tensor([[0, 0, 1, 1]])
    got = drift_gate(current, behavior, torch.ones(1, 4), ids, tau=1.0, statistic="rms", normalize=normalize)
    clean = gate(drift, torch.tensor([[1, 0, 1, 1]]), statistic="rms", normalize=normalize)
    assert got.segment_tokens.tolist() == [[1, 2]]
    assert got.token_weights.equal(clean.token_weights)
    assert got.segment_drift.equal(clean.segment_drift)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_empty_responses_segments_and_batches(normalize: str) -> None:
    drift = torch.tensor([[0.5, 0.5, 0.9], [NAN, NAN, NAN], [0.3, NAN, NAN]])
    ids = block_segments(torch.tensor([3, 0, 1]), 3, 1)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0]])
    got = gate(drift, mask, ids, normalize=normalize)
    assert got.segment_tokens.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert got.segment_gate[1].tolist() == [1.0, 1.0, 1.0] and got.segment_gate[0, 1].item() == 1.0
    assert got.segment_drift[1].tolist() == [0.0, 0.0, 0.0]
    assert got.token_weights[1].tolist() == [0.0, 0.0, 0.0] and got.token_weights[0, 1].item() == 0.0
    assert got.token_weights.isfinite().all()
    nothing = gate(drift, torch.zeros(3, 3), ids, normalize=normalize)
    assert nothing.token_weights.equal(torch.zeros(3, 3)) and nothing.weight_sum.item() == 0.0
    for shape in ((0, 3), (2, 0)):
        empty = torch.zeros(shape)
        got = gate(empty, segments=torch.full(shape, -1), normalize=normalize)
        assert got.token_weights.shape == shape and got.segment_gate.shape == (shape[0], 0)
    padded = gate(torch.zeros(2, 3), segments=torch.full((2, 3), -1), normalize=normalize)
    assert padded.token_weights.equal(torch.zeros(2, 3)) and padded.segment_gate.shape == (2, 0)


def test_one_token() -> None:
    got = gate(torch.tensor([[0.7]]), segments=torch.tensor([[0]]))
    assert got.token_weights.tolist() == [[1.0]]
    assert got.segment_gate.item() == pytest.approx(math.exp(-0.7), rel=1e-6)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    batch, width = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 0.3, 3.0]))
    behavior = -3 * torch.rand(batch, width, generator=generator, dtype=torch.float64)
    current = behavior + scale * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (batch,), generator=generator)
    segments = block_segments(lengths, width, draw(st.none() | st.integers(1, 6)))
    mask = (torch.rand(batch, width, generator=generator) < 0.8) & (segments >= 0)
    size = int(segments.max()) + 1
    tau: Any = draw(st.sampled_from([0.5, 1.0, 4.0]))
    if draw(st.booleans()):
        tau = tau * torch.rand(batch, size, generator=generator, dtype=torch.float64)
    return {
        "current": current,
        "behavior": behavior,
        "mask": mask,
        "segments": segments,
        "tau": tau,
        "statistic": draw(st.sampled_from(STATISTICS)),
        "generator": generator,
    }


def run(batch: dict[str, Any], normalize: Any, **changes: Any) -> GateResult:
    b = batch | changes
    return drift_gate(
        b["current"], b["behavior"], b["mask"], b["segments"], tau=b["tau"], statistic=b["statistic"],
        normalize=normalize,
    )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(batches(), st.sampled_from(NORMALIZE))
def test_equals_the_definition_and_has_unit_mean(batch: dict[str, Any], normalize: str) -> None:
    got = run(batch, normalize)
    if got.segment_gate.shape[1]:
        b = batch
        slow = slow_gate(b["current"], b["behavior"], b["mask"], b["segments"], b["tau"], b["statistic"], normalize)
        for found, wanted in zip(
            (got.token_weights, got.segment_gate, got.segment_drift),
            slow,
            strict=True,
        ):
            torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    mask = batch["mask"]
    if normalize == "step" and mask.any():
        assert got.token_weights[mask].mean().item() == pytest.approx(1.0, rel=1e-12)
    if normalize == "sequence":
        for row in range(mask.shape[0]):
            if mask[row].any():
                assert got.token_weights[row][mask[row]].mean().item() == pytest.approx(1.0, rel=1e-12)
    assert (got.token_weights[~mask] == 0).all()


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(NORMALIZE), st.sampled_from([NAN, INF, -INF, 1e30, 0.0]))
def test_masked_and_padded_positions_may_hold_anything(batch: dict[str, Any], normalize: str, garbage: float) -> None:
    dirty = {key: torch.where(batch["mask"], batch[key], garbage) for key in ("current", "behavior")}
    clean, got = run(batch, normalize), run(batch, normalize, **dirty)
    assert clean.token_weights.equal(got.token_weights) and clean.segment_drift.equal(got.segment_drift)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_order_of_sequences_does_not_matter(batch: dict[str, Any]) -> None:
    order = torch.randperm(batch["mask"].shape[0], generator=batch["generator"])
    moved = {key: batch[key][order] for key in ("current", "behavior", "mask", "segments")}
    if isinstance(batch["tau"], Tensor):
        moved["tau"] = batch["tau"][order]
    torch.testing.assert_close(
        run(batch, "step", **moved).token_weights, run(batch, "step").token_weights[order], rtol=1e-13, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 3))
def test_raw_gates_of_shards_give_the_whole_batchs_weights(batch: dict[str, Any], shard: int) -> None:
    whole = run(batch, "step")
    raw, total, tokens = [], 0.0, 0
    for start in range(0, batch["mask"].shape[0], shard):
        part = {key: batch[key][start : start + shard] for key in ("current", "behavior", "mask", "segments")}
        size = int(part["segments"].max()) + 1
        if isinstance(batch["tau"], Tensor):
            part["tau"] = batch["tau"][start : start + shard, :size]
        got = run(batch, "none", **part)
        raw.append(got.token_weights)
        total += got.weight_sum.item()
        tokens += int(got.num_tokens)
    assert tokens == int(whole.num_tokens)
    if tokens:
        torch.testing.assert_close(torch.cat(raw) * tokens / total, whole.token_weights, rtol=1e-12, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=8), st.sampled_from(("signed_mean", "mean_abs", "rms")))
def test_gate_falls_as_the_statistic_grows(drifts: list[float], statistic: str) -> None:
    drift = torch.tensor([sorted(drifts, key=abs)], dtype=torch.float64)
    ids = torch.arange(drift.shape[1]).unsqueeze(0)
    got = gate(drift, segments=ids, statistic=statistic)
    assert (got.segment_gate.diff() <= 1e-12).all()
    assert (got.token_weights.diff() <= 1e-12).all()
    for near, far in zip(got.segment_drift[0][:-1].abs(), got.segment_drift[0][1:].abs(), strict=True):
        if far > near * (1 + 1e-9) + 1e-9:
            assert (
                got.segment_gate[got.segment_drift.abs() == far].max()
                < got.segment_gate[got.segment_drift.abs() == near].min() + 1e-300
            )


def test_a_block_as_long_as_the_response_is_the_sequence_gate_and_one_is_the_token_gate() -> None:
    drift = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([7, 4, 0])
    mask = torch.arange(7) < lengths.unsqueeze(1)
    whole = gate(drift, mask, block_segments(lengths, 7, None))
    for size in (7, 8, 1000):
        assert gate(drift, mask, block_segments(lengths, 7, size)).token_weights.equal(whole.token_weights)
    token = gate(drift, mask, block_segments(lengths, 7, 1), normalize="none").token_weights
    behavior = torch.full_like(drift, -2.0)
    torch.testing.assert_close(token, torch.exp(-((behavior + drift) - behavior).abs()) * mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": -1.0},
        {"tau": NAN},
        {"tau": INF},
        {"tau": torch.ones(1, 3)},
        {"tau": torch.tensor([[1.0, -1.0]])},
        {"statistic": "mean"},
        {"normalize": "batch"},
        {"mask": torch.ones(1, 3)},
        {"segments": torch.zeros(2, 4, dtype=torch.int64)},
    ],
)
def test_a_callers_fault_is_one_clear_line(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="; ") as caught:
        gate(torch.zeros(1, 4), **changes)
    assert "\n" not in str(caught.value)


def test_flat_logprobs_are_refused() -> None:
    flat = torch.zeros(4)
    with pytest.raises(ValueError, match=r"\[B,T\]"):
        drift_gate(flat, flat, flat, flat.long(), tau=1.0, statistic="rms", normalize="step")
