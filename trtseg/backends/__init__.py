"""What runs a built network over a volume; each module is the sole importer of its library."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtseg.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from trtseg.backends.base import Backend

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device(device: str) -> str:
    """Give `device` back if it names one.

    Raises
    ------
    UsageError
        It is none of ``auto``, ``cpu``, ``cuda`` and ``cuda:N``.
    """
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"device {device!r}", expected="auto, cpu, cuda or cuda:N")
    return device


def open_backend(device: str, *, threads: int | None = None) -> Backend:
    """Open a device by name; ``auto`` is the best this version can run on, which is the CPU.

    Raises
    ------
    UsageError
        The name means nothing.
    DeviceError
        The device is not available.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads", expected="at least 1")
    if check_device(device).startswith("cuda"):
        raise DeviceError(
            f"device {device!r}: this version of trtseg has no CUDA runtime",
            expected="cpu or auto",
            action="run with --device cpu",
        )
    from trtseg.backends.openvino import OpenVINOBackend

    return OpenVINOBackend(threads=threads)
