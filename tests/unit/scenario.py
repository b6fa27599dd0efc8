"""Scenarios on an event loop of their own, which end in time or fail."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, timeout=20))
