import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import sampled_token_loss

NAN, INF = float("nan"), float("inf")
PAPER: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}


def tensors(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


def value_and_slope(current: Tensor, behavior: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    current = current.clone().requires_grad_()
    loss = sampled_token_loss(current, behavior, teacher, **options)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert current.grad is not None
    return loss.detach(), current.grad


@pytest.mark.parametrize(
    ("gain", "ratio", "loss", "slope"),
    [
        # max(-A r, -A clip(r, 0.8, 1.2)); the slope is that of log p: -A r where r counts, else 0.
        (0.5, 1.0, -0.5, -0.5),
        (0.5, 1.1, -0.55, -0.55),
        (0.5, 1.5, -0.6, 0.0),  # clipped above: -0.5 * 1.2
        (0.5, 0.5, -0.25, -0.25),  # below, a gain is not clipped
        (-0.5, 1.0, 0.5, 0.5),
        (-0.5, 1.5, 0.75, 0.75),  # above, a loss is not clipped
        (-0.5, 0.5, 0.4, 0.0),  # clipped below: 0.5 * 0.8
        (-0.5, 4.0, 1.5, 0.0),  # dual clip: 3 * 0.5
        (0.0, 2.0, 0.0, 0.0),
    ],
)
def test_frozen_by_hand(gain: float, ratio: float, loss: float, slope: float) -> None:
    behavior = -2.0
    arguments = tensors(behavior + math.log(ratio), behavior, behavior + gain)
    got, grad = value_and_slope(*arguments, advantage="frozen", **PAPER)
    assert got.item() == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-15)


def test_defaults_are_the_papers() -> None:
    arguments = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sampled_token_loss(*arguments, advantage="frozen").equal(
        sampled_token_loss(*arguments, advantage="frozen", **PAPER)
    )


def test_without_dual_clip_a_loss_grows_with_the_ratio() -> None:
    arguments = tensors(-2.0 + math.log(4.0), -2.0, -2.5)
    got, grad = value_and_slope(*arguments, advantage="frozen", clip_low=0.2, clip_high=0.2, dual_clip=None)
    assert got.item() == pytest.approx(2.0) and grad.item() == pytest.approx(2.0)


def test_recompute_by_hand() -> None:
    # ratio = exp(-1.5 + 2) and A = -1 + 1.5 = 0.5, not clipped; the slope is -A ratio because A is detached.
    got, grad = value_and_slope(*tensors(-1.5, -2.0, -1.0), advantage="recompute", **PAPER)
    assert got.item() == pytest.approx(-0.5 * math.exp(0.5), rel=1e-12)
    assert grad.item() == pytest.approx(-0.5 * math.exp(0.5), rel=1e-12)


def test_recompute_has_the_gradient_of_the_reverse_kl_and_frozen_has_not() -> None:
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.1, 0.4, 0.2, -0.5], dtype=torch.float64).log_softmax(0)
    teacher = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64).log_softmax(0)
    current = logits.log_softmax(0)
    wanted = torch.autograd.grad((current.exp() * (current - teacher)).sum(), logits, retain_graph=True)[0]
    wide: dict[str, Any] = {"clip_low": 1.0, "clip_high": 1e9, "dual_clip": None}

    def expected_gradient(advantage: Any) -> Tensor:
        loss = (old.exp() * sampled_token_loss(current, old, teacher, advantage=advantage, **wide)).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient("recompute"), wanted, rtol=1e-12, atol=1e-14)
    assert (expected_gradient("frozen") - wanted).abs().max().item() > 1e-2
    # The difference is the gradient of KL(current || old).
    bias = torch.autograd.grad((current.exp() * (current - old)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient_of(logits, old, teacher), wanted - bias, rtol=1e-12, atol=1e-14)


def expected_gradient_of(logits: Tensor, old: Tensor, teacher: Tensor) -> Tensor:
    """Expectation, by a plain loop, of the unclipped frozen surrogate's gradient."""
    total = torch.zeros_like(logits)
    for token in range(logits.shape[0]):
        current = logits.log_softmax(0)[token]
        slope = torch.autograd.grad(current, logits)[0]
        ratio = math.exp(current.item() - old[token].item())
        gain = teacher[token].item() - old[token].item()
        total += math.exp(old[token].item()) * -gain * ratio * slope
    return total


def slow_loss(c: float, b: float, q: float, advantage: str, low: float, high: float, dual: float | None) -> float:
    ratio = math.exp(c - b)
    if advantage == "recompute":
        return -ratio * (q - c)
    gain = q - b
    loss = max(-gain * ratio, -gain * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -gain * dual) if dual is not None and gain < 0 else loss


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-12, 0)] * 3), min_size=1, max_size=6),
    st.sampled_from(["frozen", "recompute"]),
    st.floats(0, 1),
    st.floats(0, 2),
    st.none() | st.floats(1.01, 5),
)
def test_equals_the_definition(
    rows: list[tuple[float, float, float]], advantage: Any, low: float, high: float, dual: float | None
) -> None:
    arguments = torch.tensor(rows, dtype=torch.float64).T
    got = sampled_token_loss(*arguments, advantage=advantage, clip_low=low, clip_high=high, dual_clip=dual)
    wanted = [slow_loss(c, b, q, advantage, low, high, dual) for c, b, q in rows]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_gradient_against_central_differences() -> None:
    generator = torch.Generator().manual_seed(4)
    behavior = -3 * torch.rand(60, generator=generator, dtype=torch.float64)
    current = behavior + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64)
    teacher = behavior + torch.randn(60, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: sampled_token_loss(x, behavior, teacher, advantage="frozen", **PAPER),
        (current.requires_grad_(),),
    )


