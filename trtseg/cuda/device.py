"""A GPU: its memory, its streams, and the kernels loaded on it. The only importer of pycuda.

pycuda's driver module cannot be imported where there is no NVIDIA driver, so it is imported when a
GPU is opened and not before. Run through pycuda 2026.1 on a driver that is the host (see
tests/cuda/test_pycuda.py); not run on a GPU yet.

Ownership: a `CudaDevice` owns all that it hands out (device and host memory, events) and frees it
in `close`, in the order CUDA wants; who is handed an address or an event only borrows it.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trtseg.cuda.compile import FATBIN, loadable
from trtseg.errors import DeviceError, EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from trtseg.cuda.launches import Launch

    Bytes = NDArray[np.uint8]

#: Threads of a block: a multiple of the 32 that run together, and small enough for any kernel.
BLOCK = 256

#: CU_STREAM_NON_BLOCKING of cuda.h, which pycuda does not name. A stream without it waits for the
#: default stream, on which other code in the process may work, and cannot be captured beside it.
_NON_BLOCKING = 1

#: The driver's library, on every machine that has the driver.
DRIVER = "libcuda.so.1"

#: How pycuda is installed. It comes as source: it needs nvcc on PATH, the toolkit's headers, and a
#: libcuda to link with.
INSTALL_PYCUDA = "put nvcc of the CUDA toolkit on PATH, then pip install pycuda"

#: How it is built again, for what has changed since.
_REBUILD_PYCUDA = "pip install --force-reinstall --no-cache-dir --no-binary pycuda pycuda"


class OutOfDeviceMemory(DeviceError):  # noqa: N818 (the name of the condition, as CUDA has it)
    """The GPU has too little free memory.

    Parameters
    ----------
    needed : int or None
        Bytes, where that is known.
    free : int
        Bytes.
    purpose : str
        What they were needed for.
    """

    def __init__(self, needed: int | None, free: int, purpose: str) -> None:
        self.needed = needed
        self.free = free
        amount = "more" if needed is None else megabytes(needed)
        super().__init__(
            f"the GPU has {megabytes(free)} of free memory",
            expected=f"{amount} for {purpose}",
            action="close other programs on the GPU (nvidia-smi lists them), or run with "
            "--device cpu",
        )


def megabytes(size: int) -> str:
    """Bytes as text, in MiB, rounded up."""
    return f"{-(-size // (1 << 20))} MiB"


class Device(Protocol):
    """What the chain needs of a GPU; all work goes in order through one stream.

    Only what is uploaded aside does not: it starts at once, and is there for all that is put into
    the stream after the next `join`, and for nothing that was put there before.

    Every method but `active` and `close` is called while the device is active. Addresses are whole
    numbers. Copies to the device read page-locked memory after they return; it must not change
    before the stream has passed them.
    """

    name: str
    compute_capability: tuple[int, int]
    stream: int

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Make the device current for this thread."""

    def memory(self) -> tuple[int, int]:
        """Bytes free and bytes there are."""

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes, aligned to 256.

        Raises
        ------
        OutOfDeviceMemory
        """

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""

    def pinned(self, size: int) -> Bytes:
        """Page-locked host memory."""

    def free_pinned(self, memory: Bytes) -> None:
        """Give back what `pinned` gave; views of it are no longer valid."""

    def load_kernels(self, files: Mapping[str, bytes]) -> None:
        """Load the kernels; `files` is what `trtseg.cuda.compile.compile_kernels` returned."""

    def launch(self, launch: Launch) -> None:
        """Run a kernel."""

    def upload(self, address: int, source: Bytes) -> None:
        """Copy page-locked memory to the device."""

    def upload_aside(self, address: int, source: Bytes) -> None:
        """Copy page-locked memory to the device while the stream goes on with its work."""

    def join(self) -> None:
        """Let the stream wait, from here on, for all that was uploaded aside before."""

    def download(self, target: Bytes, address: int) -> None:
        """Copy to page-locked memory; it is there once the stream has passed it."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes within the device."""

    def zero(self, address: int, size: int) -> None:
        """Fill with zero bytes."""

    def event(self) -> Any:
        """A marker to be recorded."""

    def record(self, event: Any) -> None:
        """Put a marker into the stream."""

    def wait(self, event: Any) -> None:
        """Block until the stream has passed a marker."""

    def seconds(self, first: Any, last: Any) -> float:
        """Time between two markers that the stream has passed."""

    def synchronize(self) -> None:
        """Block until the stream is empty; what was uploaded aside is waited for if joined."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True)
class GpuInfo:
    """One GPU of this machine.

    Attributes
    ----------
    index : int
    name : str
    compute_capability : tuple of int
        Major and minor.
    memory : int
        Bytes.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory: int


