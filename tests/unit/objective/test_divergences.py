import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import k1, k2, k3, lsm_loss

NAN, INF = float("nan"), float("inf")


def draw_pair(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    teacher = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1) - 0.3
    return student.to(dtype), teacher.to(dtype)


def slow_lsm(student: list[float], teacher: list[float]) -> tuple[float, list[float]]:
    """Loss and gradient of one position by the definition, with Python floats."""
    kept = [v for v in range(len(teacher)) if teacher[v] != -INF]
    gradient = [0.0] * len(teacher)
    if not kept:
        return 0.0, gradient
    top_p, top_q = max(student[v] for v in kept), max(teacher[v] for v in kept)
    mass_p = sum(math.exp(student[v] - top_p) for v in kept)
    mass_q = sum(math.exp(teacher[v] - top_q) for v in kept)
    log_p = {v: student[v] - top_p - math.log(mass_p) for v in kept}
    log_q = {v: teacher[v] - top_q - math.log(mass_q) for v in kept}
    loss = sum(math.exp(log_p[v]) * (log_p[v] - log_q[v]) for v in kept)
    for v in kept:
        gradient[v] = math.exp(log_p[v]) * (log_p[v] - log_q[v] - loss)
    return loss, gradient


def loss_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = lsm_loss(student, teacher)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return loss.detach(), student.grad


