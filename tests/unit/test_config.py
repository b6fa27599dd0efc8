"""Every config key: composed by Hydra, ranged, and refused in one line when it is wrong."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from opd_ray.config.checks import announcements, check_config
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ConfigError
from opd_ray.main import conf_dir, to_run_config

ROOT = Path(__file__).resolve().parents[2]
# What each experiment is: objective, gate, and what else it sets.
EXPERIMENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "forward_kl": ("forward_kl", "off", {}),
    "forward_kl_renormalized": ("forward_kl", "off", {"objective.renormalize": True}),
    "jsd": ("jsd", "off", {}),
    "lsm": ("lsm", "off", {}),
    "lsm_block64": ("lsm", "block", {}),
    "lsm_block64_capped": ("lsm", "block", {"gate.max_weight": 1.5}),
    "lsm_block64_engine_calibrated": ("lsm", "block", {"gate.behavior_source": "rollout", "gate.calibrate": True}),
    "lsm_block64_k3": ("lsm", "block", {"gate.statistic": "k3"}),
    "lsm_block64_mean_abs": ("lsm", "block", {"gate.statistic": "mean_abs"}),
    "lsm_block64_noise": ("lsm", "block", {"gate.control": "noise"}),
    "lsm_block64_rms": ("lsm", "block", {"gate.statistic": "rms"}),
    "lsm_block64_sampled_drift": ("lsm", "block", {"gate.drift_tokens": 16}),
    "lsm_block64_sequence_norm": ("lsm", "block", {"gate.normalize": "sequence"}),
    "lsm_block64_shuffle": ("lsm", "block", {"gate.control": "shuffle"}),
    "lsm_block64_tau_quantile": ("lsm", "block", {"gate.tau_mode": "quantile"}),
    "lsm_block64_tau_staleness": ("lsm", "block", {"gate.tau_mode": "staleness"}),
    "lsm_geometric_mask": ("lsm", "geometric_mask", {}),
    "lsm_hard_drop": ("lsm", "hard_drop", {}),
    "lsm_high_entropy": ("lsm", "off", {"objective.entropy_top_share": 0.2}),
    "lsm_icepop": ("lsm", "icepop", {}),
    "lsm_newline": ("lsm", "newline", {}),
    "lsm_sequence_gate": ("lsm", "sequence", {}),
    "lsm_student_support": ("lsm", "off", {"teacher.support": "student_topk"}),
    "lsm_tis": ("lsm", "tis", {}),
    "lsm_token_gate": ("lsm", "token", {}),
    "lsm_with_sampled": ("lsm", "off", {"objective.include_sampled": True}),
    "opd": ("opd", "off", {}),
    "opd_block64": ("opd", "block", {}),
    "opd_geometric_mask": ("opd", "geometric_mask", {}),
    "opd_hard_drop": ("opd", "hard_drop", {}),
    "opd_newline": ("opd", "newline", {}),
    "opd_recompute": ("opd", "off", {"objective.advantage": "recompute"}),
    "opd_recompute_block64": ("opd", "block", {"objective.advantage": "recompute"}),
    "opd_recompute_icepop": ("opd", "icepop", {"objective.advantage": "recompute"}),
    "opd_recompute_tis": ("opd", "tis", {"objective.advantage": "recompute"}),
    "opd_sequence_gate": ("opd", "sequence", {}),
    "opd_special_tokens_masked": ("opd", "off", {"objective.mask_rules": ["special_tokens"]}),
    "opd_token_gate": ("opd", "token", {}),
    "tail_kl_forward": ("tail_kl", "off", {"objective.direction": "forward"}),
    "tail_kl_reverse": ("tail_kl", "off", {"objective.direction": "reverse"}),
}
PAPER = ("opd", "opd_block64", "opd_newline", "lsm", "lsm_block64", "lsm_newline")


def composed(*overrides: str) -> RunConfig:
    """A config of the caller's own; composing the same one again costs nothing."""
    return copy.deepcopy(_composed(os.environ.get("OPD_SCALE"), *overrides))


@cache
def _composed(scale: str | None, *overrides: str) -> RunConfig:
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_run_config(compose("run", list(overrides)))


def leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


LEAVES = list(leaves(RunConfig()))
RANGED = [(key, item) for key, item in LEAVES if {"ge", "gt", "le"} & set(item.metadata)]


COMPOSED = [(name, "tiny") for name in EXPERIMENTS] + [(name, s) for name in PAPER for s in ("smollm2", "qwen3_1p7b")]


