"""Files that appear whole or not at all, and digests of them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trtseg.errors import OutputError

#: Age in seconds from which a temporary file that nobody holds is taken for abandoned: a day. No
#: write takes that long, and clocks of file servers are less wrong than that.
ABANDONED_AFTER = 86_400

_CHUNK = 1 << 20
_ELSEWHERE = "choose another output folder with -o, or make room"


@contextlib.contextmanager
def atomic_write(path: Path, *, action: str = _ELSEWHERE) -> Iterator[BinaryIO]:
    """Write `path` so that its name shows the old file, the new one, or nothing.

    A temporary file in the same folder is written, flushed to disk and renamed over `path`; on any
    exception, KeyboardInterrupt included, it is removed. A process that is killed outright leaves
    its own behind: a later write to the same name removes it once it is a day old.

    Parameters
    ----------
    path : Path
        The final name. Its folder must exist.
    action : str
        What the user can do where it cannot be written.

    Yields
    ------
    BinaryIO
        The temporary file, open for binary writing.

    Raises
    ------
    OutputError
        The folder cannot be written, or the disk is full.
    """
    _sweep(path)
    # Named before it is made, so that an interrupt in between still finds what to remove.
    temporary = path.parent / f"{_start(path)}{secrets.token_hex(8)}.part"
    try:
        with temporary.open("xb") as stream:
            with contextlib.suppress(OSError):  # a file system without locks: no sweeping there
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)  # while the lock is held
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}",
            expected="a folder that can be written, with room on the disk",
            action=action,
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_json(path: Path, data: Any, *, action: str = _ELSEWHERE) -> None:
    """Write `data` as indented JSON with sorted keys, atomically; see `atomic_write`."""
    with atomic_write(path, action=action) as stream:
        stream.write(json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """`data` as indented JSON with sorted keys, ASCII, as `atomic_write_json` writes it."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def json_seal(data: Any) -> str:
    """SHA-256, hex, of `data` as JSON: stored beside it, it shows any change of it."""
    return sha256_bytes(json.dumps(data, sort_keys=True).encode())


def _start(path: Path) -> str:
    """What the names of its temporary files start with; cut, for names have a longest length."""
    return f".{path.name[:32]}."


def _sweep(path: Path) -> None:
    """Remove the temporary files of `path` that killed writers left, as far as that is possible."""
    ours = re.compile(re.escape(_start(path)) + r"[0-9a-f]{16}\.part")
    with contextlib.suppress(OSError):
        for found in path.parent.iterdir():
            if ours.fullmatch(found.name):
                _remove_abandoned(found)


def _remove_abandoned(temporary: Path) -> None:
    """Remove a temporary file of this user that is old and that no process holds the lock of."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        # Writable, for some file systems give the lock on no other; a link or a pipe is not ours.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(temporary, flags)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        old = time.time() - found.st_mtime > ABANDONED_AFTER
        if old and found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode):
            temporary.unlink()


def make_folder(path: Path) -> None:
    """Create `path` and its parents.

    Raises
    ------
    OutputError
        It cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}",
            expected="a folder, or a place where one can be made",
            action="choose another folder",
        ) from error


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before anything is computed; nothing is left there.

    Parameters
    ----------
    path : Path
        Its folder need not exist.
    option : str
        What names the file on the command line.

    Raises
    ------
    OutputError
        The name is a folder's, or the folder cannot be made or written.
    """
    there = next((one for one in path.parents if os.path.lexists(one)), path.parent)
    try:
        if path.is_dir():
            there = path
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(
            f"{there}: {error.strerror or error}",
            expected=f"a folder in which {path.name} can be written",
            action=f"choose another {option}",
        ) from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    return _digest(path, hashlib.sha256())


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def git_blob_sha1(path: Path) -> str:
    """Hex SHA-1 of git's blob object for a file: sha1("blob <size>" + NUL + content)."""
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % path.stat().st_size)
    return _digest(path, digest)


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is; some file systems refuse, which costs
    # durability on power loss but never atomicity.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
