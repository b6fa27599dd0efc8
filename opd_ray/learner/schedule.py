"""The learning-rate schedule, as a pure function of the step."""

from __future__ import annotations

import math

from opd_ray.config.choices import LrSchedule


def lr_factor(step: int, *, schedule: LrSchedule, warmup_steps: int, num_steps: int) -> float:
    """Factor on the peak learning rate at 0-based optimizer `step`.

    Rises linearly over the first `warmup_steps` (the first step already moves: 1 / (warmup_steps + 1)), then stays, or
    falls linearly or by a half cosine to 0 at `num_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule is LrSchedule.linear:
        return 1.0 - progress
    if schedule is LrSchedule.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