@pytest.mark.parametrize(("experiment", "scale"), COMPOSED)
def test_every_experiment_composes_and_the_papers_at_every_scale(experiment: str, scale: str) -> None:
    cfg = composed(f"+experiment={experiment}", f"scale={scale}")
    objective, gate, others = EXPERIMENTS[experiment]
    assert (cfg.experiment, cfg.scale) == (experiment, scale)
    assert (cfg.objective.kind, cfg.gate.kind) == (objective, gate)
    for key, value in others.items():
        group, name = key.split(".")
        assert plain(getattr(getattr(cfg, group), name)) == value
    assert cfg.gate.tau == 1.0
    assert gate != "block" or cfg.gate.block_size == 64


def plain(value: Any) -> Any:
    """Enum members as their names."""
    return [plain(entry) for entry in value] if isinstance(value, list) else getattr(value, "name", value)


def test_the_papers_variants_are_plain() -> None:
    """Nothing but objective and gate differs between them."""
    for name in PAPER:
        cfg = composed(f"+experiment={name}")
        base = dataclasses.replace(cfg, experiment="", objective=RunConfig().objective, gate=RunConfig().gate)
        other = composed("+experiment=lsm")
        assert base == dataclasses.replace(other, experiment="", objective=RunConfig().objective, gate=RunConfig().gate)
        assert EXPERIMENTS[name][2] == {}


def test_every_experiment_file_is_tested() -> None:
    assert {path.stem for path in (conf_dir() / "experiment").glob("*.yaml")} == set(EXPERIMENTS)


def test_the_papers_line_is_the_papers() -> None:
    cfg = composed("+experiment=lsm_block64", "scale=qwen3_1p7b")
    assert cfg.student.path == "Qwen/Qwen3-1.7B-Base"
    assert cfg.teacher.path.endswith("Qwen3-4B-Base-GRPO")
    assert (cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt) == (4, 8)
    assert (cfg.data.max_prompt_tokens, cfg.rollout.max_response_tokens) == (2048, 16384)
    assert (cfg.learner.lr, cfg.teacher.top_k, cfg.gate.tau) == (2e-6, 32, 1.0)
    assert (cfg.replay.reuse, cfg.replay.max_staleness, cfg.rollout.top_p) == (2, 0, 0.9)
    # 200 rollout batches, each used for `reuse` optimizer steps.
    assert cfg.num_steps == 200 * cfg.replay.reuse


def test_scale_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_SCALE", "smollm2")
    assert composed("+experiment=lsm").scale == "smollm2"
    assert composed("+experiment=lsm", "scale=tiny").scale == "tiny"


def test_groups_can_be_chosen_over_the_scale() -> None:
    assert composed("scale=smollm2", "data=tiny").data.path == "tiny:train"
    assert composed("replay=overlap").replay.max_staleness > 0
    assert composed("logger=none").telemetry.wandb.name == "disabled"


SPLIT = (
    "rollout.tensor_parallel=2 rollout.num_gpus=2 rollout.num_engines=2 teacher.backend=vllm teacher.num_gpus=4 "
    "teacher.tensor_parallel=4 teacher.num_workers=1 teacher.gpu_memory_utilization=0.9 learner.zero_stage=3 "
    "learner.offload=parameters learner.gradient_checkpointing=true learner.dtype=bfloat16"
)


@pytest.mark.parametrize("experiment", PAPER)
def test_models_too_large_for_a_gpu_are_split_by_config(experiment: str) -> None:
    cfg = composed(f"+experiment={experiment}", "scale=qwen3_1p7b", *SPLIT.split())
    assert (cfg.rollout.tensor_parallel, cfg.teacher.tensor_parallel, cfg.teacher.backend.name) == (2, 4, "vllm")
    assert (cfg.learner.zero_stage, cfg.learner.offload.name, cfg.learner.dtype.name) == (3, "parameters", "bfloat16")
    assert cfg.learner.gradient_checkpointing


def test_the_dtypes_of_stored_logprobs_are_chosen_apart() -> None:
    replay = composed().replay
    assert (replay.logprob_dtype.name, replay.sampled_logprob_dtype.name) == ("float16", "float32")
    replay = composed("replay.logprob_dtype=float32", "replay.sampled_logprob_dtype=float16").replay
    assert (replay.logprob_dtype.name, replay.sampled_logprob_dtype.name) == ("float32", "float16")


def test_ranges_are_given_to_most_numbers() -> None:
    numbers = [key for key, item in LEAVES if item.type in ("int", "float")]
    assert {key for key, _ in RANGED} == set(numbers)


def just_outside(item: dataclasses.Field[Any]) -> list[float]:
    meta = item.metadata
    step = 1 if item.type == "int" else 1e-6
    values: list[float] = []
    if meta["ge"] is not None:
        values.append(meta["ge"] - step)
    if meta["gt"] is not None:
        values.append(meta["gt"])
    if meta["le"] is not None:
        values.append(meta["le"] + step)
    return values if item.type == "int" else [*values, math.nan, math.inf]


