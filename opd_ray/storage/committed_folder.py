"""Folders that appear whole or not at all, and survive a power cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


class FolderDraft:
    """A temporary folder next to `folder` that takes its place with `commit`.

    What was written is on the disk before it gets its name. An older `folder` is set aside first and deleted last: if
    the process dies in between, the next draft puts it back before anything else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder.with_name(f".{folder.name}.partial")
        self._aside = folder.with_name(f".{folder.name}.replaced")

    def begin(self) -> Path:
        """Create the temporary folder, empty; returns it."""
        if self._aside.exists() and not self.folder.exists():
            self._aside.rename(self.folder)
        self.discard()
        shutil.rmtree(self._aside, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def commit(self) -> None:
        """Write everything through to the disk, then rename."""
        _sync_tree(self.temporary)
        if self.folder.exists():
            self.folder.rename(self._aside)
        self.temporary.rename(self.folder)
        sync(self.folder.parent)
        shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the temporary folder, if there is one."""
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` only if the block ends well."""
    draft = FolderDraft(folder)
    try:
        yield draft.begin()
        draft.commit()
    except BaseException:
        draft.discard()
        raise


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
