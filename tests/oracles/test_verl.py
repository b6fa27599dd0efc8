"""verl's losses, estimators and rollout corrections.

Its clamps (log-ratios at 20, k3 at 10) and its 1e-8 in the divisor of a masked mean are not part of ours; the
inputs keep away from them, or the test says so.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ray.objective import (
    drift_gate,
    effective_sample_size,
    forward_kl_topk,
    gated_token_mean,
    geometric_sequence_mask,
    icepop_weights,
    k1,
    k2,
    k3,
    overlap_ratio,
    sampled_token_loss,
    support_mass,
    token_logprobs,
    truncated_is_weights,
)
from tests.oracles.agreement import agree, agree_with_gradient
from tests.oracles.cases import draw_pair, draw_rollout
from tests.oracles.packages import oracle

core = oracle("verl.trainer.ppo.core_algos")
corrections = oracle("verl.trainer.ppo.rollout_corr_helper")
distillation = oracle("verl.trainer.distillation.fsdp.losses")

KL_PENALTY = "verl core_algos.kl_penalty"
TOPK = "verl distillation.fsdp.losses.compute_forward_kl_topk"
POLICY = "verl core_algos.compute_policy_loss"
AGG = "verl core_algos.agg_loss"
WEIGHTS = "verl rollout_corr.compute_rollout_correction_weights"
METRICS = "verl rollout_corr.compute_offpolicy_metrics"

precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@precisions
@pytest.mark.parametrize("ours", [k1, k2, k3])
def test_estimators(dtype: torch.dtype, ours: Any) -> None:
    rollout = draw_rollout(1, dtype)
    # As far as log p - log q = -2.4, where verl's k3 reaches its clamp at 10.
    agree_with_gradient(
        KL_PENALTY,
        ours,
        lambda current, teacher: core.kl_penalty(current, teacher, ours.__name__),
        (rollout.current, rollout.current - (rollout.teacher - rollout.current).clamp(-2.3, 2.3)),
        name=ours.__name__,
    )


def test_k3_goes_on_where_verl_clamps_it() -> None:
    current, teacher = torch.tensor([-6.0]), torch.tensor([-2.0])
    assert core.kl_penalty(current, teacher, "k3").item() == 10.0
    assert k3(current, teacher).item() == pytest.approx(math.exp(4) - 1 - 4, rel=1e-6)


def verl_topk(student: Tensor, ids: Tensor, teacher: Tensor, chunked: bool) -> dict[str, Tensor]:
    """verl's outputs `[N]`: it takes the teacher's lists as nested tensors, here two responses of unlike length."""

    def nested(rows: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor([rows[:7], rows[7:]], layout=torch.jagged)

    loss = SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=chunked, chunked_topk_chunk_size=5)
    config = SimpleNamespace(distillation_loss=loss)
    found: dict[str, Tensor] = distillation.compute_forward_kl_topk(
        student.unsqueeze(0), nested(teacher), nested(ids), config, "thd"
    )
    return {name: values.squeeze(0) for name, values in found.items()}


@precisions
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [1, 8, 97])
def test_raw_forward_kl_on_the_teachers_support(dtype: torch.dtype, chunked: bool, size: int) -> None:
    pair = draw_pair(2, dtype)
    ids, teacher = pair.teacher_support(size)
    agree_with_gradient(
        TOPK,
        lambda student: forward_kl_topk(student.log_softmax(-1).gather(-1, ids), teacher, renormalize=False),
        lambda student: verl_topk(student, ids, teacher, chunked)["distillation_losses"],
        (pair.student,),
        name="forward_kl_topk raw",
        # It computes in float32 whatever it is given; in chunks it subtracts a log-sum-exp of 9 from logits of 9,
        # in which float64 shows it to be the less exact of the two.
        dtype=torch.float32,
        tolerance=4e-6 if chunked else None,
    )


@precisions
def test_how_well_the_support_covers_the_student(dtype: torch.dtype) -> None:
    pair = draw_pair(3, dtype)
    ids, teacher = pair.teacher_support(8)
    theirs = verl_topk(pair.student, ids, teacher, False)
    mass = support_mass(pair.student.log_softmax(-1).gather(-1, ids), teacher)
    agree(TOPK, mass, theirs["student_mass"], name="support_mass", dtype=dtype)
    overlap = overlap_ratio(pair.student.topk(8, dim=-1).indices, ids)
    assert (8 * overlap).tolist() == theirs["overlap_count"].tolist()
    assert 0 < overlap.min() < overlap.max()


def test_log_probs_of_the_tiled_head() -> None:
    hidden = torch.randn(11, 16, generator=torch.Generator().manual_seed(4))
    head = torch.randn(300, 16, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(11) * 27
    agree_with_gradient(
        "verl distillation.fsdp.losses._chunked_topk_log_probs",
        lambda hidden, head: token_logprobs(hidden, head, ids, chunk_size=4),
        lambda hidden, head: distillation._chunked_topk_log_probs(
            (hidden @ head.T).unsqueeze(0), ids.view(1, -1, 1), chunk_size=3
        ).view(-1),
        (hidden, head),
        name="token_logprobs",
    )


@pytest.mark.filterwarnings("ignore:.*compute_policy_loss' is deprecated:FutureWarning")
@precisions
@pytest.mark.parametrize("clips", [(0.2, 0.2, 3.0), (0.1, 0.28, 1.5), (0.2, 0.2, None)])
def test_frozen_advantage_with_clip_and_dual_clip(dtype: torch.dtype, clips: tuple[float, float, float | None]) -> None:
    rollout = draw_rollout(6, dtype, drift=1.0)
    low, high, dual = clips
    ratio = (rollout.current - rollout.behavior).exp()
    gain = rollout.teacher - rollout.behavior
    # Every branch is met: both clips, and the dual clip where the advantage is negative.
    assert ((ratio < 1 - low) & (gain < 0)).any() and ((ratio > 1 + high) & (gain > 0)).any()
    assert dual is None or ((ratio > dual) & (gain < 0)).any()

    def ours(current: Tensor) -> Tensor:
        return sampled_token_loss(
            current, rollout.behavior, rollout.teacher,
            advantage="frozen", clip_low=low, clip_high=high, dual_clip=dual,
        )  # fmt: skip

    def theirs(current: Tensor, mask: Tensor) -> Tensor:
        loss: Tensor = core.compute_policy_loss(
            rollout.behavior, current, gain, mask,
            cliprange_low=low, cliprange_high=high, clip_ratio_c=math.inf if dual is None else dual,
        )[0]  # fmt: skip
        return loss

    def token_by_token(current: Tensor) -> Tensor:
        alone = torch.eye(current.numel(), dtype=torch.bool).view(-1, *current.shape)
        return torch.stack([theirs(current, mask) for mask in alone]).view_as(current)

    name = f"sampled_token_loss {clips}"
    agree_with_gradient(POLICY, ours, token_by_token, (rollout.current,), name=name)
    agree_with_gradient(
        POLICY,
        lambda current: gated_token_mean(ours(current), torch.ones_like(current), rollout.mask),
        lambda current: theirs(current, rollout.mask),
        (rollout.current,),
        name=name + " mean",
    )


@precisions
def test_token_mean(dtype: torch.dtype) -> None:
    rollout = draw_rollout(7, dtype)
    loss = torch.where(rollout.mask, rollout.current, math.nan)
    ones = torch.ones_like(loss)
    agree_with_gradient(
        AGG,
        lambda loss: gated_token_mean(loss, ones, rollout.mask),
        lambda loss: core.agg_loss(loss, rollout.mask, "token-mean"),
        (loss,),
        name="gated_token_mean",
    )
    agree_with_gradient(
        AGG,
        lambda loss: gated_token_mean(loss, ones, rollout.mask, num_loss_tokens=1000),
        lambda loss: core.agg_loss(loss, rollout.mask, "token-mean", batch_num_tokens=1000),
        (loss,),
        name="gated_token_mean of a shard",
    )


def verl_weights(log_ratio: Tensor, mask: Tensor, threshold: float | str) -> tuple[Tensor, dict[str, float]]:
    weights, metrics = corrections.compute_rollout_correction_weights(
        log_ratio, mask, rollout_is="token", rollout_is_threshold=threshold
    )
    return weights, metrics


@precisions
@pytest.mark.parametrize("cap", [0.9, 2.0, 5.0])
def test_truncated_importance_weights(dtype: torch.dtype, cap: float) -> None:
    rollout = draw_rollout(8, dtype, drift=1.0)
    theirs, metrics = verl_weights(rollout.current - rollout.behavior, rollout.mask, cap)
    ours = truncated_is_weights(rollout.current.requires_grad_(), rollout.behavior, cap=cap)
    assert not ours.requires_grad and not theirs.requires_grad
    assert (theirs == cap).any() and ((theirs > 0) & (theirs < cap)).any()
    agree(WEIGHTS, ours * rollout.mask, theirs, name="truncated_is_weights", dtype=dtype)
    share = effective_sample_size(ours, rollout.mask) / rollout.mask.sum()
    # Its mean has 1e-8 added.
    assert share.item() == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-6)


@precisions
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.9, 1.1), (0.7, 5.0)])
def test_icepop_bounds_the_ratio_of_current_to_behaviour(dtype: torch.dtype, low: float, high: float) -> None:
    # verl's IcePop weights bound rho as ours do; it is its rejection masks that bound 1 / rho (see below).
    rollout = draw_rollout(9, dtype, drift=0.7)
    theirs, _ = verl_weights(rollout.current - rollout.behavior, rollout.mask, f"{low}_{high}")
    ours = icepop_weights(rollout.current.requires_grad_(), rollout.behavior, low=low, high=high)
    assert not ours.requires_grad and not theirs.requires_grad
    kept = theirs[rollout.mask] > 0
    assert kept.any() and not kept.all()
    agree(WEIGHTS, ours * rollout.mask, theirs, name="icepop_weights", dtype=dtype)


@precisions
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.5, 1.0), (1.0, 1.0)])
def test_both_bounds_are_inclusive(dtype: torch.dtype, low: float, high: float) -> None:
    logprobs = torch.full((1, 3), -1.5, dtype=dtype)
    mask = torch.ones(1, 3, dtype=torch.bool)
    theirs, _ = verl_weights(logprobs - logprobs, mask, f"{low}_{high}")
    assert icepop_weights(logprobs, logprobs, low=low, high=high).tolist() == theirs.tolist() == [[1.0] * 3]
    kept, _ = corrections.compute_rollout_rejection_mask(logprobs - logprobs, mask, "seq_mean_k1", f"{low}_{high}")
    assert kept.all()
    assert geometric_sequence_mask(logprobs, logprobs, mask, low=low, high=high).tolist() == [True]


@precisions
@pytest.mark.parametrize("seed", range(6))
def test_geometric_rejection_bounds_the_inverse_ratio(dtype: torch.dtype, seed: int) -> None:
    rollout = draw_rollout(seed, dtype)
    low, high = 0.95, 1.1
    kept, _ = corrections.compute_rollout_rejection_mask(
        rollout.current - rollout.behavior, rollout.mask, "seq_mean_k1", f"{low}_{high}"
    )
    # k1 = log behaviour - log current there: low <= 1 / rho <= high.
    ours = geometric_sequence_mask(rollout.current, rollout.behavior, rollout.mask, low=1 / high, high=1 / low)
    assert ours.tolist() == kept.any(dim=1).tolist()
    assert (kept == rollout.mask & ours.unsqueeze(1)).all()


def test_geometric_rejection_keeps_some_and_not_all() -> None:
    rollouts = [draw_rollout(seed, torch.float64) for seed in range(6)]
    ours = [geometric_sequence_mask(r.current, r.behavior, r.mask, low=1 / 1.1, high=1 / 0.95) for r in rollouts]
    assert 5 <= int(torch.stack(ours).sum()) <= 25


@precisions
def test_the_gates_statistics_of_one_segment(dtype: torch.dtype) -> None:
    rollout = draw_rollout(10, dtype)
    segments = torch.zeros_like(rollout.mask, dtype=torch.int64)[:1]
    row = {
        "current_logprobs": rollout.current[:1],
        "behavior_logprobs": rollout.behavior[:1],
        "response_mask": rollout.mask[:1],
    }
    theirs = corrections.compute_offpolicy_metrics(*row.values())
    # Its kl is of the behaviour to the current policy; the gate's drift has the other sign.
    for statistic, want in {"signed_mean": -theirs["kl"], "k3": theirs["k3_kl"]}.items():
        gate = drift_gate(**row, segment_ids=segments, tau=1.0, statistic=statistic, normalize="none")  # type: ignore[arg-type]
        # 1e-8 is added to its count of 13 tokens.
        assert gate.segment_drift.item() == pytest.approx(want, rel=1e-6)
