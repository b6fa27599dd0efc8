"""Lag of the driver's event loop: the sign of blocking work in the controller's process."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

_INTERVAL_S = 0.02

logger = logging.getLogger("opd_ray")


class LoopLag:
    """Measures by how much short sleeps overrun; a p99 above `alarm_s` is logged, once per run."""

    def __init__(self, alarm_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._alarm_s = alarm_s
        self._clock = clock
        self._lags_s: list[float] = []
        self._has_alarmed = False

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            begun = self._clock()
            await asyncio.sleep(_INTERVAL_S)
            self._lags_s.append(max(0.0, self._clock() - begun - _INTERVAL_S))

    def take(self) -> dict[str, float]:
        """Return `controller/loop_lag_s/p99` (seconds) since the last call; nothing where nothing was measured."""
        lags_s, self._lags_s = sorted(self._lags_s), []
        if not lags_s:
            return {}
        p99 = lags_s[math.ceil(0.99 * len(lags_s)) - 1]
        if p99 > self._alarm_s and not self._has_alarmed:
            self._has_alarmed = True
            logger.warning(
                "the controller's event loop runs %.2f s late (p99), above telemetry.max_loop_lag_s=%g: something "
                "blocks it, or its machine has too few free cores; see controller/loop_lag_s",
                p99,
                self._alarm_s,
            )
        return {"controller/loop_lag_s/p99": p99}
