"""The log: what was run, when and with what, on scans that are known by their digest alone.

Above level DEBUG a record holds no path, no file name and no text of a header; a record that names
a file is a DEBUG record. Nothing goes to the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from trtseg.errors import OutputError, TrtsegError, UsageError
from trtseg.files import make_folder

#: The one logger of the package; a program that uses trtseg may attach handlers of its own.
LOG = logging.getLogger("trtseg")
LOG.addHandler(logging.NullHandler())  # else Python prints warnings nobody asked for to stderr

_SCANS = (".nii", ".nii.gz", ".hdr", ".img")


@contextlib.contextmanager
def log_to(path: Path | None, *, names: bool = False) -> Iterator[None]:
    """Add the log to the end of a file while the block runs.

    Parameters
    ----------
    path : Path, optional
        Text file, made if missing, and its folder too; None keeps no log.
    names : bool
        Whether DEBUG records, which name files, are kept too.

    Raises
    ------
    UsageError
        The name is one of a scan.
    OutputError
        The file cannot be opened; or, at the end of a block that itself raised nothing, a record
        could not be written.
    """
    if path is None:
        yield
        return
    handler = _open(path)
    level, propagate = LOG.level, LOG.propagate
    LOG.setLevel(logging.DEBUG if names else logging.INFO)
    LOG.propagate = False  # to handlers that other libraries put on the root logger
    LOG.addHandler(handler)
    try:
        yield
    except TrtsegError as error:
        LOG.error("ended: %s, exit code %d", type(error).__name__, error.exit_code)
        raise
    except KeyboardInterrupt:
        LOG.error("interrupted")
        raise
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate
        handler.close()
    if handler.error is not None:
        raise _unwritable(path, handler.error)


class _FileHandler(logging.Handler):
    """Remembers the first error instead of printing every one with its traceback."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self.error: OSError | None = None
        form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
        form.converter = time.localtime
        self.setFormatter(form)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._stream.write(self.format(record) + "\n")
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error

    def close(self) -> None:
        try:
            self._stream.close()
        except OSError as error:
            self.error = self.error or error
        super().close()


def _open(path: Path) -> _FileHandler:
    if path.name.lower().endswith(_SCANS):
        raise UsageError(
            f"--log-file {path}", expected="the name of a text file, such as trtseg.log"
        )
    make_folder(path.parent)
    try:
        # A file name may hold bytes that are no text; they are shown as escapes.
        return _FileHandler(path.open("a", encoding="utf-8", errors="backslashreplace"))
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"{path}: {getattr(error, 'strerror', None) or error}",
        expected="a file that can be written, with room on the disk",
        action="choose another --log-file",
    )


@contextlib.contextmanager
def stopwatch(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds the block takes to those of a stage, and log them."""
    started = time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - started
        seconds[stage] = seconds.get(stage, 0.0) + elapsed
        LOG.info("%s: %.2f s", stage, elapsed)
