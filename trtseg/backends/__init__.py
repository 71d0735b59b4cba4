"""What runs a built network over a volume; each library is imported by one module only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtseg.errors import UsageError

if TYPE_CHECKING:
    from trtseg.backends.base import Backend
    from trtseg.backends.tensorrt import TensorRTBackend

#: Precisions of the CPU form.
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


def open_cpu(*, threads: int | None = None, precision: str = "f32") -> Backend:
    """Open the CPU.

    Parameters
    ----------
    threads : int, optional
        Default the cores this process may run on.
    precision : str
        ``"f32"``, DeepMedic's labels; or ``"bf16"``, faster where the processor has it, with a few
        labels changed.

    Raises
    ------
    UsageError
        The precision or the threads mean nothing.
    DeviceError
        OpenVINO has no CPU device here, or the processor lacks the precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}", expected=" or ".join(PRECISIONS))
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads", expected="at least 1")
    from trtseg.backends.openvino import OpenVINOBackend

    return OpenVINOBackend(threads=threads, precision=precision)


def open_gpu(index: int) -> TensorRTBackend:
    """Open a GPU, with TensorRT-RTX or TensorRT.

    Raises
    ------
    DeviceError
        The driver, the GPU, pycuda or the library is missing; the message says which.
    """
    from trtseg.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(index)
