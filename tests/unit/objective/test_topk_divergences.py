"""Forward KL, tail KL and JSD on a top-K support, against definitions written with Python floats."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import forward_kl_topk, gated_token_mean, jsd_topk, lsm_loss, tail_kl

NAN, INF = float("nan"), float("inf")
Loss = Callable[[Tensor, Tensor], Tensor]


def raw_forward(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl_topk(student, teacher, renormalize=False)


def renormalized_forward(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl_topk(student, teacher, renormalize=True)


def tail_forward(student: Tensor, teacher: Tensor) -> Tensor:
    return tail_kl(student, teacher, direction="forward")


def tail_reverse(student: Tensor, teacher: Tensor) -> Tensor:
    return tail_kl(student, teacher, direction="reverse")


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    return jsd_topk(student, teacher, beta=0.3)


LOSSES: dict[str, Loss] = {
    "raw forward": raw_forward,
    "renormalized forward": renormalized_forward,
    "tail forward": tail_forward,
    "tail reverse": tail_reverse,
    "jsd": jsd,
    "lsm": lsm_loss,
}
NEVER_NEGATIVE = sorted(set(LOSSES) - {"raw forward"})
RENORMALIZED = ("renormalized forward", "jsd", "lsm")
ON_LOGPROBS = ("raw forward", "tail forward", "tail reverse")


def draw(seed: int, rows: int, size: int, vocabulary: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Log-probs (float64) of student and teacher on the teacher's top `size` of a vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    both = scale * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    student, teacher = both.log_softmax(-1)
    values, ids = teacher.topk(size, dim=-1)
    return student.gather(-1, ids), values


def loss_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return value.detach(), student.grad


def kl(a: list[float], b: list[float]) -> float:
    return math.fsum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0)


def slow_loss(name: str, student: list[float], teacher: list[float]) -> float:
    """One position by the definition."""
    kept = [v for v in range(len(teacher)) if teacher[v] != -INF]
    p, q = [math.exp(student[v]) for v in kept], [math.exp(teacher[v]) for v in kept]
    if name == "raw forward":
        return kl(q, p)
    if name.startswith("tail"):
        # 1 - mass, with the support's log-mass at most -1e-7
        p.append(1 - min(math.fsum(p), math.exp(-1e-7)))
        q.append(1 - min(math.fsum(q), math.exp(-1e-7)))
        return kl(q, p) if name == "tail forward" else kl(p, q)
    if not kept:
        return 0.0
    p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
    if name == "renormalized forward":
        return kl(q, p)
    if name == "lsm":
        return kl(p, q)
    m = [0.3 * y + 0.7 * x for x, y in zip(p, q, strict=True)]
    return 0.3 * kl(q, m) + 0.7 * kl(p, m)


def test_forward_kl_by_hand() -> None:
    # q = (0.5, 0.25), p = (0.25, 0.5): raw 0.5 ln 2 - 0.25 ln 2 = 0.25 ln 2.
    # q' = (2/3, 1/3), p' = (1/3, 2/3): 2/3 ln 2 - 1/3 ln 2 = ln 2 / 3.
    student = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    teacher = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    value, slope = loss_and_gradient(raw_forward, student, teacher)
    assert value.item() == pytest.approx(0.25 * math.log(2), rel=1e-14)
    assert slope.tolist() == pytest.approx([-0.5, -0.25], rel=1e-14)
    value, slope = loss_and_gradient(renormalized_forward, student, teacher)
    assert value.item() == pytest.approx(math.log(2) / 3, rel=1e-14)
    assert slope.tolist() == pytest.approx([-1 / 3, 1 / 3], rel=1e-14)


def test_raw_forward_kl_may_be_negative_and_is_not_clamped() -> None:
    # q = 0.1, p = 0.8: 0.1 ln(1/8).
    student, teacher = torch.tensor([[0.8]]).log(), torch.tensor([[0.1]]).log()
    assert raw_forward(student, teacher).item() == pytest.approx(0.1 * math.log(0.125), rel=1e-6)


def test_tail_kl_by_hand() -> None:
    # p = (0.5, tail 0.5), q = (0.25, tail 0.75).
    student = torch.tensor([0.5], dtype=torch.float64).log()
    teacher = torch.tensor([0.25], dtype=torch.float64).log()
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert tail_forward(student, teacher).item() == pytest.approx(forward, rel=1e-13)
    assert tail_reverse(student, teacher).item() == pytest.approx(reverse, rel=1e-13)


def test_jsd_by_hand() -> None:
    # p' = (1, 0) nearly, q' = (1/2, 1/2), beta 1/2: m = (3/4, 1/4).
    student = torch.tensor([0.0, -INF], dtype=torch.float64)
    teacher = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    wanted = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    assert jsd_topk(student, teacher, beta=0.5).item() == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_equals_the_definition(name: str, dtype: torch.dtype, scale: float) -> None:
    student, teacher = (x.to(dtype) for x in draw(1, 60, 6, 15, scale))
    teacher[:5, 3:] = -INF
    teacher[5:8, 1:] = -INF
    got = LOSSES[name](student, teacher)
    assert got.dtype == dtype and got.shape == (60,)
    tolerance, floor = (1e-10, 1e-12) if dtype == torch.float64 else (1e-6, 1e-7)
    for row in range(60):
        wanted = slow_loss(name, student[row].tolist(), teacher[row].tolist())
        # A clamped tail leaves a total mass of 1 + 1e-7, which the plain sum and the never-negative one see
        # differently by up to that much.
        clamped = name.startswith("tail") and max(student[row].logsumexp(0), teacher[row].logsumexp(0)) > -1e-7
        assert got[row].item() == pytest.approx(wanted, rel=tolerance, abs=1.01e-7 if clamped else floor)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"lsm"}))
@pytest.mark.parametrize("apart", [1e-5, 1e-3, 1.0, 10.0])
def test_float32_keeps_six_digits_also_of_nearly_equal_distributions(name: str, apart: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(300, 40, generator=generator)
    student = logits.log_softmax(-1)[:, :12]
    teacher = (logits + apart * torch.randn(300, 40, generator=generator)).log_softmax(-1)[:, :12]
    exact = LOSSES[name](student.double(), teacher.double())
    torch.testing.assert_close(LOSSES[name](student, teacher).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_against_central_differences(name: str) -> None:
    student, teacher = draw(3, 6, 5, 9)
    teacher[1, 3:] = -INF
    teacher[2] = student[2] - 1e-3
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), (student.requires_grad_(),), atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 0.9, 1.0])
def test_gradient_of_the_jsd_against_central_differences(beta: float) -> None:
    student, teacher = draw(4, 4, 5, 9)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jsd_topk(x, teacher, beta=beta), (student,), atol=1e-8)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_changed_teacher_changes_the_gradient_of_its_position_only(name: str) -> None:
    student, teacher = draw(5, 3, 6, 20)
    _, before = loss_and_gradient(LOSSES[name], student, teacher)
    teacher[1, 2] -= 0.3
    _, after = loss_and_gradient(LOSSES[name], student, teacher)
    assert before[[0, 2]].equal(after[[0, 2]])
    assert (before[1] - after[1]).abs().max().item() > 1e-4


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_teacher_is_a_constant(name: str) -> None:
    student, teacher = draw(6, 3, 5, 8)
    teacher.requires_grad_()
    LOSSES[name](student.requires_grad_(), teacher).sum().backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_whole_vocabulary_gives_the_full_kl(name: str) -> None:
    student, teacher = draw(7, 9, 30, 30)
    p, q = student.exp(), teacher.exp()
    m = 0.3 * q + 0.7 * p
    forward, reverse = (q * (q / p).log()).sum(-1), (p * (p / q).log()).sum(-1)
    mixture = 0.3 * (q * (q / m).log()).sum(-1) + 0.7 * (p * (p / m).log()).sum(-1)
    wanted = {"jsd": mixture, "tail reverse": reverse, "lsm": reverse}.get(name, forward)
    torch.testing.assert_close(LOSSES[name](student, teacher), wanted, rtol=1e-11, atol=1e-13)


def test_the_ends_of_the_jsd_are_the_pure_divergences() -> None:
    student, teacher = draw(8, 20, 6, 12)
    for pair in ((student, teacher), (student.float(), teacher.float())):
        assert jsd_topk(*pair, beta=0.0).equal(renormalized_forward(*pair))
        assert jsd_topk(*pair, beta=1.0).equal(lsm_loss(*pair))


def test_the_jsd_weighs_the_teacher_by_beta() -> None:
    # To first order in beta -> 0 the mixture form is beta KL(q'||p'), and (1 - beta) KL(p'||q') at the other end.
    student, teacher = draw(9, 20, 6, 12)
    tiny = 1e-7
    forward, reverse = renormalized_forward(student, teacher), lsm_loss(student, teacher)
    torch.testing.assert_close(jsd_topk(student, teacher, beta=tiny) / tiny, forward, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(jsd_topk(student, teacher, beta=1 - tiny) / tiny, reverse, rtol=1e-4, atol=1e-7)


def test_the_symmetric_jsd_is_symmetric_and_bounded() -> None:
    student, teacher = draw(10, 50, 6, 6, scale=30.0)
    value = jsd_topk(student, teacher, beta=0.5)
    torch.testing.assert_close(value, jsd_topk(teacher, student, beta=0.5), rtol=1e-12, atol=1e-15)
    assert value.max().item() <= math.log(2) + 1e-12


@pytest.mark.parametrize("name", RENORMALIZED)
def test_a_shift_of_either_side_does_not_matter_when_renormalized(name: str) -> None:
    student, teacher = draw(11, 5, 6, 12)
    torch.testing.assert_close(
        LOSSES[name](student + 7.0, teacher - 3.0), LOSSES[name](student, teacher), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_truncated_teacher_list_is_the_loss_on_the_rest(name: str) -> None:
    student, teacher = draw(12, 4, 6, 12)
    teacher[:, 4:] = -INF
    value, slope = loss_and_gradient(LOSSES[name], student, teacher)
    rest, rest_slope = loss_and_gradient(LOSSES[name], student[:, :4], teacher[:, :4])
    torch.testing.assert_close(value, rest, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(slope[:, :4], rest_slope, rtol=1e-12, atol=1e-15)
    assert slope[:, 4:].equal(torch.zeros(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_support_without_any_entry_gives_zero_loss_and_gradient(name: str) -> None:
    student, teacher = draw(13, 2, 5, 9)
    teacher[0] = -INF
    value, slope = loss_and_gradient(LOSSES[name], student, teacher)
    assert value[0].item() == 0.0 and slope[0].equal(torch.zeros(5, dtype=torch.float64))
    assert value[1].item() != 0.0 and slope[1].abs().sum().item() > 0


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("bad", [NAN, INF, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_masked_positions_may_hold_anything_and_get_exactly_zero_gradient(name: str, bad: float, side: int) -> None:
    pair = draw(14, 3, 5, 9)
    wanted, slope = loss_and_gradient(LOSSES[name], *pair)
    pair[side][1, 2] = bad
    student = pair[0].requires_grad_()
    losses = LOSSES[name](student, pair[1])
    mask = torch.tensor([1, 0, 1])
    total = gated_token_mean(losses, torch.ones(3, dtype=torch.float64), mask, num_loss_tokens=1)
    total.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert losses[[0, 2]].equal(wanted[[0, 2]])
    assert student.grad[1].equal(torch.zeros(5, dtype=torch.float64))
    assert student.grad[[0, 2]].equal(slope[[0, 2]])


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_position_shows(name: str, bad: float, side: int) -> None:
    pair = draw(15, 2, 5, 9)
    pair[side][1, 2] = bad
    value = LOSSES[name](*pair)
    assert value[0].isfinite() and value[1].isnan()


@pytest.mark.parametrize("name", ["raw forward", "renormalized forward", "tail forward"])
def test_a_student_without_mass_on_an_entry_is_infinitely_far_and_has_a_finite_gradient(name: str) -> None:
    student, teacher = draw(16, 1, 4, 9)
    student[0, 1] = -INF
    value, slope = loss_and_gradient(LOSSES[name], student, teacher)
    assert value.item() == INF and slope.isfinite().all() and slope[0, 1].item() < 0


@pytest.mark.parametrize("name", ["tail reverse", "jsd", "lsm"])
def test_a_student_without_mass_on_an_entry_is_finitely_far_in_the_other_direction(name: str) -> None:
    student, teacher = draw(17, 1, 4, 9)
    student[0, 1] = -INF
    value, slope = loss_and_gradient(LOSSES[name], student, teacher)
    assert value.item() == pytest.approx(slow_loss(name, student[0].tolist(), teacher[0].tolist()), rel=1e-12)
    assert slope.isfinite().all() and slope[0, 1].item() == 0.0


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("far", [-50.0, -800.0])
def test_far_off_entries_stay_finite(name: str, far: float) -> None:
    # exp(-800) is 0 in float64: both sides at once must not give 0 * inf.
    student = torch.tensor([[-0.1, far], [-0.1, -3.0], [-0.1, far]], dtype=torch.float64)
    teacher = torch.tensor([[-0.2, -4.0], [-0.2, far], [-0.2, far]], dtype=torch.float64)
    value, slope = loss_and_gradient(LOSSES[name], student, teacher)
    assert value.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_duplicate_entries_count_twice_on_both_sides(name: str) -> None:
    student, teacher = draw(18, 5, 3, 40)
    columns = torch.tensor([0, 0, 1, 2])
    student, teacher = student[:, columns] - 0.7, teacher[:, columns] - 0.7
    value = LOSSES[name](student, teacher)
    for row in range(5):
        wanted = slow_loss(name, student[row].tolist(), teacher[row].tolist())
        assert value[row].item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_computed(name: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in draw(19, 4, 5, 20))
    value, slope = loss_and_gradient(LOSSES[name], student, teacher)
    assert value.dtype == torch.float32 and slope.dtype == dtype
    assert value.equal(LOSSES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_positions_and_more_dimensions(name: str) -> None:
    assert LOSSES[name](torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    student, teacher = draw(20, 6, 4, 9)
    flat = LOSSES[name](student, teacher)
    assert LOSSES[name](student.view(2, 3, 4), teacher.view(2, 3, 4)).equal(flat.view(2, 3))


def test_the_tail_of_a_support_with_all_the_mass_is_1e_minus_7_and_has_no_gradient() -> None:
    # The student's mass 1 is clamped to exp(-1e-7), the teacher's tail is 0.5.
    student = torch.tensor([0.0], dtype=torch.float64)
    teacher = torch.tensor([0.5], dtype=torch.float64).log()
    value, slope = loss_and_gradient(tail_forward, student, teacher)
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-7), rel=1e-6)
    # What is left is a - q + p with a constant tail: p - q.
    assert slope.item() == pytest.approx(1.0 - 0.5, rel=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_log_probs_that_round_to_a_mass_above_one_stay_finite_and_not_negative(direction: str) -> None:
    student = torch.tensor([[0.5, 0.5], [0.999, 0.001]]).log() + 1e-3
    teacher = torch.tensor([[0.5, 0.49], [0.999, 0.001]]).log() + 1e-3
    value = tail_kl(student, teacher, direction=direction)
    assert value.isfinite().all() and (value >= 0).all()


def test_student_mass_on_dropped_entries_joins_the_tail() -> None:
    student = torch.tensor([0.5, 0.3], dtype=torch.float64).log()
    teacher = torch.tensor([math.log(0.6), -INF], dtype=torch.float64)
    wanted = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert tail_forward(student, teacher).item() == pytest.approx(wanted, rel=1e-13)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NEVER_NEGATIVE),
    st.integers(2, 12),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1e-3, 1.0, 20.0]),
    st.sampled_from([1e-5, 1.0]),
)
def test_never_negative_and_zero_only_when_equal(name: str, size: int, seed: int, apart: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(20, size + 3, generator=generator, dtype=torch.float64)
    moved = logits + apart * torch.randn(20, size + 3, generator=generator, dtype=torch.float64)
    student, teacher = logits.log_softmax(-1)[:, :size], moved.log_softmax(-1)[:, :size]
    assert (LOSSES[name](student, teacher) > 0).all()
    assert (LOSSES[name](student.float(), teacher.float()) >= 0).all()
    same, slope = loss_and_gradient(LOSSES[name], student, student)
    assert same.abs().max().item() <= 1e-15 and slope.abs().max().item() < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.integers(2, 9), st.integers(0, 2**31))
def test_the_order_of_the_support_does_not_matter(name: str, size: int, seed: int) -> None:
    student, teacher = draw(seed, 3, size, size + 4)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        LOSSES[name](student[:, order], teacher[:, order]), LOSSES[name](student, teacher), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("name", RENORMALIZED)
@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (1,), ()])
def test_one_renormalized_entry_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        LOSSES[name](torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("name", ON_LOGPROBS)
def test_one_entry_will_do_where_nothing_is_renormalized(name: str) -> None:
    student, teacher = draw(21, 4, 1, 5)
    for row, value in enumerate(LOSSES[name](student, teacher).tolist()):
        assert value == pytest.approx(slow_loss(name, student[row].tolist(), teacher[row].tolist()), rel=1e-10)
    with pytest.raises(ValueError, match="K >= 1"):
        LOSSES[name](torch.zeros(3, 0), torch.zeros(3, 0))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_shapes_that_differ_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        LOSSES[name](torch.zeros(3, 4), torch.zeros(3, 5))


@pytest.mark.parametrize("beta", [-0.1, 1.1, NAN])
def test_a_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta is .*\[0, 1\]"):
        jsd_topk(torch.zeros(2, 3), torch.zeros(2, 3), beta=beta)


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="forward, reverse"):
        tail_kl(torch.zeros(2, 3), torch.zeros(2, 3), direction="both")