def test_by_hand() -> None:
    # p' = (3/4, 1/4), q' = (1/2, 1/2): 0.75 ln 1.5 + 0.25 ln 0.5 = 0.304099 - 0.173287 = 0.130812.
    student = torch.tensor([math.log(3.0) + 7.0, 7.0], dtype=torch.float64)
    teacher = torch.tensor([math.log(0.2), math.log(0.2)], dtype=torch.float64)
    loss, gradient = loss_and_gradient(student, teacher)
    assert loss.item() == pytest.approx(0.130812, abs=1e-6)
    # Gradient: 0.75 (ln 1.5 - 0.130812) = 0.205990, and minus that.
    assert gradient.tolist() == pytest.approx([0.205990, -0.205990], abs=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(scale: float, dtype: torch.dtype) -> None:
    student, teacher = draw_pair(3, 4, 5, 7, dtype=dtype, scale=scale)
    teacher[0, 0, 2:] = -INF
    loss, gradient = loss_and_gradient(student, teacher)
    assert loss.dtype == dtype and loss.shape == (4, 5)
    for i in range(4):
        for j in range(5):
            wanted, slope = slow_lsm(student[i, j].tolist(), teacher[i, j].tolist())
            tight = 1e-12 if dtype == torch.float64 else 1e-6
            assert loss[i, j].item() == pytest.approx(wanted, rel=tight, abs=tight * scale)
            assert gradient[i, j].tolist() == pytest.approx(slope, rel=10 * tight, abs=10 * tight * scale)


def test_gradient_against_central_differences() -> None:
    student, teacher = draw_pair(5, 6, 5)
    teacher[1, 3:] = -INF
    teacher[2] = student[2] - 1.0
    assert torch.autograd.gradcheck(lambda x: lsm_loss(x, teacher), (student.requires_grad_(),), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_models_give_exactly_zero(dtype: torch.dtype) -> None:
    student, _ = draw_pair(7, 50, 32, dtype=dtype)
    loss, gradient = loss_and_gradient(student, student)
    assert loss.equal(torch.zeros(50, dtype=dtype)) and gradient.abs().max().item() < 1e-12
    shifted, slope = loss_and_gradient(student, student - 3.3)
    assert shifted.abs().max().item() < 1e-11 and slope.abs().max().item() < 1e-5


def test_a_changed_teacher_changes_the_gradient() -> None:
    student, teacher = draw_pair(11, 3, 6)
    _, before = loss_and_gradient(student, teacher)
    teacher[1, 2] += 0.1
    _, after = loss_and_gradient(student, teacher)
    assert before[0].equal(after[0]) and before[2].equal(after[2])
    assert (before[1] - after[1]).abs().max().item() > 1e-3


def test_teacher_is_a_constant() -> None:
    student, teacher = draw_pair(13, 3, 6)
    teacher.requires_grad_()
    lsm_loss(student.requires_grad_(), teacher).sum().backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None


def test_the_whole_vocabulary_gives_the_full_reverse_kl() -> None:
    student, teacher = draw_pair(17, 9, 40)
    p = student.log_softmax(-1)
    q = teacher.log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(lsm_loss(student, teacher), full, rtol=1e-12, atol=1e-14)


def test_truncated_teacher_list_is_the_loss_on_the_rest() -> None:
    student, teacher = draw_pair(19, 4, 6)
    teacher[:, 4:] = -INF
    loss, gradient = loss_and_gradient(student, teacher)
    rest, rest_gradient = loss_and_gradient(student[:, :4], teacher[:, :4])
    torch.testing.assert_close(loss, rest, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[:, :4], rest_gradient, rtol=1e-12, atol=1e-15)
    assert gradient[:, 4:].equal(torch.zeros(4, 2, dtype=torch.float64))


def test_support_without_any_entry_and_with_one() -> None:
    student, teacher = draw_pair(23, 3, 5)
    teacher[0] = -INF
    teacher[1, 1:] = -INF
    loss, gradient = loss_and_gradient(student, teacher)
    assert loss[:2].tolist() == [0.0, 0.0]
    assert gradient[:2].equal(torch.zeros(2, 5, dtype=torch.float64))
    assert loss[2].item() > 0 and gradient[2].abs().sum().item() > 0


def test_student_without_mass_on_an_entry() -> None:
    # p' = (1, 0): loss = ln(1 / q'_0) with q' = (1/4, 3/4).
    student = torch.tensor([[1.0, -INF], [1.0, -1e4]], dtype=torch.float64)
    teacher = torch.tensor([0.25, 0.75], dtype=torch.float64).log().expand(2, 2)
    loss, gradient = loss_and_gradient(student, teacher)
    assert loss.tolist() == pytest.approx([math.log(4)] * 2, rel=1e-12)
    assert gradient.equal(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_position_shows_and_does_not_spread(bad: float, side: int) -> None:
    pair = draw_pair(29, 3, 5)
    wanted, slope = loss_and_gradient(*pair)
    pair[side][1, 2] = bad
    student = pair[0].requires_grad_()
    loss = lsm_loss(student, pair[1])
    assert loss[1].isnan() and loss[[0, 2]].equal(wanted[[0, 2]])
    loss[[0, 2]].sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad[1].equal(torch.zeros(5, dtype=torch.float64)) and student.grad[0].equal(slope[0])


def test_duplicate_entries_count_twice_on_both_sides() -> None:
    # p over (a, a, b) with equal logits: 1/3 each; q = (1/4, 1/4, 1/2): ln(4/3) 2/3 + ln(2/3) / 3.
    student = torch.zeros(3, dtype=torch.float64)
    teacher = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()
    wanted = 2 / 3 * math.log(4 / 3) + math.log(2 / 3) / 3
    assert lsm_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = draw_pair(31, 4, 6, dtype=dtype)
    loss, gradient = loss_and_gradient(student, teacher)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert loss.equal(lsm_loss(student.float(), teacher.float()))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(0, 2**31),
    st.sampled_from([1e-5, 1e-2, 1.0, 20.0]),
    st.sampled_from([1e-5, 1.0]),
)
def test_never_negative_and_zero_only_when_equal(size: int, seed: int, apart: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(20, size, generator=generator)
    teacher = (student + apart * torch.randn(20, size, generator=generator)).log_softmax(-1)
    loss = lsm_loss(student, teacher)
    assert (loss >= -1e-12).all()
    exact = lsm_loss(student.double(), teacher.double())
    assert (exact > 0).all()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_order_of_the_support_and_shifts_do_not_matter(size: int, seed: int) -> None:
    student, teacher = draw_pair(seed, 3, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        lsm_loss(student[:, order] + 5.0, teacher[:, order] - 2.0),
        lsm_loss(student, teacher),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (1,), ()])
def test_too_small_a_support_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        lsm_loss(torch.zeros(shape), torch.zeros(shape))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        lsm_loss(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="shapes differ"):
        k1(torch.zeros(3), torch.zeros(4))


def test_no_positions() -> None:
    assert lsm_loss(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("r", [0.0, 1e-4, -0.3, 2.0, -50.0, 50.0])
def test_estimators_by_definition(r: float) -> None:
    teacher = torch.tensor([-60.0], dtype=torch.float64)
    current = teacher + r
    r = (current - teacher).item()
    assert k1(current, teacher).item() == r
    assert k2(current, teacher).item() == pytest.approx(r * r / 2, rel=1e-15)
    series = r * r / 2 - r**3 / 6 + r**4 / 24
    wanted = series if abs(r) < 1e-3 else math.exp(-r) - 1 + r
    assert k3(current, teacher).item() == pytest.approx(wanted, rel=1e-11, abs=1e-300)


def test_estimators_keep_precision_and_gradient() -> None:
    current = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64, requires_grad=True)
    for estimator in (k1, k2, k3):
        assert torch.autograd.gradcheck(estimator, (current, teacher))
        assert estimator(current.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    low = torch.tensor([-1.0]), torch.tensor([-1.0 - 2.0**-10])
    x = 2.0**-10
    assert k3(*low).item() == pytest.approx(x * x / 2 - x**3 / 6 + x**4 / 24, rel=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_close() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator, close in ((k1, 1e-12), (k3, 1e-12), (k2, 0.1)):
        torch.testing.assert_close((p * estimator(p.log(), q.log())).sum(), exact, rtol=close, atol=0)
