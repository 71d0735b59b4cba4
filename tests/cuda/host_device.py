"""A device that is the host: ``kernels.cu`` compiled by a C++ compiler, and a stream that is lazy.

What is put into the stream runs when the host waits for it, and not before, so that host memory
which is used again too early shows in the results. What is uploaded aside runs when the stream
passes a join, and not before, or where the device is hasty at once: a join that was forgotten, and
a buffer that is still in use, show. Device memory starts with rubbish in it and has guards on both
sides.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtseg.cuda.compile import kernel_source
from trtseg.cuda.device import BLOCK, OutOfDeviceMemory
from trtseg.cuda.launches import Launch

GUARD = 256
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC")


@functools.cache
def kernel_library() -> ctypes.CDLL:
    """The kernels, compiled for the host once per run; skips the test where nothing compiles."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++ or c++) to build the kernels for the host")
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "kernels.so"
        subprocess.run(
            [compiler, *FLAGS, "-DTRTSEG_HOST", "-shared", "-x", "c++", "-", "-o", str(target)],
            input=kernel_source(),
            text=True,
            check=True,
        )
        return ctypes.CDLL(str(target))


class HostDevice:
    """See `trtseg.cuda.device.Device`.

    Parameters
    ----------
    capacity : int
        Bytes of "device" memory.
    hasty : bool
        Whether what is uploaded aside is there at once.

    Attributes
    ----------
    uploads, asides : list of int
        Bytes of each upload, in the stream and aside.
    """

    name = "host double"
    compute_capability = (8, 6)
    stream = 77

    def __init__(self, capacity: int = 1 << 30, *, hasty: bool = False) -> None:
        self.capacity = capacity
        self.hasty = hasty
        self.uploads: list[int] = []
        self.asides: list[int] = []
        self.allocations = 0  # ever made, on either side
        self.loaded: dict[str, bytes] = {}
        self.closed = False
        self._library = kernel_library()
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._queue: deque[Callable[[], None]] = deque()
        self._aside: list[Callable[[], None]] = []  # not joined yet
        self._copies: list[tuple[int, NDArray[np.uint8]]] = []  # under way aside, joined or not
        self._active = 0
        self._ticks = 0

    # Device

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._active += 1
        yield
        self._active -= 1

    def memory(self) -> tuple[int, int]:
        assert self._active
        return self.capacity - self.in_use, self.capacity

    def allocate(self, size: int) -> int:
        assert self._active
        assert size > 0
        self.allocations += 1
        if size > self.capacity - self.in_use:
            raise OutOfDeviceMemory(size, self.capacity - self.in_use, "one buffer")
        memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
        address = memory.ctypes.data + GUARD
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        assert self._active
        assert all(address != one for one, _ in self._copies), "freed under a copy to it"
        self._check_guards(address)
        del self._memory[address]

    def pinned(self, size: int) -> NDArray[np.uint8]:
        assert self._active
        self.allocations += 1
        memory = np.full(size, 0xA5, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        assert self._active
        assert not self._queue, "freed while the stream may still use it"
        assert not any(self._within(one, memory) for _, one in self._copies), "freed under a copy"
        del self._pinned[memory.ctypes.data]

    def load_kernels(self, files: Mapping[str, bytes]) -> None:
        assert self._active
        self.loaded = dict(files)

    def launch(self, launch: Launch) -> None:
        assert launch.threads > 0
        function = getattr(self._library, launch.kernel)
        blocks = -(-launch.threads // BLOCK)
        self.submit(lambda: function(launch.parameters, ctypes.c_longlong(blocks * BLOCK)))

    def upload(self, address: int, source: NDArray[np.uint8]) -> None:
        assert any(self._within(source, one) for one in self._pinned.values())
        self.uploads.append(source.nbytes)
        self.submit(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))

    def upload_aside(self, address: int, source: NDArray[np.uint8]) -> None:
        assert self._active
        assert any(self._within(source, one) for one in self._pinned.values())
        self.asides.append(source.nbytes)

        def work() -> None:
            ctypes.memmove(address, source.ctypes.data, source.nbytes)
            del self._copies[0]

        self._copies.append((address, source))
        if self.hasty:
            work()
        else:
            self._aside.append(work)

    def join(self) -> None:
        joined, self._aside = self._aside, []
        self.submit(lambda: [work() for work in joined])

    def download(self, target: NDArray[np.uint8], address: int) -> None:
        assert any(self._within(target, one) for one in self._pinned.values())
        self.submit(lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes))

    def copy(self, target: int, source: int, size: int) -> None:
        self.submit(lambda: ctypes.memmove(target, source, size))

    def zero(self, address: int, size: int) -> None:
        self.submit(lambda: ctypes.memset(address, 0, size))

    def event(self) -> list[int]:
        assert self._active
        self.allocations += 1
        return []

    def record(self, event: list[int]) -> None:
        event.clear()
        self.submit(lambda: event.append(self._ticks))

    def wait(self, event: list[int]) -> None:
        while not event:
            self._step()

    def seconds(self, first: list[int], last: list[int]) -> float:
        return (last[0] - first[0]) * 1e-6

    def synchronize(self) -> None:
        assert self._active
        while self._queue:
            self._step()

    def close(self) -> None:
        with self.active():
            self.join()
            self.synchronize()
        for address in self._memory:
            self._check_guards(address)
        self.closed = True

    # For tests

    @property
    def in_use(self) -> int:
        """Bytes of device memory handed out."""
        return sum(len(memory) - 2 * GUARD for memory in self._memory.values())

    @property
    def in_flight(self) -> int:
        """Uploads aside that have not ended."""
        return len(self._copies)

    @property
    def buffers(self) -> int:
        """Pieces of memory that are not yet given back, on either side."""
        return len(self._memory) + len(self._pinned)

    def submit(self, work: Callable[[], Any]) -> None:
        """Put work into the stream."""
        assert self._active
        self._queue.append(work)

    def put(self, array: NDArray[Any]) -> int:
        """A new buffer with an array's bytes, in their order in memory."""
        with self.active():
            address = self.allocate(max(1, array.nbytes))
        ctypes.memmove(address, array.tobytes(order="A"), array.nbytes)
        return address

    def get(self, address: int, dtype: Any, shape: Any) -> NDArray[Any]:
        """A copy of what lies at an address, once the stream has passed."""
        with self.active():
            self.synchronize()
        return view(address, dtype, shape).copy()

    def run(self, *launches: Launch) -> None:
        """Run kernels, and check that they wrote to their buffers only."""
        with self.active():
            for launch in launches:
                self.launch(launch)
            self.synchronize()
        for address in self._memory:
            self._check_guards(address)

    def _step(self) -> None:
        self._ticks += 1
        self._queue.popleft()()

    def _check_guards(self, address: int) -> None:
        memory = self._memory[address]
        assert (memory[:GUARD] == 0xA5).all(), "written before a buffer"
        assert (memory[-GUARD:] == 0xA5).all(), "written past a buffer"

    @staticmethod
    def _within(part: NDArray[np.uint8], whole: NDArray[np.uint8]) -> bool:
        begin = whole.ctypes.data
        return begin <= part.ctypes.data and part.ctypes.data + len(part) <= begin + len(whole)


def view(address: int, dtype: Any, shape: Any) -> NDArray[Any]:
    """Memory at an address as an array; nothing is copied."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype, count).reshape(shape)
