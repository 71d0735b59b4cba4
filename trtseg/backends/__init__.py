"""What runs a built network over a volume; each module is the sole importer of its library."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtseg.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from trtseg.backends.base import Backend

#: Precisions of the CPU form; the first is the default.
PRECISIONS = ("f32", "bf16")

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


def open_backend(device: str, *, threads: int | None = None, precision: str = "f32") -> Backend:
    """Open a device by name; ``auto`` is the best this version can run on, which is the CPU.

    Parameters
    ----------
    device : str
    threads : int, optional
        CPU threads; default the cores this process may run on.
    precision : str
        ``"f32"``, DeepMedic's labels; or ``"bf16"``, faster where the processor has it, with a few
        labels changed.

    Raises
    ------
    UsageError
        The name means nothing.
    DeviceError
        The device is not available.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}", expected=" or ".join(PRECISIONS))
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads", expected="at least 1")
    if check_device(device).startswith("cuda"):
        raise DeviceError(
            f"device {device!r}: this version of trtseg has no CUDA runtime",
            expected="cpu or auto",
            action="run with --device cpu",
        )
    from trtseg.backends.openvino import OpenVINOBackend

    return OpenVINOBackend(threads=threads, precision=precision)
