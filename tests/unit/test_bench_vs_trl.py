"""What `benchmarks.bench_vs_trl` counts: TRL's job is opd_ray's work, and steps, windows and clocks are as they say."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from benchmarks.bench_vs_trl import quality
from benchmarks.trl_sides import Run, Step, TrlOptions, make_config, make_job
from opd_ray.data.source import PromptSource
from opd_ray.training.sources import training_prompts

OPTIONS = TrlOptions(Path("python"), threads=2, accumulation=1, wait_policy="ACTIVE")


def run_of(*seconds: float, tokens: int = 100) -> Run:
    run = Run(spawned=5.0, begun=10.0)
    clock = run.begun
    for second in seconds:
        clock += second
        run.steps.append(Step(clock, tokens, None, {}))
    return run


def test_trl_gets_each_prompt_once_a_sample_in_the_order_in_which_opd_ray_draws_them() -> None:
    cfg = make_config(["+experiment=lsm", "scale=tiny", "num_steps=3", "seed=5"])
    job = make_job(cfg, [], 0, OPTIONS)
    drawn = list(islice(PromptSource(training_prompts(cfg.data, 5), 5), 3 * cfg.rollout.prompts_per_step))
    samples = cfg.rollout.samples_per_prompt
    assert len(job["rows"]) == 3 * cfg.trajectories_per_step
    # The tiny tokenizer has a token a character, and the template ends the problem with a newline.
    lengths = [len(row["prompt"]) for row in job["rows"]]
    assert lengths == [len(prompt.problem) + 1 for prompt in drawn for _ in range(samples)]
    assert job["lr"] == cfg.learner.lr
    assert job["evaluation"] is None


def test_tokens_per_s_are_those_of_the_window_alone() -> None:
    run = run_of(50.0, 2.0, 3.0, 50.0)
    assert run.startup_s == 5.0
    assert run.step_seconds() == [50.0, 2.0, 3.0, 50.0]
    assert run.tokens_per_s(slice(1, 3)) == pytest.approx(200 / 5)


def test_quality_is_reached_at_the_first_graded_step_that_is_good_enough_by_the_clock_of_ungraded_runs() -> None:
    graded = Run(spawned=0.0, quality={0: 0.9, 2: 0.5, 4: 0.8})
    found = quality([run_of(1.0, 1.0, 1.0, 1.0), run_of(3.0, 3.0, 3.0, 3.0)], graded, target=0.7)
    # Before training does not count, however good it is.
    assert found["step"] == 4
    assert found["training_s"] == pytest.approx((4.0 + 12.0) / 2)
    assert found["with_startup_s"] == pytest.approx(8.0 + 5.0)


def test_quality_that_is_not_reached_has_no_time() -> None:
    found = quality([run_of(1.0, 1.0)], Run(spawned=0.0, quality={2: 0.5}), target=0.7)
    assert found["step"] is None
    assert found["training_s"] is None