def list_gpus() -> list[GpuInfo]:
    """The GPUs of this machine; not run on a GPU yet.

    Raises
    ------
    DeviceError
        pycuda or the driver is missing, or there is no GPU.
    """
    driver = _open_driver()
    with _errors(driver):
        devices = [driver.Device(index) for index in range(driver.Device.count())]
        return [
            GpuInfo(index, one.name(), tuple(one.compute_capability()), one.total_memory())
            for index, one in enumerate(devices)
        ]


class CudaDevice:
    """An NVIDIA GPU by pycuda; see `Device`. Not run on a GPU yet.

    The primary context is used, which TensorRT (and PyTorch in the same process) uses too.

    Parameters
    ----------
    index : int
        Which GPU, in the driver's order.

    Raises
    ------
    DeviceError
        pycuda, the driver or the GPU is missing; the message says which.
    """

    def __init__(self, index: int = 0) -> None:
        driver = _open_driver()
        count = driver.Device.count()
        if index >= count:
            raise DeviceError(
                f"no GPU cuda:{index}; this machine has {count}",
                expected=", ".join(f"cuda:{one}" for one in range(count)) or "an NVIDIA GPU",
                action="choose one of them, or run with --device cpu",
            )
        self._driver = driver
        self._allocations: dict[int, Any] = {}
        self._pinned: dict[int, Bytes] = {}
        self._functions: dict[str, Any] = {}
        self._module: Any = None
        self._stream: Any = None
        self._aside: Any = None
        self._arrived: Any = None
        with _errors(driver):
            device = driver.Device(index)
            self.name = str(device.name())
            self.compute_capability: tuple[int, int] = tuple(device.compute_capability())
            self._context = device.retain_primary_context()
        try:
            with self.active(), _errors(driver):
                self._stream = driver.Stream(_NON_BLOCKING)
                self.stream = int(self._stream.handle)
                self._aside = driver.Stream(_NON_BLOCKING)
                self._arrived = driver.Event()
        except DeviceError:
            self.close()
            raise

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make the context current for this thread, and the former one again afterwards."""
        with _errors(self._driver):
            self._context.push()
        try:
            yield
        finally:
            with _errors(self._driver):
                self._driver.Context.pop()

    def memory(self) -> tuple[int, int]:
        """See `Device`."""
        with _errors(self._driver):
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """See `Device`."""
        with _errors(self._driver, needed=size):
            allocation = self._driver.mem_alloc(size)
        address = int(allocation)
        self._allocations[address] = allocation
        return address

    def free(self, address: int) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._allocations.pop(address).free()

    def pinned(self, size: int) -> Bytes:
        """See `Device`."""
        try:
            with _errors(self._driver):
                memory: Bytes = self._driver.pagelocked_empty(size, np.uint8)
        except OutOfDeviceMemory as error:
            raise DeviceError(
                f"the system gives no {megabytes(size)} of page-locked memory",
                expected="that much free main memory, within the limit for locked memory",
                action="close other programs, or run with --device cpu",
            ) from error
        self._pinned[memory.ctypes.data] = memory
        return memory

    def free_pinned(self, memory: Bytes) -> None:
        """See `Device`."""
        owned = self._pinned.pop(memory.ctypes.data)
        with _errors(self._driver):
            # The array's base is pycuda's allocation; left to the garbage collector, it could be
            # freed while the context is not current, which pycuda cannot do.
            owned.base.free()  # type: ignore[union-attr]

    def load_kernels(self, files: Mapping[str, bytes]) -> None:
        """See `Device`; machine code is tried before PTX.

        Raises
        ------
        EngineError
            The driver takes none of the files.
        """
        refusals = []
        for name in loadable(files, self.compute_capability):
            try:
                self._module = self._driver.module_from_buffer(files[name])
            except (self._driver.Error, UnicodeDecodeError) as error:
                refusals.append(f"{name}: {_first_line(error)}")
            else:
                self._functions.clear()
                return
        raise _no_kernels(
            "; ".join(refusals) or "there are none for this GPU",
            int(self._driver.get_driver_version()),
            by_nvcc=FATBIN in files,
        )

    def launch(self, launch: Launch) -> None:
        """See `Device`."""
        with _errors(self._driver):
            function = self._functions.get(launch.kernel)
            if function is None:
                function = self._module.get_function(launch.kernel)
                function.prepare([f"{len(launch.parameters)}s"])
                self._functions[launch.kernel] = function
            function.prepared_async_call(
                (-(-launch.threads // BLOCK), 1), (BLOCK, 1, 1), self._stream, launch.parameters
            )

    def upload(self, address: int, source: Bytes) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._driver.memcpy_htod_async(address, source, self._stream)

    def upload_aside(self, address: int, source: Bytes) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._driver.memcpy_htod_async(address, source, self._aside)

    def join(self) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._arrived.record(self._aside)
            self._stream.wait_for_event(self._arrived)

    def download(self, target: Bytes, address: int) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._driver.memcpy_dtoh_async(target, address, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def zero(self, address: int, size: int) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._driver.memset_d8_async(address, 0, size, self._stream)

    def event(self) -> Any:
        """See `Device`."""
        with _errors(self._driver):
            return self._driver.Event()

    def record(self, event: Any) -> None:
        """See `Device`."""
        with _errors(self._driver):
            event.record(self._stream)

    def wait(self, event: Any) -> None:
        """See `Device`."""
        with _errors(self._driver):
            event.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        """See `Device`."""
        with _errors(self._driver):
            return float(last.time_since(first)) * 1e-3

    def synchronize(self) -> None:
        """See `Device`."""
        with _errors(self._driver):
            self._stream.synchronize()

    def close(self) -> None:
        """Free everything, from any thread; what failed is freed as far as it lets itself be."""
        context, self._context = self._context, None
        if context is None:
            return
        failed = self._driver.Error
        try:
            context.push()
        except failed:  # what is left goes with the context
            with contextlib.suppress(failed):
                context.detach()
            self._forget()
            return
        try:
            for stream in (self._stream, self._aside):
                if stream is not None:
                    with contextlib.suppress(failed):
                        stream.synchronize()
            del stream  # else it outlives the context, in which it is destroyed
            for allocation in self._allocations.values():
                with contextlib.suppress(failed):
                    allocation.free()
            for memory in self._pinned.values():
                with contextlib.suppress(failed):
                    memory.base.free()  # type: ignore[union-attr]
            self._forget()
        finally:
            # pycuda gives a context back in whatever thread where it takes it for the current one,
            # leaves it current, and makes the one before it, if that is pycuda's too, current above
            # it. So the driver's stack of contexts is rid of it before that.
            _pop_current()
            with contextlib.suppress(failed):
                context.detach()

    def _forget(self) -> None:
        """Drop pycuda's objects, which destroys what can be destroyed."""
        self._allocations.clear()
        self._pinned.clear()
        self._functions.clear()
        self._module = self._stream = self._aside = self._arrived = None


