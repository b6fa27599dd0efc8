"""Sweeps: W&B's own code takes what is made of them, Hydra draws the same grid, and a multirun does nothing twice."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from wandb import wandb_agent
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from opd_ray.config.choices import AnswerFormat
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ActorError, ConfigError
from opd_ray.evaluation import Completion, score
from opd_ray.main import Composed, command, composed, conf_dir, multirun_name, to_run_config, with_plus
from opd_ray.run.folder import CONFIG_FILE, RunFolder
from opd_ray.run.resume import finished_run
from opd_ray.training.evaluator import evaluation_metrics
from opd_ray.types import Prompt
from tests.unit.isolated import run_isolated

ROOT = Path(__file__).resolve().parents[2]
NUM_RUNS = {
    "six_variants": 30,
    "gate_loss_staleness": 150,
    "block_size_tau": 125,
    "controls_baselines": 60,
    "study": 180,
    "study_controls": 25,
}
by_name = pytest.mark.parametrize("name", list(NUM_RUNS))


@cache
def wandb_text(name: str) -> str:
    """What the command prints."""
    command_line = [sys.executable, "-m", "launch.wandb_sweep", name]
    return subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def wandb_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(wandb_text(name))
    return config


def grid(name: str) -> list[dict[str, Any]]:
    """Every point of a W&B grid sweep, as parameter to value."""
    parameters = wandb_config(name)["parameters"]
    values = [spec["values"] if "values" in spec else [spec["value"]] for spec in parameters.values()]
    return [dict(zip(parameters, point, strict=True)) for point in itertools.product(*values)]


@pytest.fixture
def run_config() -> Iterator[Callable[..., Any]]:
    """Composes ``conf/run.yaml``."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    OmegaConf.register_new_resolver("multirun_name", multirun_name, use_cache=True, replace=True)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        yield lambda *overrides, **options: compose("run", list(overrides), **options)


def hydra_sweep(run_config: Callable[..., Any], name: str) -> Any:
    """Hydra's part of the config of ``+sweep=NAME``."""
    return run_config(f"+sweep={name}", return_hydra_config=True).hydra


# ---- W&B ----------------------------------------------------------------------------------------------------


WANDBS_SWEEPS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from sweeps.config.schema import sweep_config_jsonschema
from sweeps.grid_search import grid_search_next_runs

points = {}
for name, config in json.load(sys.stdin).items():
    runs = [run for run in grid_search_next_runs([], config, n=1000) if run is not None]
    points[name] = [{key: value["value"] for key, value in run.config.items()} for run in runs]
print(json.dumps({"schema": sweep_config_jsonschema, "points": points}))
"""


@pytest.fixture(scope="module")
def wandbs_sweeps() -> dict[str, Any]:
    """The schema of W&B's package `sweeps`, and the points that its grid search draws of each sweep."""
    found: dict[str, Any] = json.loads(run_isolated(WANDBS_SWEEPS, json.dumps({n: wandb_config(n) for n in NUM_RUNS})))
    return found


@by_name
def test_wandbs_own_schema_takes_each_sweep(name: str, wandbs_sweeps: dict[str, Any]) -> None:
    validator = jsonschema.Draft7Validator(wandbs_sweeps["schema"])
    assert [error.message for error in validator.iter_errors(wandb_config(name))] == []
    wrongs: list[dict[str, Any]] = [
        {"method": "all"},
        {"parameter": {}},
        {"parameters": {"seed": {"value": 1, "values": [1]}}},
    ]
    for wrong in wrongs:
        assert list(validator.iter_errors(wandb_config(name) | wrong)), wrong


