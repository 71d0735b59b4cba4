"""Files that appear whole or not at all, and digests of them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trtseg.errors import OutputError

_CHUNK = 1 << 20


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write `path` so that its name shows the old file, the new one, or nothing.

    A temporary file in the same folder is written, flushed to disk and renamed over `path`; on any
    exception, KeyboardInterrupt included, it is removed.

    Parameters
    ----------
    path : Path
        The final name. Its folder must exist.

    Yields
    ------
    BinaryIO
        The temporary file, open for binary writing.

    Raises
    ------
    OutputError
        The folder cannot be written, or the disk is full.
    """
    # Named before it is made, so that an interrupt in between still finds what to remove.
    temporary = path.parent / f".{path.name[:32]}.{secrets.token_hex(8)}.part"
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}",
            expected="a folder that can be written, with room on the disk",
            action="choose another output folder with -o, or make room",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON with sorted keys, atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


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