def _pop_current() -> None:
    """Take the current context off this thread's stack, of which pycuda is not told."""
    ctypes.CDLL(DRIVER).cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _open_driver() -> Any:
    """Import pycuda's driver module, initialised, with at least one GPU."""
    try:
        ctypes.CDLL(DRIVER)  # before pycuda: who has no driver is not helped by installing that
    except OSError as error:
        raise _no_driver(f"{DRIVER} cannot be loaded") from error
    try:
        import pycuda
    except ImportError as error:
        raise DeviceError(
            f"pycuda is not installed ({error})",
            expected="pycuda, by which trtseg drives NVIDIA GPUs",
            action=f"{INSTALL_PYCUDA}; or run with --device cpu",
        ) from error
    del pycuda
    import warnings

    try:
        with warnings.catch_warnings():
            # pycuda warns of a mismatch and then raises; the error below says it once.
            warnings.simplefilter("ignore", UserWarning)
            import pycuda.driver as driver
    except ImportError as error:
        raise _cannot_import(str(error)) from error
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        raise DeviceError(
            f"the NVIDIA driver finds no GPU it can use ({_first_line(error)})",
            expected="an NVIDIA GPU that nvidia-smi lists",
            action="check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu",
        ) from error
    if count == 0:
        raise DeviceError(
            "the NVIDIA driver lists no GPU",
            expected="an NVIDIA GPU that nvidia-smi lists",
            action="check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu",
        )
    return driver


