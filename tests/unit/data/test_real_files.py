"""Real benchmark and training files, where they lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_ray.config.choices import AnswerFormat
from opd_ray.data.prompts import read_prompts
from opd_ray.evaluation.grading import check_problems

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
ROWS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "gsm8k_test": 1319, "gsm8k_train": 7473}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data files are not beside this checkout")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_read(name: str) -> None:
    prompts = read_prompts(str(DATA / f"{name}.jsonl"))
    assert len(prompts) == ROWS[name]
    assert all(prompt.answer for prompt in prompts)
    if name.startswith("gsm8k"):
        check_problems(prompts, AnswerFormat.last_number)
        assert all(prompt.solution for prompt in prompts)