def test_wandb_reads_what_is_piped_to_it(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(wandb_text("study"), encoding="utf-8")
    assert load_sweep_config(str(path)) == wandb_config("study")


def test_a_sweep_that_does_not_exist_is_refused_by_name() -> None:
    command_line = [sys.executable, "-m", "launch.wandb_sweep", "six_variant"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'six_variant'" in done.stderr and "six_variants" in done.stderr


@by_name
def test_wandb_draws_the_points_that_are_counted_here(name: str, wandbs_sweeps: dict[str, Any]) -> None:
    assert sorted(sorted(map(str, point.items())) for point in wandbs_sweeps["points"][name]) == sorted(
        sorted(map(str, point.items())) for point in grid(name)
    )


class RecordedProcess:
    """Stands in for the process that an agent starts."""

    commands: list[list[str]] = []
    environs: list[dict[str, str]] = []

    def __init__(self, command: list[str], env: dict[str, str], forward_signals: bool) -> None:
        self.commands.append(command)
        self.environs.append(env)


@pytest.fixture
def agent_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[list[str]]]]:
    """The command lines that W&B's agent makes of a sweep's points."""
    monkeypatch.chdir(tmp_path)
    # The agent sets these for its children.
    for key in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(key, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.setattr(wandb_agent, "AgentProcess", RecordedProcess)

    def make(name: str, points: list[dict[str, Any]]) -> list[list[str]]:
        RecordedProcess.commands, RecordedProcess.environs = [], []
        config = wandb_config(name)
        agent: Any = wandb_agent.Agent(api=None, queue=None, sweep_id="sweep123")
        agent._sweep_command = config["command"]
        for number, point in enumerate(points):
            args = {key: {"value": value} for key, value in point.items()}
            agent._command_run({"run_id": f"run{number}", "program": config["program"], "args": args})
        return RecordedProcess.commands

    yield make
    for key in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        os.environ.pop(key, None)


@by_name
def test_an_agent_starts_the_command_and_every_value_makes_a_valid_run(
    name: str, agent_commands: Callable[..., list[list[str]]], run_config: Callable[..., Any]
) -> None:
    points = grid(name)
    assert len(points) == NUM_RUNS[name]
    # Every value of every parameter at least once.
    values = {key: list(dict.fromkeys(point[key] for point in points)) for key in points[0]}
    chosen = [{key: v[i % len(v)] for key, v in values.items()} for i in range(max(map(len, values.values())))]
    commands = agent_commands(name, chosen)
    for point, line in zip(chosen, commands, strict=True):
        assert line[:4] == ["/usr/bin/env", "python", "-m", "opd_ray.main"]
        found = run_config(*with_plus(line[4:]))
        cfg = to_run_config(found)
        assert cfg.experiment == point["experiment"]
        assert cfg.runs_dir == f"runs/multirun/{name}"
        for key, value in point.items():
            if key != "experiment":
                assert OmegaConf.select(found, key) == value
    assert [env["WANDB_RUN_ID"] for env in RecordedProcess.environs] == [f"run{i}" for i in range(len(chosen))]


AGENT_RUN = """
import json, sys
from pathlib import Path
from opd_ray.config.choices import WandbMode
from opd_ray.telemetry import WandbSink

sink = WandbSink(WandbMode.auto, "opd_ray", "lsm-tiny-s3", {"seed": 3, "gate": {"tau": 1.0}}, Path(sys.argv[1]))
run = sink._run
print(json.dumps([run.id, run.name, run.sweep_id, dict(run.config)]))
sink.close()
"""


def test_a_run_that_an_agent_starts_belongs_to_its_sweep(
    agent_commands: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    agent_commands("six_variants", [{"experiment": "lsm", "seed": 3}])
    env = RecordedProcess.environs[0] | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-c", AGENT_RUN, str(tmp_path / "run")]
    out = subprocess.run(command_line, env=env, capture_output=True, text=True, check=True).stdout
    run_id, name, sweep_id, config = json.loads(out.splitlines()[-1])
    # The server knows the run by the agent's id: with one of our own the sweep would wait for it for ever.
    assert (run_id, name, sweep_id) == ("run0", "lsm-tiny-s3", "sweep123")
    assert config == {"experiment": "lsm", "seed": 3, "gate": {"tau": 1.0}}


def test_the_metric_of_the_sweeps_is_logged_at_every_scale(run_config: Callable[..., Any]) -> None:
    wanted = {wandb_config(name)["metric"]["name"] for name in NUM_RUNS}
    for scale in sorted(path.stem for path in (conf_dir() / "scale").glob("*.yaml")):
        cfg = to_run_config(run_config(f"scale={scale}"))
        n = cfg.evaluation.samples_per_problem
        problem = Prompt(id="p", problem="1+1=", answer="2")
        result = score([problem], [[Completion("#2", 2, "stop")] * n], AnswerFormat.tiny)
        assert wanted <= set(evaluation_metrics(result))


# ---- Hydra --------------------------------------------------------------------------------------------------


def test_each_sweep_is_tried_here() -> None:
    assert {path.stem for path in (conf_dir() / "sweep").glob("*.yaml")} == set(NUM_RUNS)


@by_name
def test_hydras_multirun_is_the_same_grid_in_the_same_folder(name: str, run_config: Callable[..., Any]) -> None:
    settings = hydra_sweep(run_config, name)
    overrides = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in settings.sweeper.params.items()])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    expected = [with_plus([f"{key}={value}" for key, value in point.items()]) for point in grid(name)]
    assert sorted(map(sorted, jobs)) == sorted(map(sorted, expected))
    assert f"runs_dir={settings.sweep.dir}" in wandb_config(name)["command"]