def test_only_the_current_logprobs_carry_gradient() -> None:
    advantages: tuple[Any, ...] = ("frozen", "recompute")
    for advantage in advantages:
        leaves = [torch.randn(4, requires_grad=True) for _ in range(3)]
        sampled_token_loss(*leaves, advantage=advantage, **PAPER).sum().backward()  # type: ignore[no-untyped-call]
        assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None


@pytest.mark.parametrize("advantage", ["frozen", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_models_give_zero_and_dtypes_hold(advantage: Any, dtype: torch.dtype) -> None:
    logprobs = -3 * torch.rand(50, generator=torch.Generator().manual_seed(2))
    same = logprobs.to(dtype)
    got, grad = value_and_slope(same, same, same, advantage=advantage, **PAPER)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.abs().max().item() == 0 and grad.abs().max().item() == 0


@pytest.mark.parametrize("advantage", ["frozen", "recompute"])
def test_a_changed_teacher_changes_the_gradient(advantage: Any) -> None:
    _, before = value_and_slope(*tensors(-1.0, -1.1, -2.0), advantage=advantage, **PAPER)
    _, after = value_and_slope(*tensors(-1.0, -1.1, -2.1), advantage=advantage, **PAPER)
    assert abs((before - after).item()) > 1e-2


@pytest.mark.parametrize("advantage", ["frozen", "recompute"])
@pytest.mark.parametrize("drift", [50.0, -50.0])
def test_drift_of_fifty_is_finite(advantage: Any, drift: float) -> None:
    for gain in (1.0, -1.0):
        behavior = torch.tensor([-60.0])
        got, grad = value_and_slope(behavior + drift, behavior, behavior + gain, advantage=advantage, **PAPER)
        assert got.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("advantage", ["frozen", "recompute"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_a_broken_token_shows_and_does_not_spread(advantage: Any, bad: float, side: int) -> None:
    leaves = [
        torch.tensor([-1.0, -1.2, -0.7]),
        torch.tensor([-1.1, -1.2, -0.9]),
        torch.tensor([-2.0, -0.2, -0.5]),
    ]
    wanted, slope = value_and_slope(*leaves, advantage=advantage, **PAPER)
    leaves[side][1] = bad
    current = leaves[0].requires_grad_()
    loss = sampled_token_loss(current, leaves[1], leaves[2], advantage=advantage, **PAPER)
    assert loss[1].isnan() and loss[[0, 2]].equal(wanted[[0, 2]])
    torch.where(torch.tensor([True, False, True]), loss, 0.0).sum().backward()  # type: ignore[no-untyped-call]
    assert current.grad is not None
    assert current.grad[1].item() == 0.0 and current.grad[[0, 2]].equal(slope[[0, 2]])


def test_an_overflowing_ratio_is_infinite_and_masked_without_a_trace() -> None:
    behavior, teacher = torch.tensor([-1e4, -1.0]), torch.tensor([-2e4, -0.5])
    current = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = sampled_token_loss(current, behavior, teacher, advantage="frozen", dual_clip=None)
    assert loss[0].item() == INF
    torch.where(torch.tensor([False, True]), loss, 0.0).sum().backward()  # type: ignore[no-untyped-call]
    assert current.grad is not None and current.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "old"},
        {"clip_low": -0.1},
        {"clip_low": 1.1},
        {"clip_high": -0.1},
        {"clip_high": NAN},
        {"dual_clip": 1.0},
        {"dual_clip": NAN},
    ],
)
def test_a_callers_fault_is_one_clear_line(options: dict[str, Any]) -> None:
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match="; use"):
        sampled_token_loss(zeros, zeros, zeros, **({"advantage": "frozen"} | options))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        sampled_token_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), advantage="frozen")
