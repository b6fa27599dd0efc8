"""The learner's step equals a plain one-process step, whatever the ranks, microbatches and ZeRO stage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from opd_ray.actors.learner import LearnerGroup, LearnerSpec, LearnerWorker
from opd_ray.actors.step_report import step_metrics
from opd_ray.actors.tokenization import load_tokenizer, newline_token_mask
from opd_ray.actors.weights import unpack_bucket
from opd_ray.config import GateConfig, GateKind, LearnerConfig, ObjectiveConfig, ObjectiveKind
from opd_ray.placement import Share
from opd_ray.replay.codec import decode
from opd_ray.replay.cohort import SampledBatch
from opd_ray.replay.rows import scored_rows
from tests.integration.batches import reference_step, scored_payload, stale_infos

pytestmark = pytest.mark.integration

LENGTHS = [70, 9, 33, 128, 1, 90, 64]


async def one_step(spec: LearnerSpec, num_ranks: int, budget: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    group = LearnerGroup("learner", 120.0)
    group.tokens_per_microbatch = budget
    specs = []
    for rank in range(num_ranks):
        values = {name: getattr(spec, name) for name in spec.__slots__}
        specs.append((LearnerSpec(**values | {"name": f"learner-{rank}", "rank": rank, "num_ranks": num_ranks}),))
    group.start(LearnerWorker, Share(0.0, 0.0, 1), specs, {})
    try:
        await group.ready()
        payload = scored_payload(LENGTHS, seed=3)
        infos = stale_infos(payload)
        batch = SampledBatch((ray.put(payload),), tuple((0, i) for i in range(len(infos))), infos)
        metrics = step_metrics(await group.train_step(batch), measured=spec.gate.kind is not GateKind.off)
        _, buckets = await group.export(1)
        weights = {n: t.clone() for ref in buckets for n, t in unpack_bucket(await ref)}
        return metrics, weights
    finally:
        await group.stop()
        group.shutdown()


CASES = [
    (ObjectiveKind.lsm, GateKind.block, 1, 2, 256),
    (ObjectiveKind.lsm, GateKind.newline, 2, 2, 256),
    (ObjectiveKind.opd, GateKind.block, 3, 2, 256),
    (ObjectiveKind.lsm, GateKind.off, 1, 1, 100),
]


@pytest.mark.parametrize(("objective", "gate", "zero_stage", "num_ranks", "budget"), CASES)
@pytest.mark.usefixtures("ray_cluster")
def test_step_equals_one_process(
    student_folder: Path, objective: ObjectiveKind, gate: GateKind, zero_stage: int, num_ranks: int, budget: int
) -> None:
    learner = LearnerConfig(zero_stage=zero_stage, lr=1e-3, grad_clip=0.05, weight_decay=0.1)
    spec = LearnerSpec(
        name="",
        rank=0,
        num_ranks=num_ranks,
        model_path=str(student_folder),
        learner=learner,
        objective=ObjectiveConfig(kind=objective),
        gate=GateConfig(kind=gate, block_size=16, min_span=4, max_span=32),
        reuse=2,
        num_steps=10,
        publish_dtype="float32",
        threads=1,
    )
    metrics, weights = asyncio.run(one_step(spec, num_ranks, budget))
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    newlines = torch.from_numpy(newline_token_mask(load_tokenizer(str(student_folder)), model.config.vocab_size))
    rows = scored_rows(decode(scored_payload(LENGTHS, seed=3)))
    loss, norm = reference_step(model, rows, spec.objective, spec.gate, learner, newlines)
    assert metrics["learner/loss/mean"] == pytest.approx(loss, rel=1e-5)
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > learner.grad_clip, "the case must exercise clipping"
    assert set(weights) == set(before) | {"lm_head.weight"}, "a tied head must be published by its own name too"
    moved = 0.0
    for name, parameter in model.named_parameters():
        difference = (weights[name] - parameter.detach()).abs()
        # AdamW's first step is lr * sign(gradient): only gradients of nearly zero may land elsewhere.
        assert float(difference.max()) < 0.05 * learner.lr, name
        assert float(difference.mean()) < 1e-4 * learner.lr, name
        moved = max(moved, float((parameter.detach() - before[name]).abs().max()))
    assert moved > 1e-4, "the step must have moved the weights"
