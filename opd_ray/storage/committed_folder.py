"""Folders that appear whole or not at all, and outlast a power cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


@contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it takes the place of `folder` only if the block ends well.

    What was written is on the disk before it gets its name. An older `folder` is set aside first and deleted last: if
    the process dies in between, the next call puts it back before anything else.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    aside = folder.with_name(f".{folder.name}.replaced")
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


@asynccontextmanager
async def committed_in_thread(folder: Path) -> AsyncIterator[Path]:
    """`committed_folder`, which waits for the disk, without holding up the event loop."""
    commit = committed_folder(folder)
    try:
        temporary = await ended_in_thread(commit.__enter__)
        yield temporary
    except BaseException:
        await ended_in_thread(commit.__exit__, *sys.exc_info())
        raise
    await ended_in_thread(commit.__exit__, None, None, None)


async def ended_in_thread(function: Callable[..., _T], *args: Any) -> _T:
    """`asyncio.to_thread` which, when cancelled, ends after `function` has: nothing is written behind one's back.

    Who cancels a writer may remove or write the same files as soon as it has ended.
    """
    work = asyncio.create_task(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            # Whoever cancels again waits, too.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()
        raise


def _sync_tree(folder: Path) -> None:
    """Wait until every file and folder under `folder` is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
