"""The learning-rate schedule, by hand."""

from __future__ import annotations

import pytest

from opd_ray.config.choices import LrSchedule
from opd_ray.learner.schedule import lr_factor


def factors(schedule: LrSchedule, warmup_steps: int, num_steps: int) -> list[float]:
    return [
        lr_factor(step, schedule=schedule, warmup_steps=warmup_steps, num_steps=num_steps)
        for step in range(num_steps + 1)
    ]


def test_constant_after_warmup() -> None:
    assert factors(LrSchedule.constant, 3, 5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_reaches_zero_at_the_end() -> None:
    assert factors(LrSchedule.linear, 0, 4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = factors(LrSchedule.cosine, 0, 4)
    assert values[2] == pytest.approx(0.5)
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.0)
    assert values == sorted(values, reverse=True)
