"""The real vLLM engine and the real teacher: whose ids the support is, and the teacher's log-probs there."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from opd_ray.config.choices import Dtype, LogprobDtype
from opd_ray.config.schema import RunConfig
from opd_ray.errors import SchemaError
from opd_ray.models.loading import load_causal_lm
from opd_ray.rollout.group import RolloutGroup
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.training.preflight import preflight
from opd_ray.trajectory.codec import decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow, ScoredRow, rollout_rows, scored_rows
from opd_ray.trajectory.schema import BatchSpec, read_spec
from opd_ray.types import Prompt, RolloutRequest
from tests.integration.learners import NO_SHARE, Learners
from tests.integration.runs import Engines, small_config, train

pytestmark = pytest.mark.integration

PROMPTS = (Prompt(id="a", problem="7+3-4="), Prompt(id="b", problem="12-5="))
SAMPLES = 4
# All that the embedded tokenizer has; K may be as large.
VOCAB = 44
# Support, K, the dtype of the sampled tokens' log-probs, and whether both models run in vLLM, each in two processes.
PARAMS: list[Any] = [
    ("student_topk", 4, "float16", False),
    pytest.param(("teacher_topk", 4, "float32", False), marks=pytest.mark.slow),
    pytest.param(("student_topk", VOCAB, "float32", False), marks=pytest.mark.slow),
    pytest.param(("teacher_topk", 4, "float32", True), marks=pytest.mark.slow),
]
SPLIT = ("rollout.tensor_parallel=2", "teacher.backend=vllm", "teacher.tensor_parallel=2")


@dataclass
class Scored:
    """One request that went through an engine and a teacher of `cfg`, and the models' folders."""

    cfg: RunConfig
    rollout: RolloutGroup
    teacher: TeacherGroup
    payload: Any
    scored: Any
    student: Path
    folder: Path

    @property
    def rows(self) -> list[ScoredRow]:
        return scored_rows(decode(ray.get(self.scored)))

    @property
    def rounding(self) -> float:
        """Relative error of stored log-probs of the sampled tokens."""
        return 2.0**-11 if self.cfg.replay.sampled_logprob_dtype is LogprobDtype.float16 else 0.0


def generate(rollout: RolloutGroup) -> list[Any]:
    request = RolloutRequest(PROMPTS, tuple(range(SAMPLES * len(PROMPTS))), SAMPLES)
    return list(rollout.workers[0].generate.options(num_returns=2).remote(request))


def score(teacher: TeacherGroup, payload: Any, meta: Any) -> Any:
    return teacher.workers[0].score.options(num_returns=2).remote(payload, meta, PROMPTS)


@pytest.fixture(scope="module", params=PARAMS)
def scored(
    ray_cluster: None, student_folder: Path, teacher_folder: Path, request: pytest.FixtureRequest
) -> Iterator[Scored]:
    support, top_k, dtype, is_split = request.param
    # What is noted are raw log-probs, however the tokens are sampled.
    sampling = ("rollout.temperature=0.7", "rollout.top_p=0.8")
    dtypes = ("replay.logprob_dtype=float32", f"replay.sampled_logprob_dtype={dtype}")
    split = SPLIT if is_split else ()
    cfg = small_config("lsm", f"teacher.support={support}", f"teacher.top_k={top_k}", *sampling, *dtypes, *split)
    report = preflight(cfg, str(student_folder), str(teacher_folder), [], [])
    assert report.vocab_size == VOCAB
    rollout = RolloutGroup.create(cfg, NO_SHARE, [str(student_folder)])
    teacher = TeacherGroup.create(cfg, NO_SHARE, report.vocab_size, report.tokenizer_fingerprint, str(teacher_folder))

    async def ready() -> None:
        await asyncio.gather(rollout.ready(), teacher.ready())

    asyncio.run(ready())
    payload, meta = generate(rollout)
    out, _ = score(teacher, payload, meta)
    yield Scored(cfg, rollout, teacher, payload, out, student_folder, teacher_folder)
    asyncio.run(rollout.stop())
    asyncio.run(teacher.stop())
    rollout.shutdown()
    teacher.shutdown()


def plain_logprobs(folder: Path, row: RolloutRow) -> torch.Tensor:
    """Full log-softmax [T, V] at the response positions, by transformers."""
    model = load_causal_lm(str(folder), Dtype.float32)
    ids = [*row.prompt_token_ids.tolist(), *row.response_token_ids.tolist()]
    with torch.no_grad():
        logprobs: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(row.prompt_token_ids) - 1
    return logprobs[first : first + len(row.response_token_ids)]


