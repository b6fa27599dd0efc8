"""What preflight refuses, and how: on the embedded models and on folders made wrong by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd_ray.config.choices import Overlong, Template
from opd_ray.config.schema import RunConfig
from opd_ray.errors import DataError, ModelError
from opd_ray.tiny.paths import student_path, teacher_path
from opd_ray.training.preflight import PreflightReport, preflight
from opd_ray.types import Prompt

PROMPTS = [Prompt(id="short", problem="1+2="), Prompt(id="long", problem="1+" * 50 + "2=")]


def checked(
    prompts: list[Prompt] = PROMPTS,
    *,
    problems: list[Prompt] | None = None,
    student: Path | None = None,
    teacher: Path | None = None,
    **settings: Any,
) -> PreflightReport:
    """Preflight of a small config; settings as ``teacher__top_k=44``."""
    cfg = RunConfig()
    cfg.teacher.top_k, cfg.data.max_prompt_tokens = 8, 200
    for key, value in settings.items():
        part, name = key.split("__")
        setattr(getattr(cfg, part), name, value)
    paths = str(student or student_path()), str(teacher or teacher_path())
    return preflight(cfg, *paths, prompts, problems or [])


def test_the_embedded_models_pass() -> None:
    report = checked(problems=PROMPTS)
    assert report.kept == (0, 1)
    assert report.vocab_size == 44


def test_k_beyond_the_vocabulary() -> None:
    assert checked(teacher__top_k=44).vocab_size == 44
    with pytest.raises(ModelError, match=r"teacher\.top_k=45 exceeds the vocabulary of 44 tokens: give a value <= 44"):
        checked(teacher__top_k=45)


def test_a_prompt_over_the_limit_is_named_or_dropped() -> None:
    with pytest.raises(
        DataError, match=r"1 of 2 prompts .*max_prompt_tokens=60.*'long' with 103 tokens.*overlong=drop"
    ):
        checked(data__max_prompt_tokens=60)
    assert checked(data__max_prompt_tokens=60, data__overlong=Overlong.drop).kept == (0,)
    with pytest.raises(DataError, match="2 of 2"):
        checked(data__max_prompt_tokens=3, data__overlong=Overlong.drop)


def test_the_context_is_not_exceeded() -> None:
    for part in ("rollout", "evaluation"):
        too_long: dict[str, Any] = {f"{part}__max_response_tokens": 100_000}
        with pytest.raises(ModelError, match=r"data\.max_prompt_tokens=200 .*100000 tokens exceed the context"):
            checked(**too_long)


def test_other_tokenizers_are_refused_by_content(tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(teacher_path(), other)
    # The same content elsewhere is the same tokenizer.
    assert checked(teacher=other).vocab_size == 44
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = [token for token in vocab if token in "12"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="different tokenizers"):
        checked(teacher=other)


@pytest.mark.parametrize("missing", ["student", "teacher"])
def test_a_missing_model_folder_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nowhere: dict[str, Any] = {missing: tmp_path / "nowhere"}
    with pytest.raises(ModelError, match="no tokenizer can be loaded from '.*nowhere'") as caught:
        checked(**nowhere)
    assert "\n" not in str(caught.value)


def test_a_chat_template_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(ModelError, match=r"has no chat template.*data\.template=completion"):
        checked(data__template=Template.chat)


def test_a_teacher_that_needs_solutions() -> None:
    with pytest.raises(DataError, match="'short' has no solution"):
        checked(teacher__template=Template.completion_with_solution)
