"""Step diagnostics: hand-made numbers, numpy references, and independence of how the work was split."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.learner.diagnostics import Metrics, ProbeFacts, SegmentFacts, StepDiagnostics, TokenStats
from opd_ray.learner.distribution import (
    DRIFT_EDGES,
    UNIT_EDGES,
    WEIGHT_EDGES,
    Distribution,
    Grid,
    IntArray,
    Moments,
)
from opd_ray.telemetry.metrics import checked_metrics
from opd_ray.types import Histogram

Step = tuple[list[TokenStats], list[SegmentFacts], list[ProbeFacts]]


def tokens(
    position: list[float], weight: list[float], kl: list[float], staleness: list[int], segment: list[int]
) -> TokenStats:
    return TokenStats(
        np.array(position, dtype=np.float64),
        np.array(weight, dtype=np.float64),
        np.array(kl, dtype=np.float64),
        np.array(staleness, dtype=np.int64),
        np.array(segment, dtype=np.int64),
    )


def segments(
    drift: list[float], gate: list[float], num_tokens: list[int], staleness: list[int], measured: list[bool]
) -> SegmentFacts:
    return SegmentFacts(
        np.array(drift), np.array(gate), np.array(num_tokens), np.array(staleness), np.array(measured, dtype=np.bool_)
    )


def probes(position: list[float], mass: list[float], overlap: list[float], entropy: list[float]) -> ProbeFacts:
    return ProbeFacts(np.array(position), np.array(mass), np.array(overlap), np.array(entropy))


def metrics_of(step: Step, weight_scale: float = 1.0, min_support_mass: float = 0.5) -> Metrics:
    return StepDiagnostics.of(*step, weight_scale=weight_scale).metrics(min_support_mass=min_support_mass)


def random_step(seed: int, num_tokens: int, num_probes: int = 20, max_staleness: int = 3) -> Step:
    rng = np.random.default_rng(seed)
    size = num_tokens // 8 + 1
    drift = rng.normal(0, 0.3, size)
    measured = rng.random(size) < 0.7
    drift[~measured] = 0.0
    gate = np.exp(-np.abs(drift))
    segment = np.sort(rng.integers(0, size, num_tokens))
    staleness = rng.integers(0, max_staleness + 1, size)
    token_facts = TokenStats(
        rng.random(num_tokens), gate[segment], rng.normal(0.1, 1.0, num_tokens), staleness[segment], segment
    )
    counts = np.bincount(segment, minlength=size)
    probe_facts = ProbeFacts(*(rng.random(num_probes) for _ in range(4)))
    return [token_facts], [SegmentFacts(drift, gate, counts, staleness, measured)], [probe_facts]


def test_hand_made_step() -> None:
    facts = tokens(
        [0.0, 0.09, 0.5, 0.5, 0.99, 0.95],
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25],
        [0.1, 0.3, 1.0, 2.0, -1.0, 4.0],
        [0, 0, 2, 2, 2, 2],
        [0, 0, 1, 1, 3, 3],
    )
    # The third has no valid tokens and takes no part.
    blocks = segments(
        [9.0, -0.7, 50.0, 1.4], [1.0, 0.5, 0.0, 0.25], [2, 2, 0, 2], [0, 2, 2, 2], [False, True, True, True]
    )
    metrics = metrics_of(([facts], [blocks], []), weight_scale=6 / 3.5)
    expected = {
        "gate/segments": 3.0,
        "gate/measured_share": 2 / 3,
        "gate/value/min": 0.25,
        "gate/value/max": 1.0,
        "gate/value/mean": 1.75 / 3,
        "gate/value/p05": np.quantile([0.25, 0.5, 1.0], 0.05),
        "gate/value/share_under_half": 1 / 3,
        # A fresh segment's drift is zero by definition.
        "gate/drift_abs/mean": 0.7,
        "gate/drift_abs/max": 1.4,
        "gate/drift_abs/p95": np.quantile([0.0, 0.7, 1.4], 0.95),
        "gate/drift_abs/measured_p50": 1.05,
        "gate/drift_abs/measured_p95": np.quantile([0.7, 1.4], 0.95),
        "gate/drift_abs/staleness_0": 0.0,
        "gate/drift_abs/staleness_2": 1.05,
        "gate/weight/min": 0.25 * 6 / 3.5,
        "gate/weight/max": 6 / 3.5,
        "gate/weight/zero_share": 0.0,
        # Kish: (sum w)^2 / (n sum w^2).
        "gate/effective_sample_share": 3.5**2 / (6 * (2 + 0.5 + 0.125)),
        "gate/weight_share/position_0": 2 / 3.5,
        "gate/token_share/position_0": 2 / 6,
        "gate/weight_share/position_5": 1 / 3.5,
        "gate/token_share/position_5": 2 / 6,
        "gate/weight_share/position_9": 0.5 / 3.5,
        "gate/token_share/position_9": 2 / 6,
        "gate/weight_share/staleness_0": 2 / 3.5,
        "gate/token_share/staleness_0": 2 / 6,
        "gate/weight_share/staleness_2": 1.5 / 3.5,
        "gate/token_share/staleness_2": 4 / 6,
        "learner/kl/position_0": 0.2,
        "learner/kl/position_5": 1.5,
        "learner/kl/position_9": 1.5,
    }
    histograms = {key for key, value in metrics.items() if isinstance(value, Histogram)}
    assert histograms == {"gate/value/histogram", "gate/drift_abs/histogram", "gate/weight/histogram"}
    assert {key: metrics[key] for key in metrics.keys() - histograms} == pytest.approx(expected)


def test_histograms_count_the_right_things() -> None:
    facts = tokens([0.0] * 4, [0.0, 1.0, 1.0, 2.0], [0.0] * 4, [0] * 4, [0, 1, 1, 1])
    blocks = segments([20.0, 0.5, 0.0], [0.0, 1.0, 1.0], [1, 3, 1], [0] * 3, [True, True, False])
    metrics = metrics_of(([facts], [blocks], []))

    def counts(key: str) -> tuple[tuple[float, ...], dict[int, float]]:
        histogram = metrics[key]
        assert isinstance(histogram, Histogram)
        return histogram.edges, {index: count for index, count in enumerate(histogram.counts) if count}

    edges, found = counts("gate/weight/histogram")
    one = next(i for i, edge in enumerate(WEIGHT_EDGES) if edge > 1) - 1
    two = next(i for i, edge in enumerate(WEIGHT_EDGES) if edge > 2) - 1
    assert edges == WEIGHT_EDGES and found == {0: 1, one: 2, two: 1}
    assert edges[one] < 0.9 and edges[one + 1] > 1.1  # one is in the middle of its bin
    assert metrics["gate/weight/zero_share"] == 0.25
    edges, found = counts("gate/value/histogram")
    assert edges == UNIT_EDGES and found == {0: 1, 39: 2}
    # Fresh ones are not in the histogram of drift; what is beyond the edges is in the last bin.
    edges, found = counts("gate/drift_abs/histogram")
    assert edges == DRIFT_EDGES and sum(found.values()) == 2 and found[len(edges) - 2] == 1


def test_support_metrics_and_alarm() -> None:
    facts = probes([0.05, 0.0, 0.95], [0.9, 0.7, 0.2], [0.5, 0.25, 0.0], [1.0, 2.0, 3.0])
    metrics = metrics_of(([], [], [facts]), min_support_mass=0.61)
    assert metrics == pytest.approx(
        {
            "support/student_mass/mean": 0.6,
            "support/student_mass/min": 0.2,
            "support/student_mass/p05": np.quantile([0.9, 0.7, 0.2], 0.05),
            "support/student_mass/position_0": 0.8,
            "support/student_mass/position_9": 0.2,
            "support/overlap_ratio/mean": 0.25,
            "support/entropy/mean": 2.0,
            "support/probes": 3.0,
            "support/alarm": 1.0,
        }
    )
    assert metrics_of(([], [], [facts]), min_support_mass=0.59)["support/alarm"] == 0.0


def test_correlation_is_that_of_segment_means_weighted_by_tokens() -> None:
    (facts,), (blocks,), _ = step = random_step(3, 200)
    size = len(blocks.gate)
    counts = np.bincount(facts.segment, minlength=size)
    chosen = blocks.measured & (counts > 0)
    kl = np.array([facts.kl[facts.segment == s].mean() if counts[s] else 0.0 for s in range(size)])
    cov = np.cov(blocks.gate[chosen], kl[chosen], aweights=counts[chosen])
    expected = cov[0, 1] / math.sqrt(cov[0, 0] * cov[1, 1])
    assert metrics_of(step)["gate/kl_correlation/pearson"] == pytest.approx(expected, abs=1e-12)
    assert abs(expected) > 1e-3


def test_correlation_of_gates_that_are_all_near_one_is_not_lost_to_rounding() -> None:
    kl = np.arange(8, dtype=np.float64)
    found = Moments.of((1 - 1e-9 * kl).astype(np.float64), kl, np.ones(8)).correlation()
    assert found == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("gate", "kl", "measured"),
    [
        ([0.7] * 4, [1.0, 2.0, 3.0, 4.0], [True] * 4),
        ([0.1, 0.2, 0.3, 0.4], [0.1] * 4, [True] * 4),
        ([0.1, 0.2, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], [True, True, False, False]),
    ],
    ids=["gates are equal", "KL is equal", "two measured segments"],
)
def test_correlation_is_left_out_where_undefined(gate: list[float], kl: list[float], measured: list[bool]) -> None:
    facts = tokens([0.0] * 4, gate, kl, [0] * 4, [0, 1, 2, 3])
    blocks = segments([0.5] * 4, gate, [1] * 4, [0] * 4, measured)
    assert "gate/kl_correlation/pearson" not in metrics_of(([facts], [blocks], []))


def test_nothing_gives_nothing() -> None:
    assert metrics_of(([], [], [])) == {}
    assert StepDiagnostics.join([]).metrics(min_support_mass=0.5) == {}
    nothing = tokens([], [], [], [], [])
    assert metrics_of(([nothing], [segments([], [], [], [], [])], [probes([], [], [], [])])) == {}


def test_without_a_gate_there_are_no_gate_metrics() -> None:
    facts = tokens([0.0, 0.5], [1.0, 1.0], [0.25, 0.75], [0, 1], [-1, -1])
    assert metrics_of(([facts], [], [])) == {"learner/kl/position_0": 0.25, "learner/kl/position_5": 0.75}


def test_weights_without_segments_have_weight_metrics_only() -> None:
    facts = tokens([0.0, 0.5], [1.0, 0.0], [0.25, 0.75], [0, 1], [-1, -1])
    metrics = metrics_of(([facts], [], []))
    assert metrics["gate/weight_share/staleness_1"] == 0.0 and metrics["gate/effective_sample_share"] == 0.5
    assert not [key for key in metrics if key.startswith(("gate/value", "gate/drift_abs"))]


def test_fresh_segments_only_have_open_gates_and_no_drift_histogram() -> None:
    facts = tokens([0.0, 0.5], [1.0, 1.0], [0.25, 0.75], [0, 0], [0, 1])
    metrics = metrics_of(([facts], [segments([0.0, 0.0], [1.0, 1.0], [1, 1], [0, 0], [False, False])], []))
    assert metrics["gate/measured_share"] == 0.0 and metrics["gate/value/p05"] == 1.0
    assert metrics["gate/drift_abs/p95"] == 0.0 and metrics["gate/drift_abs/max"] == 0.0
    assert "gate/drift_abs/histogram" not in metrics and "gate/drift_abs/measured_p50" not in metrics


def test_weights_that_are_all_zero_leave_the_shares_of_weight_out() -> None:
    facts = tokens([0.0, 0.5], [0.0, 0.0], [0.25, 0.75], [0, 1], [0, 1])
    metrics = metrics_of(([facts], [segments([800.0] * 2, [0.0] * 2, [1, 1], [0, 1], [True, True])], []))
    assert metrics["gate/weight/zero_share"] == 1.0 and metrics["gate/token_share/position_5"] == 0.5
    assert not [key for key in metrics if "weight_share" in key or "effective" in key]


def test_what_overflowed_is_left_out_and_the_rest_stays_finite() -> None:
    facts = tokens([0.0, 0.5], [1.0, 0.0], [0.25, 0.75], [0, 1], [0, 1])
    metrics = metrics_of(([facts], [segments([0.5, math.inf], [0.5, 0.0], [1, 1], [0, 1], [True, True])], []))
    assert "gate/drift_abs/max" not in metrics and metrics["gate/drift_abs/staleness_0"] == 0.5
    assert all(math.isfinite(value) for value in metrics.values() if not isinstance(value, Histogram))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="weight_scale is"):
        StepDiagnostics.of([], [], [], weight_scale=scale)


@pytest.mark.parametrize("known", [[], [segments([0.1], [0.9], [1], [0], [True])]])
def test_a_token_of_an_unknown_segment_is_refused(known: list[SegmentFacts]) -> None:
    with pytest.raises(ValueError, match=f"in segment 1 of {len(known)}"):
        StepDiagnostics.of([tokens([0.0], [1.0], [0.0], [0], [1])], known, [], weight_scale=1.0)


def test_its_size_does_not_grow_with_the_tokens() -> None:
    sizes = [
        len(pickle.dumps(StepDiagnostics.of(*random_step(0, count, num_probes=count), weight_scale=1.0)))
        for count in (100, 100_000)
    ]
    assert max(sizes) < 70_000 and abs(sizes[1] - sizes[0]) < 2_000


def part_of(step: Step, owner: IntArray, part: int) -> Step:
    """The segments that `owner` [S] gives to `part`, their tokens, and every probe of the same number."""
    (facts,), (blocks,), (looks,) = step
    mine = owner == part
    number = np.cumsum(mine) - 1
    kept = mine[facts.segment]
    seen = owner[np.arange(len(looks.position)) % len(owner)] == part
    segment = number[facts.segment[kept]]
    named = {name: getattr(facts, name)[kept] for name in ("position", "weight", "kl", "staleness")}
    segment_values = (getattr(blocks, name)[mine] for name in ("drift", "gate", "num_tokens", "staleness", "measured"))
    probe_values = (getattr(looks, name)[seen] for name in ("position", "support_mass", "overlap", "entropy"))
    return [TokenStats(**named, segment=segment)], [SegmentFacts(*segment_values)], [ProbeFacts(*probe_values)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 200),
    num_ranks=st.integers(1, 4),
    num_facts=st.integers(1, 4),
    scale=st.floats(0.1, 10),
)
def test_metrics_do_not_depend_on_how_the_work_was_split(
    seed: int, count: int, num_ranks: int, num_facts: int, scale: float
) -> None:
    step = random_step(seed, count)
    owner = np.random.default_rng(seed).integers(0, num_ranks * num_facts, len(step[1][0].gate))
    reports = []
    for rank in range(num_ranks):
        parts = [part_of(step, owner, rank * num_facts + i) for i in range(num_facts)]
        facts: Step = ([p[0][0] for p in parts], [p[1][0] for p in parts], [p[2][0] for p in parts])
        reports.append(pickle.loads(pickle.dumps(StepDiagnostics.of(*facts, weight_scale=scale))))
    split = StepDiagnostics.join(reports).metrics(min_support_mass=0.5)
    whole = metrics_of(step, scale)
    assert split.keys() == whole.keys()
    for key, value in whole.items():
        if isinstance(value, Histogram):
            assert split[key] == value
        else:
            assert split[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 200))
def test_metrics_can_be_logged_and_shares_add_up(seed: int, count: int) -> None:
    metrics = metrics_of(random_step(seed, count))
    numbers = {key: value for key, value in checked_metrics(metrics).items() if not isinstance(value, Histogram)}
    assert all(math.isfinite(value) for value in numbers.values())
    for share in ("weight_share", "token_share"):
        for groups in ("position", "staleness"):
            assert sum(v for k, v in numbers.items() if k.startswith(f"gate/{share}/{groups}_")) == pytest.approx(1.0)
    assert 0 < numbers["gate/effective_sample_share"] <= 1
    assert numbers["gate/value/min"] <= numbers["gate/value/p05"] <= numbers["gate/value/max"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 300),
    share=st.floats(0, 1),
    grid=st.sampled_from([Grid.drift, Grid.unit]),
)
def test_quantiles_are_within_a_bin_of_the_exact_ones(seed: int, count: int, share: float, grid: Grid) -> None:
    rng = np.random.default_rng(seed)
    values = 10 ** rng.uniform(-5, 0.9, count) if grid is Grid.drift else 1 / (1 + np.exp(-rng.normal(3, 4, count)))
    found = Distribution.empty(grid)
    found.add(values)
    exact = float(np.quantile(values, share))
    # The two order statistics around the quantile may each be off by their own bin's width.
    high = float(np.quantile(values, share, method="higher"))
    low = float(np.quantile(values, share, method="lower"))
    width = 0.024 * high if grid is Grid.drift else 0.0205 * max(x * (1 - x) for x in (low, high)) + 1e-6
    assert abs(found.quantile(share) - exact) <= width


def test_quantiles_of_few_distinct_values_are_exact() -> None:
    values = np.repeat([0.25, 0.5, 0.875, 1.0], [3, 1, 5, 2])
    found = Distribution.empty(Grid.unit)
    found.add(values)
    for share in np.linspace(0, 1, 23):
        assert found.quantile(float(share)) == pytest.approx(float(np.quantile(values, share)), abs=1e-15)
    assert found.num_below(0.5) == 3 and (found.minimum, found.maximum, found.mean) == (0.25, 1.0, values.mean())


@pytest.mark.parametrize("grid", list(Grid))
def test_coarse_edges_are_among_the_fine_ones_and_all_rise(grid: Grid) -> None:
    assert np.isin(grid.histogram_edges, grid.edges).all()
    assert (np.diff(grid.edges) > 0).all() and (np.diff(grid.histogram_edges) > 0).all()
    assert (grid.histogram_edges[0], grid.histogram_edges[-1]) == (grid.edges[0], grid.edges[-1])
