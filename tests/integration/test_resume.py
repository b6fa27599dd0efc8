"""Exact resume and the synchronous reference, with the real engine, teacher and learner on random-weight models."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.learner.step_report import step_metrics
from opd_ray.replay.batch import SampledBatch
from opd_ray.run.checkpoint import read_checkpoint
from opd_ray.training.sources import training_prompts
from opd_ray.types import RolloutRequest, SampleInfo
from tests.integration.runs import Engines, small_config, train

pytestmark = pytest.mark.integration


def test_resumed_losses_are_the_unbroken_runs(engines: Engines, tmp_path: Path) -> None:
    """From checkpoints between two uses of a batch, and between two batches; a gate that remembers drift."""
    cfg = small_config(
        "lsm_block64_tau_quantile", "num_steps=6", "learner.num_ranks=2", "checkpoint.every=1", "checkpoint.keep=6"
    )
    unbroken = train(cfg, engines, folder=tmp_path / "unbroken")
    for version in (1, 4):
        folder = tmp_path / f"resumed-{version}"
        checkpoint = f"checkpoints/step-{version:06d}"
        shutil.copytree(tmp_path / "unbroken" / checkpoint, folder / checkpoint)
        resumed = train(cfg, engines, folder=folder, checkpoint=read_checkpoint(folder / checkpoint))
        for key in ("learner/loss/mean", "learner/grad_norm", "gate/value/mean", "gate/tau"):
            assert resumed.of(key) == unbroken.of(key)[version:], (version, key)
        assert resumed.trajectory_ids == unbroken.trajectory_ids[version:]
        assert resumed.ledger == unbroken.ledger


def test_an_overlapping_run_resumes_with_what_was_in_flight(engines: Engines, tmp_path: Path) -> None:
    cfg = small_config("lsm_block64", "num_steps=8", "replay.max_staleness=2", "checkpoint.every=3")
    first = train(cfg, engines, folder=tmp_path)
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000006")
    resumed = train(cfg, engines, checkpoint=checkpoint)
    assert resumed.of("step") == [7, 8]
    assert resumed.ledger == first.ledger
    assert max(resumed.of("replay/staleness/max")) <= 3
    uses = [trajectory_id for batch in (*first.trajectory_ids[:6], *resumed.trajectory_ids) for trajectory_id in batch]
    assert {uses.count(trajectory_id) for trajectory_id in uses} == {2}


async def _synchronous(cfg: RunConfig, engines: Engines) -> list[float]:
    """Sample, score, step, publish, one after the other: no store, no loops."""
    learner = engines.learners.create(cfg, engines.student_path)
    source = PromptSource(training_prompts(cfg.data, cfg.seed), cfg.seed)
    samples, losses = cfg.rollout.samples_per_prompt, []
    engine, teacher = engines.rollout.workers[0], engines.teacher.workers[0]
    try:
        await learner.ready()
        for step in range(cfg.num_steps):
            await engines.rollout.publish(*await learner.export(step))
            prompts = tuple(next(source) for _ in range(cfg.rollout.prompts_per_step))
            first = step * cfg.trajectories_per_step
            trajectory_ids = tuple(range(first, first + cfg.trajectories_per_step))
            payload, meta = engine.generate.options(num_returns=2).remote(
                RolloutRequest(prompts, trajectory_ids, samples)
            )
            scored, meta = teacher.score.options(num_returns=2).remote(payload, await meta, prompts)
            found = (await meta).trajectories
            infos = [SampleInfo(t.trajectory_id, 0, 1, 0.0, t.num_prompt_tokens, t.num_response_tokens) for t in found]
            batch = SampledBatch((scored,), tuple((0, t.row) for t in found), tuple(infos))
            reports = await learner.train_step(batch, step)
            losses.append(float(step_metrics(reports, is_gated=True, min_support_mass=0.0)["learner/loss/mean"]))  # type: ignore[arg-type]
        return losses
    finally:
        await learner.stop()
        learner.shutdown()


def test_a_bound_of_zero_gives_the_synchronous_losses(engines: Engines) -> None:
    cfg = small_config("lsm_block64", "num_steps=5", "replay.reuse=1", "replay.max_staleness=0")
    assert train(cfg, engines).of("learner/loss/mean") == asyncio.run(_synchronous(cfg, engines))
