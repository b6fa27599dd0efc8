"""The pieces together: one optimizer step's loss and gradient through a small LM head."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objective import (
    block_segments,
    drift_gate,
    gated_token_mean,
    lsm_loss,
    newline_segments,
    sampled_token_loss,
    support_logits,
    token_logprobs,
)

NAN = float("nan")
VOCABULARY, HIDDEN, K = 300, 5, 4


def draw(seed: int, batch: int, width: int) -> dict[str, Tensor]:
    """A batch of ragged responses with holes in the mask; padding of the stored log-probs is NaN."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (batch,), generator=generator)
    lengths[0] = width
    inside = torch.arange(width) < lengths.unsqueeze(1)
    mask = inside & (torch.rand(batch, width, generator=generator) < 0.85)
    mask[0, 0] = True

    def stored(scale: float) -> Tensor:
        values = -scale * torch.rand(batch, width, generator=generator, dtype=torch.float64)
        return torch.where(inside, values, NAN)

    return {
        "hidden": torch.randn(batch, width, HIDDEN, generator=generator, dtype=torch.float64),
        "tokens": torch.randint(VOCABULARY, (batch, width), generator=generator),
        "topk_ids": torch.randint(VOCABULARY, (batch, width, K), generator=generator),
        "topk": torch.where(
            inside.unsqueeze(-1),
            torch.randn(batch, width, K, generator=generator, dtype=torch.float64).log_softmax(-1),
            NAN,
        ),
        "behavior": stored(8.0),
        "teacher": stored(8.0),
        "mask": mask,
        "lengths": lengths,
        "newlines": torch.rand(batch, width, generator=generator) < 0.3,
    }


def head_weight() -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()


def losses(batch: dict[str, Tensor], head: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """Return (loss of each token `[B,T]`, current log-probs `[B,T]`)."""
    shape = batch["tokens"].shape
    hidden = batch["hidden"].reshape(-1, HIDDEN)
    current = token_logprobs(hidden, head, batch["tokens"].reshape(-1), chunk_size=7).reshape(shape)
    if objective == "lsm":
        logits = support_logits(hidden, head, batch["topk_ids"].reshape(-1, K))
        return lsm_loss(logits, batch["topk"].reshape(-1, K)).reshape(shape), current
    return sampled_token_loss(current, batch["behavior"], batch["teacher"], advantage=objective), current


def segments(batch: dict[str, Tensor], kind: str) -> Tensor:
    if kind == "newline":
        return newline_segments(batch["newlines"], batch["lengths"], min_len=2, max_len=5, fallback_block=4)
    return block_segments(batch["lengths"], batch["tokens"].shape[1], 3)


def step(batch: dict[str, Tensor], objective: str, kind: str, tau: float, normalize: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the whole batch at once."""
    head = head_weight()
    token_loss, current = losses(batch, head, objective)
    gate = drift_gate(
        current,
        batch["behavior"],
        batch["mask"],
        segments(batch, kind),
        tau=tau,
        statistic="rms",
        normalize=normalize,
    )
    loss = gated_token_mean(token_loss, gate.token_weights, batch["mask"])
    loss.backward()  # type: ignore[no-untyped-call]
    assert head.grad is not None
    return loss.detach(), head.grad


def sharded_step(
    batch: dict[str, Tensor], objective: str, kind: str, tau: float, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same, microbatch by microbatch, dividing once at the end."""
    head = head_weight()
    total, weight_sum = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in parts:
        part = {key: value[rows] for key, value in batch.items()}
        token_loss, current = losses(part, head, objective)
        gate = drift_gate(
            current,
            part["behavior"],
            part["mask"],
            segments(part, kind),
            tau=tau,
            statistic="rms",
            normalize="none",
        )
        loss = gated_token_mean(token_loss, gate.token_weights, part["mask"], num_loss_tokens=1)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        weight_sum += gate.weight_sum
    assert head.grad is not None
    return total / weight_sum, head.grad / weight_sum


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.sampled_from(["lsm", "frozen", "recompute"]),
    st.sampled_from(["block", "newline"]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(1, 4),
)
def test_microbatches_and_order_do_not_change_loss_or_gradient(
    seed: int, batch_size: int, objective: str, kind: str, tau: float, size: int
) -> None:
    batch = draw(seed, batch_size, 9)
    loss, grad = step(batch, objective, kind, tau, "step")
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(seed))
    found, found_grad = sharded_step(
        batch, objective, kind, tau, [order[start : start + size] for start in range(0, batch_size, size)]
    )
    torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found_grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["lsm", "frozen", "recompute"])
