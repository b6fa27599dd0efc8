"""The lag of the controller's event loop: measured, reported, and an alarm once."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from opd_ray.training.loop_lag import LoopLag
from tests.unit.fake_actors import Run, World, config


async def measured(lag: LoopLag, blocked_s: float) -> dict[str, float]:
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    time.sleep(blocked_s)
    await asyncio.sleep(0.03)
    task.cancel()
    return lag.take()


def test_blocking_work_shows_and_alarms_once(caplog: pytest.LogCaptureFixture) -> None:
    lag = LoopLag(alarm_s=0.1)
    with caplog.at_level(logging.WARNING, "opd_ray"):
        for _ in range(2):
            assert asyncio.run(measured(lag, 0.3))["controller/loop_lag_s/p99"] > 0.2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "telemetry.max_loop_lag_s=0.1" in caplog.text


def test_the_p99_is_of_the_measurements_since_the_last_look() -> None:
    now = iter(range(1000))
    lag = LoopLag(alarm_s=1.0, clock=lambda: next(now) / 100)
    lag._lags_s = [index / 1000 for index in range(200)]
    assert lag.take() == {"controller/loop_lag_s/p99": 0.197}
    assert lag.take() == {}


def test_results_are_written_in_a_thread_and_the_lag_is_a_metric() -> None:
    threads: set[str] = set()

    class Watched(Run):
        def _step_done(self, *args: object) -> None:
            threads.add(threading.current_thread().name)
            super()._step_done(*args)  # type: ignore[arg-type]

    async def scenario() -> Run:
        run = Watched(config(1, 1, 4), World(1, 2))
        step = run.learner.train_step

        async def slow_step(*args: Any) -> Any:
            await asyncio.sleep(0.05)
            return await step(*args)

        run.learner.train_step = slow_step  # type: ignore[method-assign,assignment]
        return await run.train()

    done = asyncio.run(scenario())
    assert threads and threading.main_thread().name not in threads
    assert all(metrics["controller/loop_lag_s/p99"] >= 0 for _, metrics in done.steps)
