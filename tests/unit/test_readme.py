"""The documentation against the repository: links, paths, keys, commands and figures."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from opd_ray import cli, compare, inspect
from opd_ray.config.checks import check_config
from opd_ray.config.schema import RunConfig
from opd_ray.main import conf_dir, multirun_name, register_benchmarks
from opd_ray.plan import PlanConfig
from opd_ray.run.trajectory_records import RECORDS_FOLDER, write_records
from opd_ray.training.evaluate_config import EvaluateConfig, check_evaluate_config
from tests.unit.dumped import SETTINGS, made_use
from tests.unit.markdown import FOLDERS, ROOT, Page, pages
from tests.unit.run_folders import write_run

PAGES = pages()
README = PAGES[0]
RESULTS = ROOT / "benchmarks" / "results"
MODULES = {module: verb for verb, (module, _) in cli.VERBS.items()}
SUFFIXES = ("py", "json", "jsonl", "yaml", "png", "md", "txt")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def verb_commands(page: Page) -> list[tuple[str, list[str]]]:
    """Verb and arguments of each command that calls one."""
    found = []
    for words in page.commands():
        if "opd-ray" in words:
            at = words.index("opd-ray") + 1
            found.append((words[at], words[at + 1 :]))
        found += [
            (MODULES[module], words[at + 2 :])
            for at, (flag, module) in enumerate(zip(words, words[1:], strict=False))
            if flag == "-m" and module in MODULES
        ]
    return [(verb, arguments) for verb, arguments in found if verb in cli.VERBS and "VERB" not in arguments]


COMMANDS = [(page, verb, arguments) for page in PAGES for verb, arguments in verb_commands(page)]


def of_verbs(*verbs: str, of: list[Page] = PAGES) -> pytest.MarkDecorator:
    """Parametrizes a test with the different commands that call one of the verbs."""
    chosen = {
        f"{verb} {' '.join(arguments)}": (verb, arguments)
        for page, verb, arguments in COMMANDS
        if verb in verbs and page in of
    }
    return pytest.mark.parametrize(("verb", "arguments"), list(chosen.values()), ids=list(chosen))


# ---- what is linked and named -------------------------------------------------------------------------------


def test_the_main_readme_has_at_most_200_lines() -> None:
    assert len(README.text.splitlines()) <= 200


@each_page
def test_links_lead_to_files_and_headings(page: Page) -> None:
    broken = []
    for target in page.links():
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path
        if not path.exists() or not path.is_relative_to(ROOT):
            broken.append(target)
        elif anchor:
            shown = path / "README.md" if path.is_dir() else path
            if anchor not in Page(shown).anchors():
                broken.append(target)
    assert broken == []


@each_page
def test_paths_in_code_exist(page: Page) -> None:
    """Paths that begin with a folder of the repository, or with one next to the page; capitals mean a placeholder."""
    words = [word for span in page.spans() for word in span.split()]
    words += [word for command in page.commands() for word in command]
    missing = []
    for word in words:
        if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?", word) or re.search(r"\b[A-Z]{2,}\b(?!\.md)", word):
            continue
        first = word.split("/")[0]
        bases = [base for base in (ROOT, page.path.parent) if (base / first).is_dir()]
        if first not in FOLDERS and page.path.parent not in bases:
            continue
        if not any(list(base.glob(word.rstrip("/"))) for base in bases or [ROOT]):
            missing.append(word)
    assert missing == []


@each_page
def test_modules_in_code_exist(page: Page) -> None:
    text = " ".join([*page.spans(), *(" ".join(words) for words in page.commands())])
    named = set(re.findall(r"(?:^|\s)((?:opd_ray|benchmarks|launch)(?:\.[a-z_]\w*)+)(?=\s|$)", text))
    missing = [
        name
        for name in named
        if not (ROOT / f"{name.replace('.', '/')}.py").is_file() and not (ROOT / name.replace(".", "/")).is_dir()
    ]
    assert missing == []


@each_page
def test_config_keys_in_code_exist(page: Page) -> None:
    parts = {part.name for part in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(part.default_factory)}
    unknown = []
    for key in re.findall(r"(?<![\w./])([a-z_]+\.[a-z_0-9]+)(?![\w./(])", " ".join(page.spans())):
        part, _, name = key.partition(".")
        if part in parts and name not in SUFFIXES and not hasattr(getattr(RunConfig(), part), name):
            unknown.append(key)
    assert unknown == []


def test_the_table_of_groups_is_what_conf_has() -> None:
    rows = re.findall(r"^\| `\+?(\w+)=(?:\[...\])?`[^|]*\|([^|]*)\|", README.text, re.MULTILINE)
    listed = {group.removesuffix("s"): (set(re.findall(r"`([^`]+)`", text)), text) for group, text in rows}
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert set(listed) == folders
    for group, (choices, text) in listed.items():
        there = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        more = re.search(r"and (\d+) more", text)
        assert choices <= there and len(there) == len(choices) + (int(more[1]) if more else 0), group


def test_the_tree_is_the_package() -> None:
    (tree,) = [block for block in README.blocks("") if block.startswith("opd_ray/\n")]
    folders = {path.parent.name for path in (ROOT / "opd_ray").glob("*/__init__.py")}
    assert set(re.findall(r"(\w+)/(?= )", tree)) == folders
    assert all((ROOT / "opd_ray" / name).is_file() for name in re.findall(r"\w+\.py", tree))


def test_every_experiment_and_sweep_is_explained() -> None:
    spans = set(Page(ROOT / "conf" / "README.md").spans())
    for group in ("experiment", "scale", "sweep"):
        there = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert there <= {span.split()[0] for span in spans}, group


# ---- commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def composing() -> Iterator[Callable[..., Any]]:
    """Composes a config from overrides, as a verb does."""
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    register_benchmarks()
    OmegaConf.register_new_resolver("multirun_name", multirun_name, use_cache=True, replace=True)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        yield lambda name, overrides, **options: compose(name, overrides, **options)
    GlobalHydra.instance().clear()


def jobs(arguments: list[str], composing: Callable[..., Any]) -> list[list[str]]:
    """The overrides of each job of a multirun (``-m``), a sweep's included; otherwise those of the only job."""
    overrides = [word for word in arguments if word not in ("-m", "--cfg", "job")]
    if "-m" not in arguments:
        return [overrides]
    sweeps = [word for word in overrides if word.startswith("+sweep=")]
    params = composing("run", sweeps, return_hydra_config=True).hydra.sweeper.params or {}
    overrides = [word for word in overrides if word not in sweeps] + [f"{key}={v}" for key, v in params.items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    return [list(job) for job in batch]


@of_verbs("train", "plan")
def test_a_command_composes(verb: str, arguments: list[str], composing: Callable[..., Any]) -> None:
    ConfigStore.instance().store(name="run_schema", node=PlanConfig if verb == "plan" else RunConfig)
    found = jobs(arguments, composing)
    for overrides in (found[0], found[-1]):
        check_config(OmegaConf.to_object(composing("run", overrides)))  # type: ignore[arg-type]


@of_verbs("evaluate")
def test_an_evaluation_composes(verb: str, arguments: list[str], composing: Callable[..., Any]) -> None:
    known = [word for word in arguments if word != "benchmarks=[NAME]"]
    check_evaluate_config(OmegaConf.to_object(composing("evaluate", known)))  # type: ignore[arg-type]


@of_verbs("compare")
def test_a_comparison_runs(
    verb: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / arguments[0], "lsm", 0)
    compare.main([*arguments, "--resamples", "100"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("comparison.html")


@of_verbs("inspect")
def test_an_inspection_runs(
    verb: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / arguments[0] / RECORDS_FOLDER, 0, [made_use(["4", "2"], trajectory_id=16)], SETTINGS)
    inspect.main(arguments)
    assert Path(capsys.readouterr().out.splitlines()[-1]).is_file()


def test_the_main_readme_shows_every_verb() -> None:
    assert {verb for page, verb, _ in COMMANDS if page is README} == set(cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb_answers(verb: str) -> None:
    done = run("-m", "opd_ray.cli", verb, "--help")
    assert done.returncode == 0 and verb in done.stdout, done.stderr


@of_verbs("train", "evaluate", of=[README])
def test_a_command_of_the_main_readme_shows_its_config(verb: str, arguments: list[str]) -> None:
    """Through the command line itself; training starts nothing with ``--cfg job``."""
    done = run("-m", "opd_ray.cli", verb, *arguments, "--cfg", "job")
    assert done.returncode == 0 and "\nrollout:\n" in done.stdout, done.stderr


def test_the_plan_that_is_shown_is_the_plan() -> None:
    (shown,) = [block for block in Page(ROOT / "launch" / "README.md").blocks("") if block.startswith("what ")]
    done = run("-m", "opd_ray.plan", "+experiment=lsm_block64", "scale=qwen3_1p7b", "+hardware=8xa800_80g")
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    assert [line for line in shown.splitlines() if line != "..." and line not in printed] == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


# ---- figures ------------------------------------------------------------------------------------------------


def recorded(name: str, *keys: str) -> float:
    """A figure of a record; of a list of checks the value of the one with that name."""
    found: Any = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    for key in keys:
        found = {check["name"]: check["value"] for check in found}[key] if isinstance(found, list) else found[key]
    return float(found)


LM_HEAD, SPEEDUP = "T=2048 H=1024 K=32 ", ("gated_speedup", "median")
DECODING = ("publication", "figures", "decoding")


@pytest.mark.parametrize(
    ("shown", "number"),
    [
        (r"(\S+) times \(SmolLM2-135M\)", recorded("vs_trl.json", "checks", "smollm2/trained_tokens_ratio_to_trl")),
        (r"(\S+) times \(embedded scale\)", recorded("vs_trl.json", "checks", "tiny/trained_tokens_ratio_to_trl")),
        (r"(\S+) times faster in fp32", recorded("lm_head.json", "figures", LM_HEAD + "float32", *SPEEDUP)),
        (r"fp32, (\S+) in bf16", recorded("lm_head.json", "figures", LM_HEAD + "bfloat16", *SPEEDUP)),
        (r"(\S+) times TransferQueue", recorded("store.json", "checks", "streamed/ratio_to_transferqueue")),
        (r"(\S+) times TorchRL", recorded("store.json", "checks", "streamed/ratio_to_torchrl")),
        (r"(\S+) times one stage", recorded("pipeline.json", "checks", "stages/staleness_2/ratio_to_stage")),
        (r"(\S+) s, of which decoding pauses", recorded("pipeline.json", *DECODING, "total_s", "median")),
        (r"decoding pauses (\S+) s", recorded("pipeline.json", *DECODING, "engine/standstill_s", "median")),
        (r"(\S+) bytes per token", recorded("teacher.json", "checks", "float32/wire_bytes_per_token")),
        (r"in (\S+) seconds, the embedded student", recorded("quickstart.json", "checks", "wall_s")),
        (r"gap closed +(\S+) %", 100 * recorded("quickstart.json", "checks", "gap_closed")),
    ],
)  # fmt: skip
def test_a_figure_of_the_main_readme_is_the_records(shown: str, number: float) -> None:
    """Rounded as it is shown."""
    (text,) = re.findall(shown, README.text)
    places = len(text.partition(".")[2])
    assert text == f"{number:.{places}f}"