@pytest.mark.parametrize("kind", ["block", "newline"])
@pytest.mark.parametrize("normalize", ["step", "sequence", "none"])
def test_tau_zero_is_the_ungated_path_bit_for_bit(objective: str, kind: str, normalize: str) -> None:
    batch = draw(5, 4, 11)
    head = head_weight()
    token_loss, _ = losses(batch, head, objective)
    plain = torch.where(batch["mask"], token_loss, 0.0).sum() / batch["mask"].sum()
    plain.backward()  # type: ignore[no-untyped-call]
    loss, grad = step(batch, objective, kind, 0.0, normalize)
    assert head.grad is not None
    assert loss.equal(plain.detach()) and grad.equal(head.grad)
    gated, gated_grad = step(batch, objective, kind, 1.0, normalize)
    assert not gated.equal(loss) and not gated_grad.equal(grad)


def test_no_drift_is_the_ungated_path_bit_for_bit() -> None:
    batch = draw(6, 3, 8)
    with torch.no_grad():
        _, current = losses(batch, head_weight(), "lsm")
    batch["behavior"] = torch.where(batch["mask"], current, NAN)
    loss, grad = step(batch, "lsm", "block", 0.0, "step")
    for normalize in ("step", "sequence", "none"):
        found, found_grad = step(batch, "lsm", "block", 5.0, normalize)
        assert found.equal(loss) and found_grad.equal(grad)


@pytest.mark.parametrize("objective", ["lsm", "frozen", "recompute"])
def test_what_is_masked_has_no_gradient_and_may_hold_anything(objective: str) -> None:
    batch = draw(7, 4, 10)
    loss, grad = step(batch, objective, "block", 1.0, "step")
    dirty = dict(batch)
    generator = torch.Generator().manual_seed(3)
    for key in ("behavior", "teacher"):
        noise = 1e4 * torch.randn(batch["mask"].shape, generator=generator, dtype=torch.float64)
        dirty[key] = torch.where(batch["mask"], batch[key], noise)
    dirty["topk"] = torch.where(batch["mask"].unsqueeze(-1), batch["topk"], -torch.inf)
    dirty["hidden"] = torch.where(batch["mask"].unsqueeze(-1), batch["hidden"], 1e3).requires_grad_()
    found, found_grad = step(dirty, objective, "block", 1.0, "step")
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found_grad, grad, rtol=1e-12, atol=1e-14)
    hidden_grad = dirty["hidden"].grad
    assert hidden_grad is not None
    assert hidden_grad[~batch["mask"]].abs().max().item() == 0.0


def test_all_masked_gives_zero_loss_and_zero_gradient() -> None:
    batch = draw(8, 2, 6)
    batch["mask"] = torch.zeros_like(batch["mask"])
    for objective in ("lsm", "frozen", "recompute"):
        for normalize in ("step", "sequence", "none"):
            loss, grad = step(batch, objective, "newline", 1.0, normalize)
            assert loss.item() == 0.0 and grad.abs().max().item() == 0.0


def test_a_rank_with_nothing_valid_takes_part_in_a_sharded_step() -> None:
    batch = draw(9, 4, 7)
    batch["mask"][2:] = False
    loss, grad = step(batch, "lsm", "block", 1.0, "step")
    found, found_grad = sharded_step(batch, "lsm", "block", 1.0, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(found_grad, grad)


def test_gate_is_a_constant_for_the_gradient() -> None:
    batch = draw(10, 3, 8)
    head = head_weight()
    token_loss, current = losses(batch, head, "frozen")
    gate = drift_gate(
        current,
        batch["behavior"],
        batch["mask"],
        segments(batch, "block"),
        tau=1.0,
        statistic="rms",
        normalize="step",
    )
    slope = torch.autograd.grad(gated_token_mean(token_loss, gate.token_weights, batch["mask"]), token_loss)[0]
    wanted = torch.where(batch["mask"], gate.token_weights, 0.0) / batch["mask"].sum()
    torch.testing.assert_close(slope, wanted)
