"""Configuration of `opd_ray.evaluate`: `EvaluateConfig` and its parts, with the unit and the range of every field."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from opd_ray.config.checks import check_ranges
from opd_ray.config.choices import AnswerFormat, Dtype, Template
from opd_ray.config.schema import EngineConfig, RunConfig, documented, ranged
from opd_ray.data.prompts import HUB_PREFIX
from opd_ray.errors import ConfigError
from opd_ray.evaluation.grading import ProblemSet
from opd_ray.evaluation.verifier import Verification
from opd_ray.training.sources import answered_problems


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """One benchmark, a file of ``conf/benchmark/``."""

    path: str = documented("", "JSONL or parquet file, `hub:OWNER/NAME:SPLIT`, or `tiny:test`")
    file: str = documented("", "its file's name in `data_dir`, empty = NAME.jsonl")
    fields: dict[str, str] = field(
        default_factory=dict,
        metadata={"doc": "names of the columns for problem, answer, solution, id, if they differ"},
    )
    template: Template = documented(Template.boxed_chat, "template of the prompt: `completion` or one of chat")
    instruction: str = documented("", "text that follows each problem; with template=plain_chat it is all that does")
    answer_format: AnswerFormat = documented(AnswerFormat.boxed, "where the final answer stands")
    num_problems: int = ranged(0, "problems taken from the source, 0 = all", ge=0)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """One evaluation: a model, benchmarks, and how they are sampled."""

    model: str = documented("", "folder, hub id, tiny:student, tiny:teacher, or a run folder: its student")
    benchmarks: list[str] = field(default_factory=list, metadata={"doc": "names of benchmarks, in this order"})
    recompute: str = documented("", "folder or file of samples: verdicts are made again, and nothing is sampled")
    n: int = ranged(8, "samples a problem", ge=1)
    temperature: float = ranged(1.0, "sampling temperature, 0 = the most probable token", ge=0)
    top_p: float = ranged(0.9, "nucleus mass", gt=0, le=1)
    max_response_tokens: int = ranged(16384, "longest response, tokens; the end of the context ends it too", ge=1)
    template: Template | None = documented(None, "template for all benchmarks, null = their own")
    dtype: Dtype | None = documented(None, "dtype of the weights, null = as saved (half precision as bfloat16)")
    data_dir: str = documented("", "folder with the benchmarks' files, in place of the data-set hub")
    evaluations_dir: str = documented("evaluations", "folder in which the folder of results is made")
    seed: int = ranged(0, "seed of sampling", ge=0)
    deadline_s: float = ranged(1800.0, "longest time without an answer or a token from an engine, seconds", gt=0)
    max_restarts: int = ranged(3, "dead engines that are replaced; 0 = none", ge=0)
    num_verifiers: int = ranged(2, "processes that verify answers at a time", ge=1)
    verification_budget_s: float = ranged(5.0, "processor time to verify one answer, seconds", gt=0)
    progress: bool = documented(True, "show the progress line")
    rollout: EngineConfig = field(default_factory=EngineConfig)
    benchmark: dict[str, BenchmarkConfig] = field(
        default_factory=dict, metadata={"doc": "what each benchmark is, from conf/benchmark/"}
    )

    @property
    def verification(self) -> Verification:
        """How answers are verified."""
        return Verification(num_workers=self.num_verifiers, budget_s=self.verification_budget_s)


def check_evaluate_config(cfg: EvaluateConfig) -> None:
    """Raise `ConfigError` unless every field is in its range and the fields fit each other."""
    check_ranges(cfg)
    for name, benchmark in cfg.benchmark.items():
        check_ranges(benchmark, f"benchmark.{name}.")
    if cfg.recompute:
        return
    if not cfg.model:
        raise ConfigError("model is empty: give model=FOLDER, a hub id, a run folder, tiny:student or tiny:teacher")
    if not cfg.benchmarks:
        raise ConfigError(f"benchmarks is empty: name some of {_known(cfg)}")
    for name in cfg.benchmarks:
        if name not in cfg.benchmark:
            raise ConfigError(
                f"benchmarks={name} is unknown: give some of {_known(cfg)}, or add conf/benchmark/{name}.yaml"
            )
    if len(set(cfg.benchmarks)) < len(cfg.benchmarks):
        raise ConfigError(f"benchmarks={cfg.benchmarks} names one twice: name each once")
    if cfg.temperature == 0 and cfg.n > 1:
        raise ConfigError(f"n={cfg.n} with temperature=0, which gives the same answer each time: give n=1")


def _known(cfg: EvaluateConfig) -> str:
    return ", ".join(sorted(cfg.benchmark)) or "none"


def problem_sets(cfg: EvaluateConfig) -> list[ProblemSet]:
    """The problems of every benchmark; raises `DataError` where one cannot be read or has no usable answer."""
    return [_problem_set(cfg, name, cfg.benchmark[name]) for name in cfg.benchmarks]


def _problem_set(cfg: EvaluateConfig, name: str, part: BenchmarkConfig) -> ProblemSet:
    path = part.path
    if cfg.data_dir and path.startswith(HUB_PREFIX):
        path = str(Path(cfg.data_dir) / (part.file or f"{name}.jsonl"))
    if not path:
        raise ConfigError(f"benchmark.{name}.path is empty: give a file or hub:OWNER/NAME:SPLIT")
    problems = answered_problems(path, part.fields, part.num_problems, part.answer_format, f"benchmark.{name}")
    if part.instruction:
        problems = [replace(prompt, problem=f"{prompt.problem}\n\n{part.instruction}") for prompt in problems]
    return ProblemSet(name, problems, part.answer_format, cfg.template or part.template)


def engine_config(
    cfg: EvaluateConfig, model_path: str, dtype: Dtype, max_model_tokens: int, max_response_tokens: int
) -> RunConfig:
    """The config of a run's rollout group that samples as `cfg` says; prompt and response have `max_model_tokens`."""
    run = RunConfig(seed=cfg.seed, deadline_s=cfg.deadline_s)
    run.student.path, run.student.dtype = model_path, dtype
    run.faults.max_restarts = cfg.max_restarts
    run.data.max_prompt_tokens = max_model_tokens - max_response_tokens
    run.rollout.max_response_tokens = run.evaluation.max_response_tokens = max_response_tokens
    run.evaluation.temperature, run.evaluation.top_p = cfg.temperature, cfg.top_p
    for key in fields(EngineConfig):
        setattr(run.rollout, key.name, getattr(cfg.rollout, key.name))
    return run