def test_the_folder_of_a_multirun_is_named_after_its_arguments() -> None:
    assert multirun_name(["+experiment=opd,lsm", "seed=0,1"]) == "experiment_opd_lsm-seed_0_1"
    assert multirun_name(["+experiment=lsm", "runs_dir=/a/b", "resume=never"]) == "experiment_lsm"
    assert multirun_name([]) == "default"
    for odd in ("data.path=/a/../b c", "gate={kind: block}", "experiment=lsm" * 40):
        name = multirun_name([odd])
        assert "/" not in name and " " not in name and 0 < len(name.encode()) <= 100
    long = ["seed=" + ",".join(map(str, range(80)))]
    assert multirun_name(long) != multirun_name([*long, "num_steps=1"])


Act = Callable[[Composed[RunConfig]], None]


@pytest.fixture
def multirun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Types a command with `act` in the place of training; the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def type_command(act: Act, *arguments: str) -> int:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["opd_ray", *arguments])
        try:
            command("run", RunConfig, act)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            HydraConfig.instance().cfg = None
        return 0

    return type_command


def test_jobs_share_a_folder_and_one_that_fails_does_not_end_the_others(
    multirun: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def act(found: Composed[RunConfig]) -> None:
        cfg = found.cfg
        assert found.values["runs_dir"] == yaml.safe_load(found.yaml)["runs_dir"] == cfg.runs_dir
        if cfg.seed == 1:
            raise ActorError("rollout-0 is lost: start again")
        if cfg.seed == 2:
            raise RuntimeError("a mistake")
        done.append((cfg.experiment, cfg.seed, cfg.runs_dir, found.job))

    assert multirun(act, "-m", "+experiment=opd", "seed=0,1,2,3") == 1
    folder = "runs/multirun/experiment_opd-seed_0_1_2_3"
    assert done == [("opd", seed, folder, f"+experiment=opd seed={seed}") for seed in (0, 3)]
    err = capsys.readouterr().err
    assert err.count("opd_ray: error: job 2 failed: rollout-0 is lost: start again\n") == 1
    assert "opd_ray: error: job 3 failed: RuntimeError: a mistake\n" in err and "Traceback" in err
    assert err.splitlines()[-1] == (
        "opd_ray: error: 2 of 4 jobs failed: the same command skips what is complete and runs the rest"
    )
    assert [path.name for path in (tmp_path / folder).iterdir()] == ["multirun.yaml"]


def test_a_multirun_without_a_failure_ends_well_and_a_named_folder_is_kept(multirun: Callable[..., int]) -> None:
    folders = []
    code = multirun(
        lambda found: folders.append(found.cfg.runs_dir), "-m", "+sweep=six_variants", "seed=7", "runs_dir=here"
    )
    assert (code, folders) == (0, ["here/multirun/six_variants"] * 6)


def test_ctrl_c_ends_all_jobs(multirun: Callable[..., int]) -> None:
    started = []

    def act(found: Composed[RunConfig]) -> None:
        started.append(found.cfg.seed)
        raise KeyboardInterrupt

    assert multirun(act, "-m", "+experiment=opd", "seed=0,1") == 130
    assert started == [0]


def test_nothing_starts_when_one_job_cannot_be_composed(multirun: Callable[..., int]) -> None:
    started: list[int] = []
    assert multirun(lambda found: started.append(1), "-m", "+experiment=opd,none", "seed=0") == 1
    assert multirun(lambda found: started.append(1), "-m", "seed=0,x") == 1
    assert started == []


def test_outside_a_multirun_there_is_no_job_and_an_error_ends_the_command(multirun: Callable[..., int]) -> None:
    jobs = []

    def act(found: Composed[RunConfig]) -> None:
        jobs.append((found.job, found.cfg.runs_dir))
        raise ConfigError("seed=0 is wrong: give another")

    assert multirun(act, "+experiment=opd") == 1
    assert multirun(act, "experiment=opd", "runs_dir=there") == 1
    assert jobs == [(None, "runs"), (None, "there")]


def test_a_sweep_without_its_flag_is_refused(multirun: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert multirun(lambda found: pytest.fail("it ran"), "+sweep=six_variants") == 1
    assert capsys.readouterr().err == "opd_ray: error: +sweep=six_variants is many runs: add -m\n"


# ---- what is complete is skipped ----------------------------------------------------------------------------


def a_run(found: Composed[RunConfig], status: str) -> Path:
    """A run folder as a run of `found` leaves it."""
    folder = RunFolder.create(found.cfg.runs_dir, found.cfg.run_name)
    folder.write_text(CONFIG_FILE, found.yaml)
    folder.mark(status)  # type: ignore[arg-type]
    folder.close()
    return folder.path


def test_a_complete_run_of_the_same_config_is_found(run_config: Callable[..., Any], tmp_path: Path) -> None:
    def of(*overrides: str) -> Composed[RunConfig]:
        return composed(run_config("+experiment=lsm_block64", f"runs_dir={tmp_path}", *overrides))

    def found(*overrides: str) -> Path | None:
        run = of(*overrides)
        return finished_run(run.cfg, run.values)

    assert found() is None
    a_run(of(), "interrupted")
    a_run(of("gate.tau=2"), "failed")
    assert found() is None
    complete = a_run(of("learner.lr=1e-7", "objective.mask_rules=[special_tokens]"), "finished")
    assert found() is None
    same = ("learner.lr=1e-7", "objective.mask_rules=[special_tokens]")
    assert found(*same) == complete
    # Where and how a run is watched makes no other run of it; what is trained does.
    assert found(*same, "logger=none", "deadline_s=7", "checkpoint.every=3") == complete
    for other in ("seed=1", "num_steps=7", "gate.tau=2", "evaluation.num_problems=3"):
        assert found(*same, other) is None
    assert found(*same, "resume=never") is None
    for damage in ("{", "", "[1]"):
        (complete / CONFIG_FILE).write_text(damage)
        assert found(*same) is None


def test_a_multirun_typed_again_runs_only_what_is_not_complete(
    multirun: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import opd_ray.training.session
    from opd_ray.main import train

    ran: list[int] = []

    def run_session(cfg: RunConfig, config_yaml: str, values: dict[str, Any]) -> None:
        status = "failed" if cfg.seed == 1 and len(ran) < 2 else "finished"
        a_run(Composed(cfg, config_yaml, values), status)
        ran.append(cfg.seed)
        if status == "failed":
            raise ActorError("lost: start again")

    monkeypatch.setattr(opd_ray.training.session, "run_session", run_session)
    line = ("-m", "+experiment=opd", "seed=0,1")
    assert (multirun(train, *line), ran) == (1, [0, 1])
    assert (multirun(train, *line), ran) == (0, [0, 1, 1])
    assert capsys.readouterr().err.count("is complete (resume=never runs it again)") == 1
    assert (multirun(train, *line), ran) == (0, [0, 1, 1])
    assert (multirun(train, *line, "resume=never"), ran) == (0, [0, 1, 1, 0, 1])
    # A single run is what was asked for.
    assert multirun(train, "+experiment=opd", "runs_dir=runs/multirun/experiment_opd-seed_0_1") == 0
    assert ran == [0, 1, 1, 0, 1, 0]


def test_the_results_of_a_run_are_plain(run_config: Callable[..., Any]) -> None:
    """What a checkpoint and a finished run are compared by: the same from YAML as from the composed config."""
    found = composed(run_config("+experiment=lsm_block64"))
    assert yaml.safe_load(found.yaml) == found.values
    assert asdict(found.cfg)["seed"] == found.values["seed"]