@pytest.mark.parametrize(("key", "item"), RANGED, ids=[key for key, _ in RANGED])
def test_a_value_out_of_range_is_refused_by_name(key: str, item: dataclasses.Field[Any]) -> None:
    good = composed()
    for value in just_outside(item):
        cfg = copy.deepcopy(good)
        *parts, name = key.split(".")
        target: Any = cfg
        for part in parts:
            target = getattr(target, part)
        setattr(target, name, value)
        with pytest.raises(ConfigError) as caught:
            check_config(cfg)
        text = str(caught.value)
        assert text.startswith(f"{key}={value} ") and "\n" not in text
        assert ">=" in text or ">" in text


CONTRADICTIONS = [
    ("teacher.top_k=1", "teacher.top_k=1"),
    ("rollout.num_engines=9", "rollout.num_engines=9"),
    ("learner.num_ranks=64", "learner.num_ranks=64"),
    ("learner.warmup_steps=500", "learner.warmup_steps=500"),
    ("data.template=chat_with_solution", "data.template=chat_with_solution"),
    ("student.path=''", "student.path"),
    ("data.path=''", "data.path"),
]


@pytest.mark.parametrize(("override", "named"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        composed("+experiment=lsm", override)


# A call, and what its one line names.
MISFITS = {
    "+experiment=lsm_newline gate.max_span=8": "gate.max_span=8",
    "+experiment=lsm gate.control=shuffle": "gate.control=shuffle",
    "+experiment=lsm gate.max_weight=2": "gate.max_weight=2",
    "+experiment=lsm_tis gate.tau_mode=quantile": "gate.tau_mode=quantile",
    "+experiment=lsm_tis gate.drift_tokens=4": "gate.drift_tokens=4",
    "+experiment=lsm_tis gate.normalize=sequence": "gate.normalize=sequence",
    "+experiment=lsm_block64 gate.max_weight=0.5": "gate.max_weight=0.5",
    "+experiment=lsm_block64 gate.max_weight=2 gate.normalize=none": "gate.normalize=none",
    "+experiment=lsm_block64 gate.calibrate=true": "gate.calibrate=true",
    "+experiment=opd_block64 gate.drift_tokens=4": "gate.drift_tokens=4",
    "+experiment=opd objective.include_sampled=true": "objective.include_sampled=true",
    "+experiment=opd teacher.support=student_topk": "teacher.support=student_topk",
    "+experiment=lsm objective.mask_rules=[special_tokens,special_tokens]": "special_tokens",
    "+experiment=jsd teacher.top_k=1": "teacher.top_k=1",
    "+experiment=lsm replay=overlap replay.order=freshest": "replay.order=freshest",
    "+experiment=lsm replay=overlap replay.order=weighted": "replay.order=weighted",
    "+experiment=lsm replay=drop replay.hard_staleness=5": "replay.hard_staleness=5",
    "+experiment=lsm replay=gate replay.hard_staleness=2": "replay.hard_staleness=2",
    "+experiment=lsm replay.stale=gate": "replay.hard_staleness=0",
    "+experiment=lsm replay.max_bytes=-1": "replay.max_bytes=-1",
    "+experiment=lsm replay.spill_bytes=-1": "replay.spill_bytes=-1",
    "+experiment=forward_kl_renormalized teacher.top_k=1": "teacher.top_k=1",
    "+experiment=lsm rollout.tensor_parallel=2 rollout.num_gpus=1": "rollout.tensor_parallel=2",
    "+experiment=lsm teacher.backend=vllm teacher.tensor_parallel=4 teacher.num_gpus=2": "teacher.tensor_parallel=4",
    "+experiment=lsm teacher.tensor_parallel=2": "teacher.backend=transformers",
    "+experiment=lsm_student_support teacher.backend=vllm": "teacher.backend=vllm",
    "+experiment=lsm learner.offload=parameters learner.zero_stage=2": "learner.zero_stage=2",
}


@pytest.mark.parametrize("call", MISFITS)
def test_options_that_do_not_fit_are_refused_by_name(call: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(MISFITS[call])) as caught:
        composed(*call.split())
    assert "\n" not in str(caught.value)


ANNOUNCED = {
    "+experiment=lsm": [],
    "+experiment=lsm rollout.top_p=0.9": [],
    "+experiment=opd rollout.top_p=0.9": ["rollout.top_p=0.9"],
    "+experiment=lsm rollout.temperature=0.7": ["rollout.temperature=0.7"],
    "+experiment=lsm_block64 gate.behavior_source=rollout": ["engine's log-probs"],
    "+experiment=lsm_block64 replay=overlap": ["engine's log-probs"],
    "+experiment=opd objective.advantage=recompute": ["not clipped"],
    "+experiment=lsm_block64_shuffle": ["a control"],
    "+experiment=lsm_block64 replay.reuse=1": ["every trajectory is fresh"],
    "+experiment=lsm replay=drop replay.order=weighted": [],
    "+experiment=lsm replay=drop replay.max_staleness=0": ["in lock-step nothing is overtaken"],
    "+experiment=lsm replay=gate": ["up to 8 steps old"],
    "+experiment=lsm_block64 replay=gate": ["engine's log-probs"],
}


@pytest.mark.parametrize("call", ANNOUNCED)
def test_what_biases_a_result_is_said(call: str) -> None:
    said = announcements(composed(*call.split()))
    assert len(said) == len(ANNOUNCED[call])
    assert all(word in text for word, text in zip(ANNOUNCED[call], said, strict=True))


def test_k_of_one_is_fine_where_nothing_is_renormalized() -> None:
    for experiment in ("opd", "tail_kl_reverse", "forward_kl"):
        assert composed(f"+experiment={experiment}", "teacher.top_k=1").teacher.top_k == 1


def read_keys() -> set[str]:
    """Attribute names that the package's code reads, config files' own modules aside."""
    import ast

    names = set()
    for path in (ROOT / "opd_ray").rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_no_key_is_dead() -> None:
    read = read_keys()
    dead = [key for key, _ in LEAVES if key.split(".")[-1] not in read]
    assert not dead, f"config keys that no code reads: {dead}"


def test_every_key_has_a_doc() -> None:
    assert [key for key, item in LEAVES if not item.metadata.get("doc")] == []


def run_main(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "opd_ray.main", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


BAD_CALLS = {
    "+experiment=nope": ["nope", "lsm_block64"],
    "scale=huge": ["huge", "qwen3_1p7b"],
    "learner.lr=abc": ["learner.lr", "abc"],
    "learner.zero_stage=7": ["learner.zero_stage=7", "<= 3"],
    "learner.foo=3": ["foo"],
    "gate.kind=x": ["gate.kind", "block"],
    "objective.kind=x": ["objective.kind=x", "forward_kl, jsd, lsm, opd, tail_kl"],
    "gate.statistic=x": ["gate.statistic=x", "k3, mean_abs, rms, signed_mean"],
    "teacher.support=x": ["teacher.support=x", "student_topk, teacher_topk"],
    "replay.sampled_logprob_dtype=bfloat16": ["replay.sampled_logprob_dtype", "float16"],
    "experiment=lsn": ["experiment/lsn", "lsm_block64"],
    "data.path=missing.jsonl": ["missing.jsonl"],
    "resume=missing_run": ["resume=missing_run", "run folder"],
    "rollout.on_new_weights=later": ["rollout.on_new_weights", "finish"],
    "checkpoint.keep=0": ["checkpoint.keep=0", ">= 1"],
    "teacher.path=tiny:nothing data.path=tiny:nothing": ["tiny:nothing"],
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_bad_call_ends_in_one_line(call: str, tmp_path: Path) -> None:
    done = run_main(*call.split(), f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("opd_ray: error: ")
    assert all(word in done.stderr for word in BAD_CALLS[call]), done.stderr
    assert not (tmp_path / "runs").exists()


BAD_PROMPTS = {
    "empty": ("", ["prompts.jsonl", "no prompts"]),
    "no problem": ('{"problem": "1+1="}\n{"question": "1+2="}\n', ["prompts.jsonl:2", "'problem'", "question"]),
    "no JSON": ("1+1=\n", ["prompts.jsonl:1", "JSON"]),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompt_files_end_in_one_line(case: str, tmp_path: Path) -> None:
    content, words = BAD_PROMPTS[case]
    (tmp_path / "prompts.jsonl").write_text(content)
    done = run_main("+experiment=lsm", f"data.path={tmp_path / 'prompts.jsonl'}", f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert done.stderr.startswith("opd_ray: error: ") and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "runs").exists()


def test_help_and_cfg_answer_without_the_engines() -> None:
    """They take under 2 s on an idle machine as long as nothing heavy is imported."""
    help_text = run_main("--help")
    assert "lsm_block64" in help_text.stdout and "replay" in help_text.stdout
    assert "num_steps: 120" in run_main("+experiment=lsm_block64", "num_steps=120", "--cfg", "job").stdout
    code = (
        "import sys; sys.argv = ['x', '+experiment=lsm', '--cfg', 'job'];"
        "import runpy\n"
        "try:\n    runpy.run_module('opd_ray.main', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
