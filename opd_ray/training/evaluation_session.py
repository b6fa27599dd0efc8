"""One evaluation from its checked config to its table: Ray, engines, benchmarks one by one, clean-up."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_ray.cluster.ray_runtime import cluster_size, started_ray, stop_groups
from opd_ray.config.schema import RunConfig
from opd_ray.errors import OpdError
from opd_ray.evaluation.grading import ProblemSet
from opd_ray.evaluation.samples import SamplesHeader, write_samples
from opd_ray.planning.placement import plan_resources
from opd_ray.report.benchmark_table import benchmark_table
from opd_ray.rollout.group import RolloutGroup
from opd_ray.telemetry.progress import ProgressLine
from opd_ray.training.evaluate_config import EvaluateConfig, engine_config, problem_sets
from opd_ray.training.evaluated_model import JudgedModel, Results, judged_model
from opd_ray.training.evaluator import Steps, judge
from opd_ray.training.interrupts import end_on_sigterm, run_interruptible
from opd_ray.training.model_limits import ModelLimits, model_limits
from opd_ray.training.summary import shown


def run_evaluation(cfg: EvaluateConfig, config_yaml: str) -> dict[str, Any]:
    """Judge the model; returns the summary that was written, raises `OpdError`.

    Nothing is left of an evaluation that ends before its first benchmark does.
    """
    model = judged_model(cfg.model)
    session = EvaluationSession(cfg, model, problem_sets(cfg), config_yaml)
    with started_ray():
        return run_interruptible(session.run())


@dataclass(slots=True)
class EvaluationSession:
    """One model's engines and results."""

    cfg: EvaluateConfig
    model: JudgedModel
    sets: Sequence[ProblemSet]
    config_yaml: str
    summary: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> dict[str, Any]:
        """All benchmarks; returns the summary."""
        end_on_sigterm()
        line = ProgressLine(sys.stderr, self.cfg.progress)
        limits = await model_limits(self.model.path, self.sets, self.cfg.deadline_s)
        engines_cfg = self._engine_config(limits)
        share = plan_resources(engines_cfg, *cluster_size()).rollout
        results = Results(self.model, self.cfg.evaluations_dir)
        engines: RolloutGroup | None = None
        try:
            results.write_config(self.config_yaml)
            self._say(f"starting {self.cfg.rollout.num_engines} engine(s) for {self.model.name}")
            engines = RolloutGroup.create(engines_cfg, share, [self.model.path] * self.cfg.rollout.num_engines)
            await engines.ready()
            for part in self.sets:
                await self._judge(engines, part, engines_cfg, results, line)
            results.finish(self.summary)
        except (OpdError, asyncio.CancelledError) as error:
            line.end()
            if results.fail(str(error) if isinstance(error, OpdError) else None):
                self._say(f"note: finished benchmarks are in {shown(results.shown)}")
            raise
        finally:
            line.end()
            if engines is not None:
                await stop_groups([engines])
            results.close()
        where = shown(results.shown)
        sys.stdout.write(f"\n{benchmark_table(self.summary['benchmarks'])}\n\nsamples and summary: {where}\n")
        return self.summary

    def _engine_config(self, limits: ModelLimits) -> RunConfig:
        cfg = self.cfg
        # An engine ends a response where the context ends, so that a long prompt shortens its own responses only.
        longest = min(cfg.max_response_tokens, limits.context - limits.shortest_prompt)
        max_model_tokens = min(limits.context, limits.longest_prompt + longest)
        if limits.longest_prompt + cfg.max_response_tokens > limits.context:
            self._say(
                f"note: the context of {limits.context} tokens ends some responses before max_response_tokens="
                f"{cfg.max_response_tokens}: prompts have {limits.shortest_prompt} to {limits.longest_prompt} tokens"
            )
        self.summary = {
            "model": cfg.model,
            "path": self.model.path,
            "n": cfg.n,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "max_response_tokens": longest,
            "dtype": (cfg.dtype or limits.dtype).name,
            "seed": cfg.seed,
            "benchmarks": {},
        }
        return engine_config(cfg, self.model.path, cfg.dtype or limits.dtype, max_model_tokens, longest)

    async def _judge(
        self, engines: RolloutGroup, part: ProblemSet, engines_cfg: RunConfig, results: Results, line: ProgressLine
    ) -> None:
        cfg = self.cfg
        steps = Steps(
            sampled=lambda done, total: line.show(f"{part.name}: sampling", done, total, "answers"),
            verified=lambda done, total: line.show(f"{part.name}: verifying", done, total, "answers"),
        )
        graded, result = await judge(engines, part, cfg.n, cfg.verification, steps)
        header = SamplesHeader(
            model=cfg.model,
            policy_version=None,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_response_tokens=engines_cfg.evaluation.max_response_tokens,
            answer_format={part.name: part.answer_format},
            seed=cfg.seed,
        )
        path = results.path_of(f"{part.name}.parquet")
        await asyncio.to_thread(write_samples, path, {part.name: graded}, header)
        self.summary["benchmarks"][part.name] = result.as_dict(every_k=True)
        results.write_summary(self.summary)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"opd_ray: {text}\n")
        sys.stderr.flush()
