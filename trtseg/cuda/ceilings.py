"""What a GPU reaches at its best: one large matrix product and one large copy, timed by its clock.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from trtseg.backends.base import Ceilings
from trtseg.cuda.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trtseg.cuda.device import Device

#: Rows and columns of the matrices, of 384 MiB in all: a product of over a millisecond even on the
#: largest GPUs, which need about that long to reach their rate.
SIDE = 8192

#: Bytes of the copy: more than any cache holds.
COPY_BYTES = 1 << 28

_RUNS = 20
_HALF_BYTES = 2

#: Random values that fill the matrices, over and over: making all anew would take longer than the
#: measurement. An odd number, so that no two rows are alike.
_VALUES = (1 << 20) - 1

#: The tensors of an engine of the product, and how the library names their types.
FACTORS = ("one", "other")
PRODUCT = "product"


class Product(Protocol):
    """An engine that multiplies two float16 matrices; see `trtseg.cuda.chain.Executor`."""

    scratch_bytes: int

    def bind(self, tensors: Mapping[str, int], scratch: int) -> None:
        """Take addresses."""

    def enqueue(self) -> None:
        """Put one product into the stream."""


def product_tensors(side: int) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Name to mode, dtype and shape of the tensors of the product's engine."""
    shape = (side, side)
    inputs: dict[str, tuple[str, str, tuple[int, ...]]] = dict.fromkeys(
        FACTORS, ("INPUT", "HALF", shape)
    )
    return {**inputs, PRODUCT: ("OUTPUT", "HALF", shape)}


def measure(device: Device, product: Product, *, side: int, copy_bytes: int) -> Ceilings:
    """Time both; `device` is active.

    Parameters
    ----------
    device : Device
    product : Product
    side : int
        Rows and columns of its matrices.
    copy_bytes : int

    Raises
    ------
    OutOfDeviceMemory
        There is no room for matrices and copies.
    DeviceError
        The device fails.
    """
    memory = Memory(device)
    size = _HALF_BYTES * side**2
    try:
        sizes = dict.fromkeys((*FACTORS, PRODUCT), size)
        memory.reserve(
            {
                **sizes,
                "scratch": max(1, product.scratch_bytes),
                "from": copy_bytes,
                "to": copy_bytes,
            },
            "the measurement of the GPU's ceilings",
        )
        # Random, for what a GPU draws and so how fast it clocks depends on the values.
        values = np.random.default_rng(0).standard_normal(_VALUES, dtype=np.float32)
        pinned = memory.pinned("factor", size)
        pinned.view(np.float16)[...] = np.resize(values.astype(np.float16), side**2)
        for name in FACTORS:
            device.upload(memory[name], pinned)
        device.zero(memory["from"], copy_bytes)
        product.bind({name: memory[name] for name in sizes}, memory["scratch"])
        multiplied = _seconds(device, product.enqueue)
        copied = _seconds(device, lambda: device.copy(memory["to"], memory["from"], copy_bytes))
    finally:
        device.synchronize()
        memory.release()
    return Ceilings(2 * side**3 / multiplied, 2 * copy_bytes / copied)


def _seconds(device: Device, action: Callable[[], None]) -> float:
    """Of one action, on average of a row of them after some to warm up."""
    begun, ended = device.event(), device.event()
    for count in (3, _RUNS):
        device.record(begun)
        for _ in range(count):
            action()
        device.record(ended)
        device.synchronize()
    return device.seconds(begun, ended) / _RUNS
