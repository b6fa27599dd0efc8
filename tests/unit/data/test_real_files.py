"""The published problem files, where OPD_RAY_TEST_DATA names a folder that has them (see tests/README.md)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opd_ray.config.choices import AnswerFormat
from opd_ray.data.prompts import read_prompts
from opd_ray.evaluation.grading import check_problems
from tests.unit.benchmark_files import refused_by_their_own_key

if "OPD_RAY_TEST_DATA" not in os.environ:
    pytest.skip("OPD_RAY_TEST_DATA names no folder with the published data sets", allow_module_level=True)

DATA = Path(os.environ["OPD_RAY_TEST_DATA"])
ROWS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "gsm8k_test": 1319, "gsm8k_train": 7473}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_read_and_every_key_is_correct(name: str) -> None:
    prompts = read_prompts(str(DATA / f"{name}.jsonl"))
    assert len(prompts) == ROWS[name]
    answer_format = AnswerFormat.last_number if name.startswith("gsm8k") else AnswerFormat.boxed
    check_problems(prompts, answer_format)
    if name.startswith("gsm8k"):
        assert all(prompt.solution for prompt in prompts)
    assert refused_by_their_own_key(prompts, answer_format) == []
