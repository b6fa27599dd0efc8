"""SciPy's relative entropies in float64, its geometric mean, and its bootstrap."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opd_ray.evaluation import paired_bootstrap, pass_at_k
from opd_ray.objective import forward_kl_topk, geometric_sequence_mask, jsd_topk, lsm_loss, tail_kl
from tests.oracles.agreement import agree
from tests.oracles.cases import VOCABULARY, draw_pair, draw_rollout
from tests.oracles.packages import oracle

special = oracle("scipy.special")
stats = oracle("scipy.stats")
distance = oracle("scipy.spatial.distance")

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
FLOAT64: dict[str, Any] = {"dtype": torch.float64}


def on_support(size: int, seed: int, scale: float) -> tuple[Array, Array, dict[str, torch.Tensor]]:
    """Probabilities p, q `[N,K]` of the whole vocabulary at the teacher's top-K, and our arguments."""
    pair = draw_pair(seed, torch.float64, scale)
    ids, teacher = pair.teacher_support(size)
    log_p = special.log_softmax(pair.student.numpy(), axis=-1)
    log_q = special.log_softmax(pair.teacher.numpy(), axis=-1)
    p = np.exp(np.take_along_axis(log_p, ids.numpy(), -1))
    q = np.exp(np.take_along_axis(log_q, ids.numpy(), -1))
    student = pair.student.log_softmax(-1).gather(-1, ids)
    return p, q, {"student": student, "teacher": teacher}


def scaled(p: Array) -> Array:
    mass: Array = p.sum(-1, keepdims=True)
    return p / mass


def with_tail(p: Array) -> Array:
    return np.concatenate([p, 1 - p.sum(-1, keepdims=True)], axis=-1)


def kl(a: Array, b: Array) -> torch.Tensor:
    return torch.from_numpy(special.rel_entr(a, b).sum(-1))


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("size", [2, 8, VOCABULARY])
def test_divergences_on_the_support(size: int, scale: float) -> None:
    p, q, ours = on_support(size, 11, scale)
    student, teacher = ours["student"], ours["teacher"]
    raw = forward_kl_topk(student, teacher, renormalize=False)
    renormalised = forward_kl_topk(student, teacher, renormalize=True)
    agree("scipy.special.rel_entr", raw, kl(q, p), name="forward_kl_topk raw", **FLOAT64)
    agree(
        "scipy.special.rel_entr",
        renormalised,
        kl(scaled(q), scaled(p)),
        name="forward_kl_topk renormalised",
        **FLOAT64,
    )
    agree("scipy.special.rel_entr", lsm_loss(student, teacher), kl(scaled(p), scaled(q)), name="lsm_loss", **FLOAT64)
    half = torch.from_numpy(distance.jensenshannon(scaled(p), scaled(q), axis=-1) ** 2)
    agree(
        "scipy.spatial.distance.jensenshannon squared",
        jsd_topk(student, teacher, beta=0.5),
        half,
        name="jsd_topk beta=0.5",
        **FLOAT64,
    )


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.9])
def test_jsd_of_any_weight(beta: float) -> None:
    p, q, ours = on_support(8, 12, 2.0)
    p, q = scaled(p), scaled(q)
    mixture = beta * q + (1 - beta) * p
    want = beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    got = jsd_topk(ours["student"], ours["teacher"], beta=beta)
    agree("scipy.special.rel_entr", got, want, name="jsd_topk other beta", **FLOAT64)


@pytest.mark.parametrize("size", [1, 8, 40])
def test_tail_in_both_directions(size: int) -> None:
    p, q, ours = on_support(size, 13, 1.0)
    p, q = with_tail(p), with_tail(q)
    forward = tail_kl(ours["student"], ours["teacher"], direction="forward")
    reverse = tail_kl(ours["student"], ours["teacher"], direction="reverse")
    agree("scipy.special.rel_entr", forward, kl(q, p), name="tail_kl forward", **FLOAT64)
    agree("scipy.special.rel_entr", reverse, kl(p, q), name="tail_kl reverse", **FLOAT64)


@pytest.mark.parametrize("seed", range(5))
def test_sequences_are_kept_by_their_geometric_mean_ratio(seed: int) -> None:
    rollout = draw_rollout(seed, torch.float64)
    ratio = (rollout.current - rollout.behavior).exp().numpy()
    mean = np.array([stats.gmean(row[kept]) for row, kept in zip(ratio, rollout.mask.numpy(), strict=True)])
    got = geometric_sequence_mask(rollout.current, rollout.behavior, rollout.mask, low=0.95, high=1.05)
    assert got.tolist() == ((mean >= 0.95) & (mean <= 1.05)).tolist()


def counts(seed: int, problems: int) -> tuple[Counts, Counts, Counts]:
    rng = np.random.default_rng(seed)
    n = rng.integers(4, 9, problems)
    return n, rng.binomial(n, 0.6), rng.binomial(n, 0.5)


def scipy_interval(a: Array, b: Array, seed: int, alpha: float) -> tuple[float, float]:
    found = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        confidence_level=1 - alpha,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("problems", [5, 200])
def test_the_bootstrap_interval_is_scipys_for_the_same_random_numbers(k: int, alpha: float, problems: int) -> None:
    n, a, b = counts(3, problems)
    pass_a, pass_b = pass_at_k(n, a, k), pass_at_k(n, b, k)
    got, interval = paired_bootstrap(n, a, b, k, num_resamples=4000, alpha=alpha, seed=17)
    assert got == pytest.approx(np.mean(pass_a) - np.mean(pass_b), abs=1e-14)
    want = scipy_interval(pass_a, pass_b, 17, alpha)
    agree(
        "scipy.stats.bootstrap percentile, paired",
        torch.tensor(interval, dtype=torch.float64),
        torch.tensor(want, dtype=torch.float64),
        name="paired_bootstrap",
        **FLOAT64,
    )


def test_with_other_random_numbers_the_interval_is_close_and_not_the_same() -> None:
    n, a, b = counts(4, 200)
    pass_a, pass_b = pass_at_k(n, a, 2), pass_at_k(n, b, 2)
    _, interval = paired_bootstrap(n, a, b, 2, num_resamples=4000, alpha=0.05, seed=1)
    want = scipy_interval(pass_a, pass_b, 2, 0.05)
    width = want[1] - want[0]
    assert interval != want
    assert interval == pytest.approx(want, abs=0.05 * width)
