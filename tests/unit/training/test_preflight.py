"""What preflight refuses, and how: on the embedded models and on folders made wrong by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from opd_ray.config.choices import Overlong, Template
from opd_ray.errors import DataError, ModelError
from opd_ray.tiny.paths import student_path, teacher_path
from opd_ray.training.preflight import PreflightSpec, preflight
from opd_ray.types import Prompt

PROMPTS = [Prompt(id="short", problem="1+2="), Prompt(id="long", problem="1+" * 50 + "2=")]


def spec(**changes: object) -> PreflightSpec:
    base = PreflightSpec(
        student_path=str(student_path()),
        teacher_path=str(teacher_path()),
        student_template=Template.completion,
        teacher_template=Template.completion,
        top_k=8,
        max_prompt_tokens=200,
        max_response_tokens=256,
        overlong=Overlong.error,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_the_embedded_models_pass() -> None:
    report = preflight(spec(), PROMPTS, PROMPTS)
    assert report.kept == (0, 1)
    assert report.vocab_size == 44


def test_k_beyond_the_vocabulary() -> None:
    assert preflight(spec(top_k=44), PROMPTS, []).vocab_size == 44
    with pytest.raises(ModelError, match=r"teacher\.top_k=45 exceeds the vocabulary of 44 tokens: give a value <= 44"):
        preflight(spec(top_k=45), PROMPTS, [])


def test_a_prompt_over_the_limit_is_named_or_dropped() -> None:
    with pytest.raises(
        DataError, match=r"1 of 2 prompts .*max_prompt_tokens=60.*'long' with 103 tokens.*overlong=drop"
    ):
        preflight(spec(max_prompt_tokens=60), PROMPTS, [])
    assert preflight(spec(max_prompt_tokens=60, overlong=Overlong.drop), PROMPTS, []).kept == (0,)
    with pytest.raises(DataError, match="2 of 2"):
        preflight(spec(max_prompt_tokens=3, overlong=Overlong.drop), PROMPTS, [])


def test_the_context_is_not_exceeded() -> None:
    with pytest.raises(ModelError, match=r"data\.max_prompt_tokens=200 .*exceed the context"):
        preflight(spec(max_response_tokens=100_000), PROMPTS, [])


def test_other_tokenizers_are_refused_by_content(tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(teacher_path(), other)
    # The same content elsewhere is the same tokenizer.
    assert preflight(spec(teacher_path=str(other)), PROMPTS, []).vocab_size == 44
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = [token for token in vocab if token in "12"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="different tokenizers"):
        preflight(spec(teacher_path=str(other)), PROMPTS, [])


@pytest.mark.parametrize("missing", ["student_path", "teacher_path"])
def test_a_missing_model_folder_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no tokenizer can be loaded from '.*nowhere'") as caught:
        preflight(spec(**{missing: str(tmp_path / "nowhere")}), PROMPTS, [])
    assert "\n" not in str(caught.value)


def test_a_chat_template_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(ModelError, match=r"has no chat template.*data\.template=completion"):
        preflight(spec(student_template=Template.chat), PROMPTS, [])


def test_a_teacher_that_needs_solutions() -> None:
    with pytest.raises(DataError, match="'short' has no solution"):
        preflight(spec(teacher_template=Template.completion_with_solution), PROMPTS, [])
