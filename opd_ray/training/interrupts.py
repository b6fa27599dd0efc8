"""Orderly ends of a verb: Ctrl-C and SIGTERM both let its clean-up run."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run_interruptible(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end; cancelled (`end_on_sigterm`) it counts as interrupted: `KeyboardInterrupt`."""
    try:
        return asyncio.run(main)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def end_on_sigterm() -> None:
    """Let SIGTERM (a scheduler's kind word) end the running task like Ctrl-C, so that its clean-up runs.

    Call it after ``ray.init``, which puts a handler of its own in place.
    """
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