def _no_driver(said: str) -> DeviceError:
    return DeviceError(
        f"the NVIDIA driver is missing ({said})",
        expected="libcuda.so.1, which comes with the driver",
        action="install the NVIDIA driver (nvidia-smi must work), or run with --device cpu",
    )


def _cannot_import(said: str) -> DeviceError:
    """The error of a pycuda that is installed and cannot be imported."""
    library = re.match(r"(lib[^:]+): cannot open", said)
    if library is not None and library[1].startswith("libcuda."):
        return _no_driver(said)
    if library is not None:
        return DeviceError(
            f"pycuda cannot load {library[1]}",
            expected="the libraries of the CUDA toolkit that pycuda was built with, where the "
            "system looks for libraries",
            action="put the folder lib64 of that toolkit into LD_LIBRARY_PATH, or into a file in "
            "/etc/ld.so.conf.d and run ldconfig; or run with --device cpu",
        )
    if re.search("undefined symbol: cu[A-Z]", said):  # a function of the driver
        return DeviceError(
            f"the NVIDIA driver is older than the CUDA toolkit pycuda was built with ({said})",
            expected="a driver of at least that CUDA version (nvidia-smi shows it)",
            action="update the driver, or build pycuda again with an older toolkit: "
            f"{_REBUILD_PYCUDA}",
        )
    return DeviceError(
        f"pycuda cannot be imported ({said})",
        expected="pycuda built for this Python and these libraries",
        action=f"build it again: {_REBUILD_PYCUDA}; or run with --device cpu",
    )


def _no_kernels(said: str, version: int, *, by_nvcc: bool) -> EngineError:
    """The error of a driver that loads no kernels; `version` is its CUDA's, as 12020 for 12.2."""
    major, minor = version // 1000, version % 1000 // 10
    package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    # nvcc would be taken again, whatever NVRTC is there.
    without = "take nvcc off PATH, CUDA_HOME and CUDA_ROOT, " if by_nvcc else ""
    return EngineError(
        f"the driver loads no kernels ({said})",
        expected=f"kernels compiled for CUDA {major}.{minor}, which is the driver's, or earlier",
        action=f"update the NVIDIA driver; or {without}pip install '{package}<{major}.{minor + 1}' "
        "and compile again: trtseg engines build --device cuda",
    )


@contextlib.contextmanager
def _errors(driver: Any, *, needed: int | None = None) -> Iterator[None]:
    """Turn CUDA's errors into `DeviceError`, and want of memory into `OutOfDeviceMemory`."""
    try:
        yield
    except driver.MemoryError as error:
        try:
            free = int(driver.mem_get_info()[0])
        except driver.Error:  # no context is current: there was no room for one
            free = 0
        raise OutOfDeviceMemory(needed, free, "one buffer") from error
    except driver.Error as error:
        raise DeviceError(
            f"the GPU failed ({_first_line(error)})",
            expected="a CUDA call that succeeds",
            action="see nvidia-smi and the system's log, run again, or run with --device cpu",
        ) from error


def _first_line(error: BaseException) -> str:
    # pycuda ends the message of a refused module with a dash and the driver's log. Where the driver
    # writes none, that is what the memory held before: nothing, or bytes that are no text.
    said = str(error)
    if isinstance(error, UnicodeDecodeError):
        said = error.object.decode("ascii", "ignore")
    lines = said.strip().splitlines()
    return lines[0].rstrip(" -") if lines else type(error).__name__
