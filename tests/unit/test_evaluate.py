"""The verb `evaluate` without engines: config, where results go, verdicts made again, and waiting for engines."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from opd_ray import main
from opd_ray.config.choices import AnswerFormat, Dtype, Template
from opd_ray.errors import ActorDiedError, ConfigError, DataError, DeadlineError, ModelError
from opd_ray.evaluation.grading import Completion, ProblemSet
from opd_ray.evaluation.samples import SamplesHeader, read_samples, to_graded, write_samples
from opd_ray.evaluation.verdict import Verdict
from opd_ray.evaluation.verifier import Verification
from opd_ray.rollout import group as rollout_group
from opd_ray.rollout.group import RolloutGroup
from opd_ray.training.evaluate_config import EvaluateConfig, check_evaluate_config, engine_config, problem_sets
from opd_ray.training.evaluated_model import Results, judged_model
from opd_ray.training.evaluator import SamplesFile, evaluate, judge, problem_set_name
from opd_ray.training.recompute import recompute
from opd_ray.types import Prompt
from tests.unit.benchmark_files import BENCHMARKS, DATA, refused_by_their_own_key
from tests.unit.fake_actors import Handle, config

FAST = Verification(num_workers=1, budget_s=20.0)


def evaluate_config(*overrides: str) -> EvaluateConfig:
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    main.register_benchmarks()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(main.conf_dir())):
        found = OmegaConf.to_object(compose("evaluate", ["model=tiny:student", *overrides]))
    assert isinstance(found, EvaluateConfig)
    return found


def test_every_benchmark_file_is_a_benchmark() -> None:
    cfg = evaluate_config()
    assert sorted(cfg.benchmark) == [*BENCHMARKS, "tiny"]
    check_evaluate_config(cfg)
    assert (cfg.n, cfg.temperature, cfg.top_p, cfg.max_response_tokens) == (8, 1.0, 0.9, 16384)


def test_a_new_benchmark_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(main.conf_dir(), conf)
    (conf / "benchmark" / "mine.yaml").write_text("path: mine.jsonl\nanswer_format: hash_number\ntemplate: chat\n")
    monkeypatch.setattr(main, "conf_dir", lambda: conf)
    cfg = evaluate_config("benchmarks=[mine]")
    check_evaluate_config(cfg)
    assert cfg.benchmark["mine"].answer_format is AnswerFormat.hash_number


def test_all_benchmarks_read_from_one_folder_and_their_own_keys_are_correct() -> None:
    """Files with the columns that the published data sets have."""
    cfg = evaluate_config(f"benchmarks=[{','.join([*BENCHMARKS, 'tiny'])}]", f"data_dir={DATA}")
    sets = {part.name: part for part in problem_sets(cfg)}
    sizes = {name: len(part.problems) for name, part in sets.items()}
    assert sizes == {"aime24": 12, "aime25": 12, "amc23": 12, "gsm8k": 12, "math500": 49, "tiny": 64}
    assert sets["gsm8k"].template is Template.chat and sets["math500"].answer_format is AnswerFormat.boxed
    assert [sets[name].problems[0].id for name in ("aime24", "gsm8k", "math500")] == [
        "500",
        "row-0",
        "test/number_theory/9001.json",
    ]
    for name in BENCHMARKS:
        assert refused_by_their_own_key(sets[name].problems, sets[name].answer_format) == [], name


def test_a_path_of_ones_own_wins_over_the_folder_and_instruction_and_template_are_used(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    part = problem_sets(
        evaluate_config(
            "benchmarks=[gsm8k]",
            "data_dir=/nowhere",
            f"benchmark.gsm8k.path={tmp_path}/own.jsonl",
            "benchmark.gsm8k.instruction='Be brief.'",
            "template=plain_chat",
        )
    )[0]
    assert [prompt.problem for prompt in part.problems] == ["1+1?\n\nBe brief."]
    assert part.template is Template.plain_chat


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=''"], "model is empty: give model="),
        (["benchmarks=[]"], "benchmarks is empty"),
        (["benchmarks=[nope]"], "benchmarks=nope is unknown: give some of aime24, .*conf/benchmark/nope.yaml"),
        (["benchmarks=[tiny,tiny]"], "names one twice"),
        (["n=0"], "n=0 is out of range: give a value >= 1"),
        (["top_p=0"], "top_p=0.0 is out of range"),
        (["temperature=0"], "n=8 with temperature=0"),
        (["verification_budget_s=0"], "verification_budget_s=0.0 is out of range"),
        (["num_verifiers=0"], "num_verifiers=0 is out of range"),
        (["rollout.num_engines=0"], "rollout.num_engines=0 is out of range"),
        (["benchmark.tiny.num_problems=-1"], "benchmark.tiny.num_problems=-1 is out of range"),
    ],
)
def test_nonsense_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_evaluate_config(evaluate_config(*overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "1+1?"}', "has no answer: add the column `answer` .* benchmark.math500.fields"),
        ('{"problem": "1+1?", "answer": "  "}', "benchmark.math500.answer_format=boxed cannot read"),
        ("", "no prompts were found"),
    ],
)
def test_problems_without_a_usable_answer_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "math500.jsonl").write_text(text + "\n")
    cfg = evaluate_config("benchmarks=[math500]", f"data_dir={tmp_path}", "benchmark.math500.fields={id: ''}")
    with pytest.raises(DataError, match=message):
        problem_sets(cfg)


def test_engines_sample_as_the_config_says() -> None:
    cfg = evaluate_config("temperature=0.5", "top_p=0.8", "rollout.num_engines=3", "rollout.kv_cache_gib=2", "seed=4")
    run = engine_config(cfg, "folder", Dtype.bfloat16, 500, 400)
    assert (run.evaluation.temperature, run.evaluation.top_p, run.evaluation.max_response_tokens) == (0.5, 0.8, 400)
    assert (run.rollout.num_engines, run.rollout.kv_cache_gib, run.seed, run.deadline_s) == (3, 2, 4, 1800.0)
    assert (run.student.path, run.student.dtype, run.data.max_prompt_tokens) == ("folder", Dtype.bfloat16, 100)
    assert run.faults.max_restarts == cfg.max_restarts


# Models and where their results go


def test_what_a_model_stands_for(tmp_path: Path) -> None:
    assert judged_model("tiny:student").name == "tiny-student"
    assert judged_model("Qwen/Qwen3-1.7B-Base").name == "Qwen3-1.7B-Base"
    plain, run = tmp_path / "plain", tmp_path / "runs" / "lsm-tiny-s0"
    plain.mkdir()
    (run / "student").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to(run.name)
    assert judged_model(str(plain)).run is None
    found = judged_model(str(tmp_path / "runs" / "latest"))
    assert (found.path, found.name, found.run) == (str(run / "student"), "lsm-tiny-s0", run)
    with pytest.raises(ModelError, match="no such folder"):
        judged_model("runs/of/mine")
    with pytest.raises(ModelError, match="tiny:other"):
        judged_model("tiny:other")
    (plain / "status.json").write_text("{}")
    with pytest.raises(ModelError, match="has no student/"):
        judged_model(str(plain))


def test_results_of_a_run_go_into_the_run_and_of_others_into_a_folder_of_their_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    results = Results(judged_model(str(run)), str(tmp_path / "evaluations"))
    results.write_config("n: 8\n")
    results.finish({"benchmarks": {}})
    assert results.path_of("tiny.parquet") == run / "evaluation" / "student-tiny.parquet"
    assert sorted(file.name for file in (run / "evaluation").iterdir()) == [
        "student-config.yaml",
        "student-summary.json",
    ]
    assert not (tmp_path / "evaluations").exists()
    own = Results(judged_model("tiny:student"), str(tmp_path / "evaluations"))
    own.finish({"benchmarks": {}})
    own.close()
    assert (tmp_path / "evaluations" / "latest").resolve() == own.shown
    assert own.shown.name.startswith("tiny-student-")


def test_an_evaluation_that_ends_early_keeps_what_was_finished_and_nothing_else(tmp_path: Path) -> None:
    empty = Results(judged_model("tiny:student"), str(tmp_path))
    empty.write_config("n: 8\n")
    assert not empty.fail("out of memory")
    assert list(tmp_path.iterdir()) == []
    begun = Results(judged_model("tiny:student"), str(tmp_path))
    begun.path_of("tiny.parquet").write_bytes(b"")
    assert begun.fail(None)
    assert json.loads(begun.path_of("status.json").read_text())["status"] == "interrupted"


# Sampling, through the real group with fake engines


PROBLEMS = [Prompt(id=str(i), problem=f"{i}?", answer=str(i), index=i) for i in range(5)]


class SlowEngine:
    """Answers each problem with its own id after some looks at its progress."""

    def __init__(self, stands_still: bool = False) -> None:
        self.looks = 0
        self.stands_still = stands_still
        self.templates: list[Template | None] = []

    async def complete(
        self, prompts: tuple[Prompt, ...], first: int, num_samples: int, template: Template | None
    ) -> list[list[Completion]]:
        self.templates.append(template)
        while self.looks < 3 or self.stands_still:
            await asyncio.sleep(0.01)
        return [[Completion(f"so {prompt.id}", 3, "stop")] * num_samples for prompt in prompts]

    def progress(self) -> tuple[int, int]:
        self.looks += 1
        return self.looks, 0 if self.stands_still else self.looks


def engines(*targets: SlowEngine, deadline_s: float = 30.0) -> tuple[RolloutGroup, list[Handle]]:
    group = RolloutGroup("rollout", deadline_s)
    handles = [Handle(target, f"rollout-{index}") for index, target in enumerate(targets)]
    group.workers = list(handles)
    return group, handles


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_group, "LOOK_S", 0.02)


def test_answers_come_in_order_from_all_engines_and_progress_is_told() -> None:
    first, second = SlowEngine(), SlowEngine()
    told: list[int] = []

    async def run() -> list[list[Completion]]:
        group, _ = engines(first, second)
        return await group.complete(PROBLEMS, 2, template=Template.chat, on_progress=told.append)

    answers = asyncio.run(run())
    assert [[sample.text for sample in samples] for samples in answers] == [[f"so {i}"] * 2 for i in range(5)]
    assert first.templates == second.templates == [Template.chat]
    assert told == sorted(told) and told[-1] >= 4


def test_an_engine_that_decodes_nothing_is_given_up() -> None:
    async def run() -> None:
        await engines(SlowEngine(stands_still=True), deadline_s=0.1)[0].complete(PROBLEMS, 2)

    with pytest.raises(DeadlineError, match="rollout-0 has decoded nothing in 0.1 s"):
        asyncio.run(run())


def test_an_engine_that_dies_without_restarts_left_ends_it() -> None:
    async def run() -> None:
        group, handles = engines(SlowEngine(stands_still=True))
        asyncio.get_running_loop().call_later(0.1, handles[0].kill)
        await group.complete(PROBLEMS, 2)

    with pytest.raises(ActorDiedError, match="rollout-0 died"):
        asyncio.run(run())


def test_a_run_keeps_the_samples_of_its_evaluations(tmp_path: Path) -> None:
    cfg = config(0, 1, 1)
    cfg.evaluation.path, cfg.evaluation.answer_format = "some/numbers.jsonl", AnswerFormat.last_number
    cfg.evaluation.samples_per_problem = 2
    path = tmp_path / "evaluation" / "step-000040.parquet"

    async def run() -> Any:
        return await evaluate(cfg, engines(SlowEngine())[0], PROBLEMS, SamplesFile(path, "me", 40))

    assert asyncio.run(run()).avg_at_n == 1.0
    columns = read_samples(path).to_pydict()
    assert set(columns["benchmark"]) == {"numbers"} and columns["extracted"] == [str(i // 2) for i in range(10)]


@pytest.mark.parametrize(
    ("path", "name"),
    [("tiny:test", "tiny"), ("hub:HuggingFaceH4/MATH-500:test", "math-500"), ("a/gsm8k_test.jsonl", "gsm8k_test")],
)
def test_names_of_problem_sets(path: str, name: str) -> None:
    assert problem_set_name(path) == name


# Verdicts made again


def judged(tmp_path: Path) -> Path:
    """A folder of results whose verdicts are right, and its summary."""
    part = ProblemSet("numbers", PROBLEMS, AnswerFormat.last_number)

    async def run() -> Any:
        return await judge(engines(SlowEngine())[0], part, 2, FAST)

    graded, result = asyncio.run(run())
    header = SamplesHeader("me", None, 1.0, 0.9, 64, {"numbers": AnswerFormat.last_number}, 0)
    write_samples(tmp_path / "numbers.parquet", {"numbers": graded}, header)
    (tmp_path / "summary.json").write_text(json.dumps({"benchmarks": {"numbers": result.as_dict(every_k=True)}}))
    return tmp_path


def test_recomputed_verdicts_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = judged(tmp_path)
    before, summary = (folder / "numbers.parquet").read_bytes(), json.loads((folder / "summary.json").read_text())
    assert recompute(str(folder), FAST, show_progress=False) == 0
    assert (folder / "numbers.parquet").read_bytes() == before
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "0 of 10 verdicts changed" in capsys.readouterr().out


def test_verdicts_that_were_wrong_are_mended_with_the_figures_beside_them(tmp_path: Path) -> None:
    from dataclasses import replace

    folder = judged(tmp_path)
    path = folder / "numbers.parquet"
    table = read_samples(path)
    graded = to_graded(table, path)["numbers"]
    bad = [replace(sample, verdict=Verdict.timeout) if sample.problem_index < 2 else sample for sample in graded]
    header = SamplesHeader("me", None, 1.0, 0.9, 64, {"numbers": AnswerFormat.last_number}, 0)
    write_samples(path, {"numbers": bad}, header)
    summary = json.loads((folder / "summary.json").read_text())
    summary["benchmarks"]["numbers"] |= {"avg_at_2": 0.6, "wall_s": 7.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert recompute(str(path), FAST, show_progress=False) == 4
    assert to_graded(read_samples(path), path)["numbers"] == graded
    found = json.loads((folder / "summary.json").read_text())["benchmarks"]["numbers"]
    assert (found["avg_at_2"], found["wall_s"], found["timeout_share"]) == (1.0, 7.0, 0.0)


def test_a_run_folder_is_recomputed_with_its_summary(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    folder = judged(tmp_path / "evaluation")
    (folder / "numbers.parquet").rename(folder / "after.parquet")
    (folder / "summary.json").unlink()
    (tmp_path / "summary.json").write_text(
        json.dumps({"eval": {"after": {"avg_at_2": 0.0, "wall_s": 3.0}, "before": None}})
    )
    recompute(str(tmp_path), FAST, show_progress=False)
    found = json.loads((tmp_path / "summary.json").read_text())["eval"]
    assert (found["after"]["avg_at_2"], found["after"]["wall_s"], found["before"]) == (1.0, 3.0, None)


def test_nothing_to_recompute_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no samples"):
        recompute(str(tmp_path), FAST)
