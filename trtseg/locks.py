"""One process at a time: a lock on a file, which processes of one machine or file system share."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock on a file, which is made where it is missing and never removed.

    Parameters
    ----------
    path : Path
    waiting : callable
        Told before another process is waited for.

    Yields
    ------
    bool
        Whether it is held: False on a file system without locks.

    Raises
    ------
    OSError
        The file cannot be opened.
    """
    descriptor = _open(path)
    try:
        yield _lock(descriptor, waiting)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except PermissionError:
        # Made by another user of a shared folder; a lock can be had on it all the same.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lock(descriptor: int, waiting: Callable[[], None]) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
