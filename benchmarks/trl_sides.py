"""The two sides of `bench_vs_trl`: each runs as its own process, from the same config, and comes back as a `Run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from benchmarks.trl_cpu_time import CpuClock
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.evaluation.grading import Completion
from opd_ray.evaluation.scoring import score
from opd_ray.main import conf_dir, to_run_config
from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer
from opd_ray.training.sources import evaluation_problems, model_path, training_prompts
from opd_ray.types import Prompt

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("trl_worker.py")
OUR_METRICS = (
    "pipeline/wait_share/",
    "pipeline/bottleneck/",
    "time/",
    "rollout/tokens_per_s",
    "teacher/tokens_per_s",
    "learner/tokens_per_s",
    "learner/time/",
    "learner/tokens/padding_share",
    "learner/tokens/computed_share",
    "replay/staleness/",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the wall clock at its end, and the response tokens in its loss."""

    time: float
    tokens: int
    loss: float | None
    details: Mapping[str, float]


@dataclass(slots=True)
class Run:
    """What one process did. `spawned` and `begun` are wall clocks: of the process, of its first step."""

    spawned: float
    begun: float = 0.0
    steps: list[Step] = field(default_factory=list)
    quality: dict[int, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    clock: CpuClock | None = None

    @property
    def startup_s(self) -> float:
        """From the process's start to its first step's."""
        return self.begun - self.spawned

    def step_seconds(self) -> list[float]:
        """Wall seconds of each step, all that lies between two steps included."""
        ends = [self.begun, *(step.time for step in self.steps)]
        return [after - before for before, after in pairwise(ends)]

    def tokens_per_s(self, window: slice) -> float:
        """Trained tokens over wall seconds, in the steps of `window`."""
        return sum(step.tokens for step in self.steps[window]) / sum(self.step_seconds()[window])

    def cpu_s_per_step(self, window: slice) -> dict[str, float]:
        """Mean CPU seconds of a step in `window`, by process: hardly disturbed by other work on the machine."""
        if self.clock is None:
            return {}
        ends = [self.begun, *(step.time for step in self.steps)]
        first, last, _ = window.indices(len(self.steps))
        seconds = self.clock.seconds_between(ends[first], ends[last])
        return {role: value / (last - first) for role, value in seconds.items() if value >= 0.01}

    def seconds_to(self, step: int) -> float:
        """Training seconds up to the end of optimizer step `step`."""
        return self.steps[step - 1].time - self.begun if step else 0.0


def make_config(overrides: Sequence[str]) -> RunConfig:
    """The config that ``python -m opd_ray.main`` would make of the overrides."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(compose("run", list(overrides)))


# ---- opd_ray ------------------------------------------------------------------------------------------------


def run_ours(overrides: Sequence[str], folder: Path, evaluate_every: int) -> Run:
    """One run of the real command; ``evaluate_every=0`` leaves evaluation out, as it stops training for a while."""
    command = [
        sys.executable,
        "-m",
        "opd_ray.main",
        *overrides,
        f"runs_dir={folder}",
        "logger=none",
        "resume=never",
        "telemetry.progress=false",
        *([f"evaluation.every={evaluate_every}"] if evaluate_every else ["evaluation.path=''"]),
    ]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1"}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    run = Run(spawned=time.time())
    clock = _call(command, folder, os.environ | quiet | path)
    found = next(file.parent for file in folder.glob("*/summary.json"))
    summary = json.loads((found / "summary.json").read_text())
    rows = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "evaluation/avg_at_8" in row:
            run.quality[row["step"]] = row["evaluation/avg_at_8"]
        if "learner/loss/mean" in row:
            run.begun = run.begun or row["time"] - row["time/step_s"]
            details = {key: row[key] for key in row if key.startswith(OUR_METRICS)}
            run.steps.append(Step(row["time"], int(row["learner/tokens/loss"]), row["learner/loss/mean"], details))
    run.clock = clock
    run.about = {"ledger": summary["ledger"], "teacher": (summary["eval"]["teacher"] or {}).get("avg_at_8")}
    return run


# ---- TRL ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrlOptions:
    """How TRL's process is run: what makes it fastest, and does not change what it computes.

    `wait_policy` is OpenMP's: ``ACTIVE`` threads spin while they wait, which is a little faster on an idle machine and
    tens of times slower on one that has other work.
    """

    python: Path
    threads: int
    accumulation: int
    wait_policy: str


def run_trl(options: TrlOptions, cfg: RunConfig, folder: Path, evaluate_every: int) -> Run:
    """One GKD run of the same config in TRL's environment."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = evaluation_problems(cfg) if evaluate_every else []
    job_file, out_file = folder / "job.json", folder / "out.jsonl"
    job_file.write_text(json.dumps(make_job(cfg, problems, evaluate_every, options)))
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": options.wait_policy,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    run = Run(spawned=time.time())
    clock = _call([str(options.python), str(WORKER), str(job_file), str(out_file)], folder, os.environ | environment)
    run.clock = clock
    # Evaluation stands between steps; the clock leaves it out.
    paused = 0.0
    for row in map(json.loads, out_file.read_text().splitlines()):
        if row["kind"] == "begin":
            # The evaluation before training is no part of the start-up.
            run.spawned, paused = run.spawned + paused, 0.0
            run.begun = row["time"]
        elif row["kind"] == "step":
            details = {"generate_s": row["generate_s"], "padded_tokens": row["padded_tokens"]}
            run.steps.append(Step(row["time"] - paused, row["tokens"], row["loss"], details))
        elif row["kind"] == "evaluation":
            paused += row["wall_s"]
            completions = [[Completion(**sample) for sample in samples] for samples in row["completions"]]
            run.quality[row["step"]] = score(problems, completions, cfg.evaluation.answer_format).avg_at_n
        else:
            run.about = {key: row[key] for key in ("versions", "settings", "environment")}
    return run


def make_job(cfg: RunConfig, problems: Sequence[Prompt], evaluate_every: int, options: TrlOptions) -> dict[str, Any]:
    """Everything that TRL's side is told; prompts come as the token ids that opd_ray's engines get, in its order."""
    student = model_path(cfg.student.path)
    tokenizer: Any = load_tokenizer(student)
    encoder = PromptTokenizer(tokenizer, cfg.data.template, student)
    source = PromptSource(training_prompts(cfg.data, cfg.seed), cfg.seed, cfg.data.epochs or None)
    rows = []
    for prompt in islice(source, cfg.num_steps * cfg.rollout.prompts_per_step):
        # With lmbda=1 the response is never trained on, but TRL wants one and divides the loss by its length.
        response = [*tokenizer(prompt.solution)["input_ids"], tokenizer.eos_token_id]
        row = {"prompt": encoder.encode(prompt), "response": response[: cfg.rollout.max_response_tokens]}
        rows += [row] * cfg.rollout.samples_per_prompt
    evaluation = {
        "every": evaluate_every,
        "prompts": [encoder.encode(problem) for problem in problems],
        "samples": cfg.evaluation.samples_per_problem,
        "max_new_tokens": cfg.evaluation.max_response_tokens,
        "temperature": cfg.evaluation.temperature,
        "top_p": cfg.evaluation.top_p,
        "seed": cfg.seed,
    }
    learner = cfg.learner
    return {
        "student": student,
        "teacher": model_path(cfg.teacher.path),
        "rows": rows,
        "batch": cfg.trajectories_per_step,
        "accumulation": options.accumulation,
        "max_new_tokens": cfg.rollout.max_response_tokens,
        "max_length": cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens,
        "temperature": cfg.rollout.temperature,
        "num_steps": cfg.num_steps,
        "lr": learner.lr,
        "lr_schedule": learner.lr_schedule.name,
        "warmup_steps": learner.warmup_steps,
        "weight_decay": learner.weight_decay,
        "beta2": learner.beta2,
        "grad_clip": learner.grad_clip,
        "seed": cfg.seed,
        "threads": options.threads,
        "evaluation": evaluation if evaluate_every else None,
    }


def _call(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> CpuClock:
    """Run to its end with its output in a file; a failure ends the benchmark with the file's last lines."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        clock = CpuClock(process.pid)
        process.wait()
        clock.stop()
    if process.returncode:
        raise SystemExit("\n".join([*log.read_text().splitlines()[-15:], f"{command[:3]} failed: see {log}"]))
    return clock
