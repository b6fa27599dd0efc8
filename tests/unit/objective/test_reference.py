"""The method on one page: short, on its own, equal to the package's functions, and able to teach a real model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_ray import objective
from opd_ray.objective import reference
from opd_ray.tiny.paths import student_path, teacher_path
from opd_ray.tiny.task import problems

RECIPE = reference.Recipe(max_response_tokens=12, eos_id=1, lr=3e-5, top_k=8, block_size=4)


@pytest.fixture
def models() -> Iterator[tuple[Any, Any]]:
    # Models this small run fastest on one thread, by far where other processes use the cores too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path()) for path in (student_path, teacher_path))
    yield student, teacher
    torch.set_num_threads(threads)


def prompts(num: int) -> list[Tensor]:
    tokenizer: Any = AutoTokenizer.from_pretrained(student_path())
    return [torch.tensor(tokenizer(f"{item.problem}\n").input_ids) for item in problems("train", num, seed=0)]


def test_it_is_one_page_and_imports_torch_alone() -> None:
    text = Path(reference.__file__).read_text()
    assert len(text.splitlines()) <= 150
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert names == {"__future__", "collections.abc", "dataclasses", "torch"}


def test_it_teaches_the_embedded_student(models: tuple[nn.Module, nn.Module]) -> None:
    """The distance to the teacher on responses that were not trained on falls; each batch's second step finds less."""
    student, teacher = models
    questions = prompts(112)
    held_out = reference.score(teacher, reference.sample(student, questions[72:], RECIPE), RECIPE)

    def distance() -> float:
        with torch.no_grad():
            losses = reference.lsm_losses(reference.response_logits(student, held_out.rollout), held_out)
        return float(losses[held_out.rollout.mask].mean())

    before = distance()
    batches = [questions[start : start + 12] for start in range(0, 72, 12)]
    losses = list(reference.train(student, teacher, batches, RECIPE))
    assert len(losses) == 2 * len(batches)
    assert all(second < first for first, second in zip(losses[::2], losses[1::2], strict=True))
    assert distance() < 0.8 * before


def test_the_gate_is_open_at_first_and_acts_on_the_second_step(models: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = models
    batch = reference.score(teacher, reference.sample(student, prompts(6), RECIPE), RECIPE)
    mask = batch.rollout.mask

    def weights() -> Tensor:
        with torch.no_grad():
            return reference.block_weights(reference.response_logits(student, batch.rollout), batch, RECIPE)

    torch.testing.assert_close(weights(), mask.float(), rtol=0, atol=1e-5)
    reference.step(student, torch.optim.AdamW(student.parameters(), lr=1e-3), batch, RECIPE)
    acting = weights()
    assert float(acting[mask].min()) < 0.98 and float(acting[mask].max()) > 1.005
    assert float(acting[mask].mean()) == pytest.approx(1)


def test_a_response_ends_with_its_end_of_sequence_token() -> None:
    class Fixed(nn.Module):
        """Says 5, 1 (the end), 7 after a prompt of two tokens, whatever it reads."""

        def forward(self, tokens: Tensor) -> Any:
            says = torch.tensor([0, 5, 1, 7, 7, 7, 7, 7])[: tokens.shape[1]]
            logits = torch.where(nn.functional.one_hot(says, 9) > 0, 0.0, -1e4)
            return type("Output", (), {"logits": logits.expand(len(tokens), -1, -1)})

    rollout = reference.sample(Fixed(), [torch.tensor([3, 3])], reference.Recipe(4, eos_id=1))
    assert rollout.responses.tolist() == [[5, 1, 7, 7]]
    assert rollout.mask.tolist() == [[True, True, False, False]]
    assert rollout.behavior_logprobs[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("tau", [0.0, 1.0, 30.0])
def test_losses_and_weights_are_the_packages(tau: float) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([11, 4, 1, 9])
    mask = (torch.arange(11) < lengths[:, None]) & (torch.rand(4, 11, generator=generator) < 0.8)
    mask[0, 0] = True
    drift = torch.where(mask, 0.1 * torch.randn(4, 11, generator=generator), 0.0)
    segments = objective.block_segments(lengths, 11, 4)
    zero = torch.zeros_like(drift)
    gate = objective.drift_gate(drift, zero, mask, segments, tau=tau, statistic="signed_mean", normalize="step")
    torch.testing.assert_close(
        reference.gate_weights(drift, mask, segments.clamp(min=0), tau), gate.token_weights, rtol=1e-5, atol=1e-6
    )
    logits = torch.randn(4, 11, 50, generator=generator)
    teacher = torch.randn(4, 11, 50, generator=generator).log_softmax(-1).topk(6)
    rollout = reference.Rollout(torch.zeros(4, 13, dtype=torch.int64), torch.full((4,), 2), mask, zero)
    batch = reference.Batch(rollout, teacher.indices, teacher.values)
    expected = objective.lsm_loss(logits.gather(2, teacher.indices), teacher.values)
    torch.testing.assert_close(reference.lsm_losses(logits, batch), expected, rtol=1e-5, atol=1e-6)
