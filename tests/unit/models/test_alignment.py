"""Teacher and learner read the same positions: the state before a response token predicts it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opd_ray.config.choices import Dtype, LogprobDtype, Template
from opd_ray.config.schema import RunConfig
from opd_ray.models.loading import hidden_states, load_causal_lm, pad_rows
from opd_ray.models.tokenization import load_tokenizer, newline_token_mask, tokenizer_fingerprint
from opd_ray.teacher.worker import TeacherSpec, TeacherWorker
from opd_ray.tiny.paths import teacher_path
from opd_ray.trajectory.codec import decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow, scored_rows
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.types import BatchMeta, Prompt

PATH = str(teacher_path())


def test_padded_positions_by_hand() -> None:
    block = pad_rows(
        [np.array([5, 6, 7], dtype=np.int32), np.array([8], dtype=np.int32)],
        [np.array([1, 2], dtype=np.int32), np.array([3, 4, 9], dtype=np.int32)],
        pad_id=0,
        device=torch.device("cpu"),
    )
    assert block.input_ids.tolist() == [[5, 6, 7, 1], [8, 3, 4, 0]]
    assert block.positions.tolist() == [2, 3, 4, 5, 6]
    assert [index.tolist() for index in block.row_index] == [[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]]


def test_padding_does_not_reach_valid_positions() -> None:
    model = load_causal_lm(PATH, Dtype.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 40, n).astype(np.int32) for n in (4, 9, 2)]
    responses = [rng.integers(2, 40, n).astype(np.int32) for n in (30, 3, 11)]
    device = torch.device("cpu")
    with torch.no_grad():
        together = pad_rows(prompts, responses, 0, device)
        joint = hidden_states(model, together)
        single = []
        for prompt, response in zip(prompts, responses, strict=True):
            alone = pad_rows([prompt], [response], 0, device)
            single.append(hidden_states(model, alone))
    torch.testing.assert_close(joint, torch.cat(single), rtol=1e-4, atol=1e-5)


def rollout_row(trajectory_id: int, prompt_id: str, prompt: list[int], response: list[int]) -> RolloutRow:
    return RolloutRow(
        trajectory_id=trajectory_id,
        prompt_id=prompt_id,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        response_token_ids=np.array(response, dtype=np.int32),
        behavior_logprobs=np.zeros(len(response), dtype=np.float32),
        version_starts=np.array([0], dtype=np.int32),
        version_values=np.array([0], dtype=np.int64),
        finish_reason="stop",
        temperature=1.0,
        top_p=1.0,
    )


@pytest.mark.parametrize("template", [Template.completion, Template.completion_with_solution])
@pytest.mark.parametrize("max_batch_tokens", [40, 10_000])
def test_scores_equal_a_plain_forward_pass(template: Template, max_batch_tokens: int) -> None:
    """Also where the teacher's prompt is longer than the student's: positions are aligned on the response."""
    tokenizer = load_tokenizer(PATH)
    fingerprint = tokenizer_fingerprint(tokenizer)
    cfg = RunConfig()
    cfg.teacher.template, cfg.teacher.top_k, cfg.teacher.max_batch_tokens = template, 5, max_batch_tokens
    cfg.replay.logprob_dtype = LogprobDtype.float32
    worker = TeacherWorker(TeacherSpec(cfg, "t", PATH, 44, fingerprint, 1))
    problems = [
        Prompt(id="a", problem="3+4=", solution="3+4=7\n#7"),
        Prompt(id="b", problem="9-2+1=", solution="9-2=7"),
    ]
    texts = ["3+4=7\n#7", "9-2=7\n7+1=8\n#8"]
    responses = [tokenizer(text)["input_ids"] for text in texts]
    student_prompts = [tokenizer(p.problem + "\n")["input_ids"] for p in problems]
    rows = [rollout_row(i, p.id, student_prompts[i], responses[i]) for i, p in enumerate(problems)]
    payload, meta = worker.score(encode_rollouts(rows, BatchSpec(fingerprint)), BatchMeta((), "r", 0.0, 0), problems)
    assert meta.num_bytes == payload.size
    model = load_causal_lm(PATH, Dtype.float32)
    for problem, response, row in zip(problems, responses, scored_rows(decode(payload)), strict=True):
        shown = problem.problem + "\n"
        if template is Template.completion_with_solution:
            shown = f"{problem.problem}\n{problem.solution}\n\n{problem.problem}\n"
        prompt = tokenizer(shown)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        predicted = logprobs[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        expected = predicted.gather(1, torch.tensor(response)[:, None])[:, 0]
        np.testing.assert_allclose(row.teacher_logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(row.teacher_topk_logprobs, predicted.topk(5).values, atol=1e-4)
        assert (row.teacher_topk_ids[:, 0] == predicted.argmax(-1).numpy()).all()


def test_newline_tokens() -> None:
    tokenizer = load_tokenizer(PATH)
    mask = newline_token_mask(tokenizer, 50)
    assert [tokenizer.decode([i]) for i in np.flatnonzero(mask)] == ["\n"]
    assert len(mask) == 50
