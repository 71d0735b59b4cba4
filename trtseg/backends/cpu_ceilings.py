"""What the CPU reaches at its best: one large convolution in OpenVINO, and one large copy."""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from trtseg.architecture import KERNEL
from trtseg.backends.base import Ceilings
from trtseg.backends.openvino_library import calling, openvino_module, settings

if TYPE_CHECKING:
    from collections.abc import Callable

#: Channels in and out of the convolution, and its result's side.
_CONVOLUTION = (128, 256, 32)

#: Bytes of the copy: far more than any cache.
_COPY_BYTES = 1 << 28


def measure(threads: int, precision: str) -> Ceilings:
    """Rates of one large convolution in OpenVINO and of one large copy, on this many threads.

    Parameters
    ----------
    threads : int
    precision : str
        ``f32`` or ``bf16``.

    Raises
    ------
    DeviceError
        OpenVINO fails.
    MemoryError
        There is not enough memory for the measurement.
    """
    return Ceilings(2 * _convolution_rate(threads, precision), _copy_rate(threads))


def _convolution_rate(threads: int, precision: str) -> float:
    """Multiply-adds a second."""
    source, target, side = _CONVOLUTION
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, source, *[side + KERNEL - 1] * 3), dtype=np.float32)
    weight = rng.standard_normal((target, source, *[KERNEL] * 3), dtype=np.float32)
    none = [0, 0, 0]
    with calling():
        openvino = openvino_module()
        opset = openvino.opset13
        given = opset.parameter(image.shape, np.float32)
        node = opset.convolution(given, opset.constant(weight), [1, 1, 1], none, none, [1, 1, 1])
        core = openvino.Core()
        model = core.compile_model(
            openvino.Model([node], [given], "ceiling"), "CPU", settings(threads, precision)
        )
        request = model.create_infer_request()
        seconds = _median_seconds(lambda: request.infer([image], share_inputs=True))
    return float(side**3 * KERNEL**3 * source * target / seconds)


def _copy_rate(threads: int) -> float:
    """Bytes read and written a second; numpy copies without holding the interpreter."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def copy() -> None:
        workers = [threading.Thread(target=np.copyto, args=(there, here)) for here, there in parts]
        for worker in workers:
            try:
                worker.start()
            except RuntimeError as error:  # there is no room for its stack
                raise MemoryError(str(error)) from error
        for worker in workers:
            worker.join()

    return 2 * _COPY_BYTES / _median_seconds(copy)


def _median_seconds(action: Callable[[], object], runs: int = 7) -> float:
    """Median of the runs after one that warms up."""
    action()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
