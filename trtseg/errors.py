"""The one tree of exceptions, and the exit code each branch ends the command line with.

Every message says what was found, what was expected, and what to do, in that order, on one line.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_OK = 0
EXIT_INPUT = 2
EXIT_MODEL = 3
EXIT_DEVICE = 4
EXIT_OUTPUT = 5
EXIT_SUSPECT = 6
EXIT_INTERRUPTED = 130


class TrtsegError(Exception):
    """Base of every error trtseg raises on purpose.

    Parameters
    ----------
    found : str
        What was found, naming the file, tensor or option concerned.
    expected : str, optional
        What was expected instead.
    action : str, optional
        What the user can do about it, best as a command.
    """

    exit_code = 1

    def __init__(self, found: str, *, expected: str = "", action: str = "") -> None:
        self.found = found
        self.expected = expected
        self.action = action
        parts = [found]
        if expected:
            parts.append(f"expected {expected}")
        if action:
            parts.append(action)
        super().__init__("; ".join(parts))


class InputError(TrtsegError):
    """A scan, mask or array that cannot be segmented as it is."""

    exit_code = EXIT_INPUT


class UsageError(TrtsegError):
    """Options or arguments that contradict each other or mean nothing."""

    exit_code = EXIT_INPUT


class ModelError(TrtsegError):
    """A checkpoint or its config: missing, damaged, of another architecture, or not verified."""

    exit_code = EXIT_MODEL


class DownloadError(ModelError):
    """The published weights could not be fetched; nothing was changed on disk."""


class EngineError(TrtsegError):
    """A built network: missing, stale, damaged, or wrong against its checkpoint."""

    exit_code = EXIT_MODEL


class EngineMissingError(EngineError):
    """Nothing is built yet for the requested model set; building it is the remedy."""


class NotCompiledError(EngineMissingError):
    """The networks are built, but not compiled for a GPU; compiling them is the remedy."""


class DeviceError(TrtsegError):
    """The requested device, its library or its memory is not available."""

    exit_code = EXIT_DEVICE


class MissingExtraError(ModelError):
    """An optional package is not installed; the message names the feature and the pip command."""


class OutputError(TrtsegError):
    """A result could not be written; nothing is left half-written under its final name."""

    exit_code = EXIT_OUTPUT


#: Worst first: what the exit code of a batch is chosen by.
_BY_WEIGHT = (
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    EXIT_DEVICE,
    EXIT_MODEL,
    EXIT_INPUT,
    EXIT_SUSPECT,
    EXIT_OK,
)


def worst_exit_code(codes: Sequence[int]) -> int:
    """Exit code of a batch: the worst of its scans' (130 > 5 > 4 > 3 > 2 > 6 > 0)."""
    return min(codes, key=_BY_WEIGHT.index, default=EXIT_OK)
