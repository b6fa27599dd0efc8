import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.objective import lsm_loss, overlap_ratio, support_mass, with_sampled_token

NAN, INF = float("nan"), float("inf")


def test_the_sampled_token_is_appended_and_leaves_the_support_where_it_is_there_already() -> None:
    ids = torch.tensor([[4, 9], [4, 9], [4, 9]], dtype=torch.int32)
    logprobs = torch.tensor([[-0.5, -1.5], [-0.5, -1.5], [-0.5, -INF]])
    sampled = torch.tensor([7, 9, 9])
    got_ids, got = with_sampled_token(ids, logprobs, sampled, torch.tensor([-4.0, -1.5, -6.0]))
    assert got_ids.dtype == torch.int32 and got_ids.tolist() == [[4, 9, 7], [4, 9, 9], [4, 9, 9]]
    # In the last row the list's own entry is out of the support, so that the appended one is not a repetition.
    assert got.tolist() == [[-0.5, -1.5, -4.0], [-0.5, -1.5, -INF], [-0.5, -INF, -6.0]]


def test_no_token_counts_twice_in_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    teacher = torch.randn(40, 12, generator=generator, dtype=torch.float64).log_softmax(-1)
    values, ids = teacher.topk(4)
    sampled = torch.randint(12, (40,), generator=generator)
    joined, logprobs = with_sampled_token(ids, values, sampled, teacher.gather(1, sampled.unsqueeze(1)).squeeze(1))
    got = lsm_loss(logits.gather(1, joined), logprobs)
    for row in range(40):
        support = sorted({*ids[row].tolist(), int(sampled[row])})
        p, q = logits[row, support].softmax(0), teacher[row, support].softmax(0)
        assert got[row].item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-10)


def test_the_wider_of_the_two_dtypes_is_kept() -> None:
    ids, sampled = torch.tensor([[1, 2]]), torch.tensor([3])
    half = torch.tensor([[-0.5, -1.0]], dtype=torch.bfloat16)
    assert with_sampled_token(ids, half, sampled, torch.tensor([-2.0]))[1].dtype == torch.float32
    assert with_sampled_token(ids, half, sampled, torch.tensor([-2.0]).bfloat16())[1].dtype == torch.bfloat16
    none = with_sampled_token(ids[:0], half[:0], sampled[:0], torch.zeros(0))
    assert none[0].shape == none[1].shape == (0, 3)


def test_overlap_by_hand() -> None:
    student = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]])
    teacher = torch.tensor([[4, 3, 2, 1], [8, 9, 10, 11], [5, 6, 7, 0]])
    got = overlap_ratio(student, teacher)
    assert got.dtype == torch.float32 and got.tolist() == [1.0, 0.25, 0.0]
    assert overlap_ratio(student[:0], teacher[:0]).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_overlap_equals_the_definition(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(2, 6, 12, generator=generator).argsort(dim=-1)[:, :, :size]
    wanted = [len(set(a) & set(b)) / size for a, b in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert overlap_ratio(student, teacher).tolist() == pytest.approx(wanted, rel=1e-6)
    assert overlap_ratio(teacher, student).equal(overlap_ratio(student, teacher))


def test_mass_by_hand() -> None:
    student = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]]).log().requires_grad_()
    teacher = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -INF, -3.0], [-INF, -INF, -INF]])
    got = support_mass(student, teacher)
    assert not got.requires_grad and got.dtype == torch.float32
    assert got.tolist() == pytest.approx([0.875, 0.625, 0.0], rel=1e-6)


def test_mass_of_the_whole_vocabulary_is_one_and_nan_shows() -> None:
    student = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    assert support_mass(student, student).tolist() == pytest.approx([1.0] * 5, rel=1e-6)
    broken = student.clone()
    broken[2, 3] = NAN
    assert support_mass(student, broken).isnan().tolist() == [False, False, True, False, False]
    assert support_mass(broken, student).isnan().tolist() == [False, False, True, False, False]
    assert support_mass(torch.full((1, 2), -INF), torch.zeros(1, 2)).item() == 0.0


def test_mass_counts_a_repeated_id_as_often_as_it_stands_there() -> None:
    logprob = math.log(0.3)
    assert support_mass(torch.tensor([[logprob, logprob]]), torch.zeros(1, 2)).item() == pytest.approx(0.6, rel=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids, logprobs = torch.zeros(3, 2).long(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="shapes differ"):
        with_sampled_token(ids, logprobs[:, :1], torch.zeros(3).long(), torch.zeros(3))
    with pytest.raises(ValueError, match="shapes differ"):
        with_sampled_token(ids, logprobs, torch.zeros(2).long(), torch.zeros(2))
    with pytest.raises(ValueError, match="shapes differ"):
        overlap_ratio(ids, ids[:2])
    with pytest.raises(ValueError, match="K >= 1"):
        overlap_ratio(ids[:, :0], ids[:, :0])
    with pytest.raises(ValueError, match="shapes differ"):
        support_mass(logprobs, logprobs[:2])