def test_the_support_is_the_top_k_of_the_model_it_is_named_after(scored: Scored) -> None:
    top_k = scored.cfg.teacher.top_k
    folder = scored.student if scored.cfg.teacher.support == "student_topk" else scored.folder
    assert len(scored.rows) == SAMPLES * len(PROMPTS)
    for row in scored.rows:
        logprobs = plain_logprobs(folder, row)
        ids = torch.from_numpy(row.teacher_topk_ids.astype(np.int64))
        assert ids.shape == (len(row.response_token_ids), top_k)
        assert all(len(set(position)) == top_k for position in ids.tolist())
        # Best first and none left out: up to ties, these are the values of the reference's own top-K.
        torch.testing.assert_close(logprobs.gather(1, ids), logprobs.topk(top_k).values, rtol=0, atol=1e-4)


def test_the_teachers_logprobs_are_those_of_transformers(scored: Scored) -> None:
    for row in scored.rows:
        logprobs = plain_logprobs(scored.folder, row)
        ids = torch.from_numpy(row.teacher_topk_ids.astype(np.int64))
        sampled = torch.from_numpy(row.response_token_ids.astype(np.int64))
        np.testing.assert_allclose(row.teacher_topk_logprobs, logprobs.gather(1, ids), atol=1e-4)
        student = plain_logprobs(scored.student, row)
        for found, full in ((row.teacher_logprobs, logprobs), (row.behavior_logprobs, student)):
            assert found.dtype.name == scored.cfg.replay.sampled_logprob_dtype.name
            expected = full.gather(1, sampled[:, None])[:, 0]
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=scored.rounding)


def test_the_ids_are_on_the_wire_once(scored: Scored) -> None:
    batch = decode(ray.get(scored.payload))
    handed = [row.student_topk_ids for row in rollout_rows(batch)]
    assert "student_topk_ids" not in decode(ray.get(scored.scored)).schema.names
    if scored.cfg.teacher.support == "teacher_topk":
        assert all(ids is None for ids in handed)
        return
    for ids, row in zip(handed, scored.rows, strict=True):
        np.testing.assert_array_equal(ids, row.teacher_topk_ids)


def test_evaluation_beside_sampling_changes_nothing(scored: Scored) -> None:
    """Requests that ask for no ids are decoded in one batch with those that do."""
    payload, meta = generate(scored.rollout)
    completions = scored.rollout.workers[0].complete.remote(PROMPTS, 0, SAMPLES)
    again = scored_rows(decode(ray.get(score(scored.teacher, payload, meta)[0])))
    assert [len(samples) for samples in ray.get(completions)] == [SAMPLES, SAMPLES]
    for row, expected in zip(again, scored.rows, strict=True):
        np.testing.assert_array_equal(row.response_token_ids, expected.response_token_ids)
        np.testing.assert_array_equal(row.teacher_topk_ids[:, 0], expected.teacher_topk_ids[:, 0])


def test_a_batch_for_another_support_is_refused(scored: Scored) -> None:
    """The teacher knows which support its run has; the error comes through Ray as it is, in one line."""
    batch = decode(ray.get(scored.payload))
    spec = read_spec(batch.schema)
    rows = rollout_rows(batch)
    if spec.student_top_k:
        other = BatchSpec(spec.tokenizer_fingerprint)
    else:
        other = BatchSpec(spec.tokenizer_fingerprint, support="student_topk", student_top_k=1)
        rows = [dataclasses.replace(row, student_topk_ids=row.response_token_ids[:, None]) for row in rows]

    async def refused() -> None:
        await scored.teacher.result(score(scored.teacher, encode_rollouts(rows, other), None)[0], 0)

    with pytest.raises(SchemaError, match=f"metadata support .* is '{other.support}' and '{spec.support}' is expected"):
        asyncio.run(refused())


def test_a_run_trains_on_the_support_and_the_engine_has_its_weights(
    scored: Scored, learners: Learners, tmp_path: Path
) -> None:
    """The last test of these engines, as they end with trained weights."""

    async def save(groups: Any, controller: Any) -> None:
        await controller.save_student(tmp_path / "student")

    record = train(scored.cfg, Engines(scored.rollout, scored.teacher, str(scored.student), learners), after=save)
    for row in rollout_rows(decode(ray.get(generate(scored.rollout)[0]))):
        sampled = torch.from_numpy(row.response_token_ids.astype(np.int64))
        trained = plain_logprobs(tmp_path / "student", row).gather(1, sampled[:, None])[:, 0]
        np.testing.assert_allclose(row.behavior_logprobs, trained, atol=1e-4, rtol=scored.rounding)
    assert record.of("replay/uses/max") == [1, 2]
    assert all(norm > 0 for norm in record.of("learner/grad_norm"))
    mass, overlap = record.of("support/student_mass/mean")[0], record.of("support/overlap_ratio/mean")[0]
    if scored.cfg.teacher.top_k == VOCAB:
        assert mass == pytest.approx(1.0, abs=1e-5) and overlap == 1.0
    else:
        # The student's own top K is all its own; the teacher's is not.
        assert (overlap == 1.0) == (scored.cfg.teacher.support == "student_topk")
        assert 0 < mass < 1
