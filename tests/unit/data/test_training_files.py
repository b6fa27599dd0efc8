"""The data of ``conf/data``, read from files with the columns that the published data sets have."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from opd_ray.config.choices import AnswerFormat
from opd_ray.data.prompts import read_prompts
from opd_ray.evaluation.answers import reference
from opd_ray.main import conf_dir
from opd_ray.types import Prompt
from tests.unit.benchmark_files import DATA, refused_by_their_own_key

FILES = {"gsm8k": "gsm8k_train", "dapo17k": "dapo17k"}


def read(name: str) -> list[Prompt]:
    part: dict[str, Any] = yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    return read_prompts(str(DATA / f"{FILES[name]}.jsonl"), fields=part["fields"], unique=part.get("unique", False))


def test_repeated_questions_are_taken_once() -> None:
    prompts = read("dapo17k")
    assert len(prompts) == 8 and prompts[0].problem.startswith("Solve the following math problem step by step.")
    assert [prompt.answer for prompt in prompts][:3] == ["28", "24", "24"]


def test_solutions_hold_their_answers() -> None:
    prompts = read("gsm8k")
    assert len(prompts) == 12 and all("####" in (prompt.solution or "") for prompt in prompts)
    assert reference(AnswerFormat.last_number, prompts[3].solution or "") == "400"


@pytest.mark.parametrize(
    ("name", "answer_format"), [("gsm8k", AnswerFormat.last_number), ("dapo17k", AnswerFormat.boxed)]
)
def test_their_own_keys_are_correct(name: str, answer_format: AnswerFormat) -> None:
    assert refused_by_their_own_key(read(name), answer_format) == []
