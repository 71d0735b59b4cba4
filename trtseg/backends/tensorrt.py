"""Runs built networks on an NVIDIA GPU with TensorRT-RTX or TensorRT. Not run on a GPU yet.

The library itself comes from `trtseg.backends.tensorrt_library`, the GPU from `trtseg.cuda.device`,
and the steps of a scan from `trtseg.cuda.chain`; this module loads engines and enqueues them.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, TypeVar

from trtseg.backends.base import ChainOutput, NetworkOutput
from trtseg.backends.tensorrt_library import Messages, open_library
from trtseg.cuda.ceilings import COPY_BYTES, SIDE, measure, product_tensors
from trtseg.cuda.chain import Chain
from trtseg.cuda.device import CudaDevice, OutOfDeviceMemory
from trtseg.errors import DeviceError, EngineError, OutputError
from trtseg.files import atomic_write
from trtseg.gpu_engine import CEILING, engine_file, gpu_build_command, read_owned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import Ceilings, ChainProgress, Progress
    from trtseg.backends.tensorrt_library import Library
    from trtseg.cuda.device import Device
    from trtseg.gpu_engine import GpuEngine
    from trtseg.tiling import TilePlan

_Result = TypeVar("_Result")

#: What a library calls invalid that is so for any engine: the driver does not go with it.
_NOT_THE_ENGINES = {"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "CUDA_ERROR"}

#: Mode, dtype and shape of an engine's tensor.
Tensor = tuple[str, str, tuple[int, ...]]


class TensorRTBackend:
    """A GPU and the library that runs engines on it.

    It owns the device, the chain's memory and all loaded engines, and frees them in `close`.

    Parameters
    ----------
    index : int
        Which GPU.
    library : Library, optional
        Default the one that compiled the first engine to be loaded.
    device : Device, optional
        Default the GPU `index`; owned from here on.

    Raises
    ------
    DeviceError
        pycuda, the driver or the GPU is missing, or the library does not start on it; the message
        says which.
    """

    precision = "f16"

    def __init__(
        self, index: int = 0, *, library: Library | None = None, device: Device | None = None
    ) -> None:
        self._gpu: Device = CudaDevice(index) if device is None else device
        self._messages = Messages()
        self._networks: dict[str, TensorRTNetwork] = {}
        self._kernels = False
        self._open = True
        self._runtime: Any = None
        self.device = f"cuda:{index}"
        try:
            with self._gpu.active():
                self._free = self._gpu.memory()[0]
                self._chain = Chain(self._gpu)
                if library is not None:
                    self._start(library)
        except BaseException:
            self._gpu.close()
            raise

    @property
    def description(self) -> str:
        """GPU, library, and tiles per batch of each network, for reports."""
        batches = ", ".join(f"{net} b{one.batch}" for net, one in self._networks.items())
        return f"{self._gpu.name}, {self._library.name} {self._library.version}, {batches}"

    def load(self, engine: GpuEngine) -> TensorRTNetwork:
        """Load a network with the largest batch of tiles that fits, and put it to its self-test.

        Raises
        ------
        EngineError
            The engine was compiled by another library or for another GPU, the library refuses it,
            it has other tensors than the network's, or it fails the self-test.
        OutOfDeviceMemory
            Even its smallest batch does not fit.
        DeviceError
            The library that compiled it is not installed, or does not work with this driver.
        """
        if self._runtime is None:
            with self._gpu.active():
                self._start(open_library(engine.manifest["library"]["name"]))
        engine.check_library(self._library.name, self._library.version)
        if not self._library.has_engine_validity:  # else it is asked itself, engine by engine
            engine.check_device(self._gpu.compute_capability, self._gpu.name)
        with self._gpu.active():
            if not self._kernels:
                self._gpu.load_kernels({name: engine.read(name) for name in engine.kernels})
                self._kernels = True
            if engine.net in self._networks:
                self._networks.pop(engine.net).drop()
            network = TensorRTNetwork(self, engine)
            self._open_largest(network, sorted(engine.batches, reverse=True))
            self._networks[engine.net] = network
        self._messages.lines.clear()
        return network

    def segment_chain(
        self,
        raw: NDArray[Any],
        *,
        mask: NDArray[np.bool_] | None = None,
        probabilities: bool = False,
        progress: ChainProgress | None = None,
        following: Callable[[], NDArray[Any] | None] | None = None,
    ) -> ChainOutput:
        """Run both loaded networks over a scan, all on the GPU; see `trtseg.cuda.chain.Chain`.

        Where device memory runs out, smaller batches are tried.

        Parameters
        ----------
        raw : ndarray, shape (i, j, k), any real dtype
            Voxels as stored, not normalised.
        mask : ndarray of the same shape, bool, optional
            Takes the brain network's place.
        probabilities : bool
        progress : callable, optional
            Called as ``progress(net, done, total)``.
        following : callable, optional
            Gives the next scan's voxels once they are there, else None, again where it is asked
            again; they go up beside the networks, as `trtseg.cuda.chain.Chain.segment` says.

        Returns
        -------
        ChainOutput

        Raises
        ------
        InputError
            As for `trtseg.normalise.z_score`.
        OutOfDeviceMemory
            Even the smallest batch does not fit; it names what was free and what was needed.
        DeviceError
            The GPU or the library fails.
        EngineError
            A network's answer is not finite.
        """
        return self.with_memory(
            lambda: self._chain.segment(
                raw,
                self._networks["bdn"].session,
                self._networks["cgm"].session,
                mask=mask,
                probabilities=probabilities,
                progress=progress,
                following=following,
            )
        )

    def ceilings(self) -> Ceilings:
        """Measure what the GPU reaches at its best; a network must be loaded.

        Raises
        ------
        EngineError, DeviceError
            As for `load`.
        """
        engine = next(iter(self._networks.values())).engine
        with self._gpu.active():
            session = Session(engine, CEILING, product_tensors(SIDE), **self._means())
            try:
                return measure(self._gpu, session, side=SIDE, copy_bytes=COPY_BYTES)
            finally:
                session.close()

    @property
    def device_bytes(self) -> int:
        """Device memory taken since the device was opened, by whomever."""
        with self._gpu.active():
            return self._free - self._gpu.memory()[0]

    def run(
        self,
        network: TensorRTNetwork,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool,
        progress: Progress | None,
    ) -> NetworkOutput:
        """Run one loaded network; see `TensorRTNetwork.run`."""
        return self.with_memory(
            lambda: self._chain.run(
                volume, plan, network.session, probabilities=probabilities, progress=progress
            )
        )

    def with_memory(self, action: Callable[[], _Result]) -> _Result:
        """Run `action` on the active device, with smaller batches while memory runs out."""
        with self._gpu.active():
            while True:
                try:
                    result = action()
                except OutOfDeviceMemory:
                    if not self._shrink():
                        raise
                else:
                    self._messages.lines.clear()
                    return result

    def close(self) -> None:
        """Free the GPU; loaded networks are unusable afterwards. May be called again."""
        networks, self._networks = self._networks, {}
        if not self._open:
            return
        self._open = False
        try:
            with self._gpu.active():
                for network in networks.values():
                    network.drop()
                self._runtime = None
                with contextlib.suppress(DeviceError):  # of a GPU that failed; closing it frees all
                    self._chain.close()
        finally:
            self._gpu.close()  # even if it cannot be made active: PyCUDA would abort at exit

    def _start(self, library: Library) -> None:
        self._library = library
        self._logger = library.logger(self._messages)
        try:
            self._runtime = library.trt.Runtime(self._logger)
        except (RuntimeError, TypeError) as error:  # pybind11's words for a null runtime
            raise _no_start(library, self._gpu, self._messages.reason) from error

    def _shrink(self) -> bool:
        """Load the networks of the largest batch anew with a smaller one; False if none is left."""
        largest = max((network.batch for network in self._networks.values()), default=0)
        smaller = {
            net: [
                batch for batch in sorted(network.engine.batches, reverse=True) if batch < largest
            ]
            for net, network in self._networks.items()
            if network.batch == largest
        }
        if not smaller or not all(smaller.values()):
            return False
        for net in smaller:
            self._networks[net].drop()
        self._chain.drop_executors()
        for net, batches in smaller.items():
            self._open_largest(self._networks[net], batches)
        return True

    def _open_largest(self, network: TensorRTNetwork, batches: list[int]) -> None:
        """Give a network a session of the first of `batches` that fits."""
        for position, batch in enumerate(batches, 1):
            try:
                network.session = self._session(network.engine, batch)
                return
            except OutOfDeviceMemory:
                self._chain.drop_executors()
                if position == len(batches):
                    raise

    def _means(self) -> dict[str, Any]:
        """What every session needs."""
        return {
            "library": self._library,
            "runtime": self._runtime,
            "messages": self._messages,
            "device": self._gpu,
        }

    def _session(self, engine: GpuEngine, batch: int) -> NetworkSession:
        session = NetworkSession(engine, batch, **self._means())
        try:
            inputs, _ = engine.selftest
            # Where the library captures a graph, the first run is plain, the second is captured,
            # and from the third on the graph is replayed: that is what scans will run.
            for _ in range(3):
                for logits in self._chain.evaluate(session, inputs):
                    engine.check_selftest(logits)
        except BaseException:
            session.close()
            raise
        session.keep_cache()
        return session


class TensorRTNetwork:
    """A network loaded on a GPU; see `trtseg.backends.base.Network`.

    Attributes
    ----------
    engine : GpuEngine
    spec : NetworkSpec
    """

    def __init__(self, backend: TensorRTBackend, engine: GpuEngine) -> None:
        self.engine = engine
        self.spec: NetworkSpec = engine.spec
        self._backend = backend
        self._session: NetworkSession | None = None

    @property
    def session(self) -> NetworkSession:
        """What runs it at present."""
        if self._session is None:
            raise DeviceError(
                f"{self.engine.net.upper()} is not loaded on the GPU any more",
                expected="an open backend with enough memory",
                action="open the device again",
            )
        return self._session

    @session.setter
    def session(self, session: NetworkSession) -> None:
        self._session = session

    @property
    def batch(self) -> int:
        """Tiles of a batch; 0 where nothing is loaded."""
        return 0 if self._session is None else self._session.batch

    def drop(self) -> None:
        """Free what runs it."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def run(
        self,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Run the planned tiles; errors as for `TensorRTBackend.segment_chain`."""
        return self._backend.run(self, volume, plan, probabilities=probabilities, progress=progress)


class Session:
    """One engine file, deserialised and ready.

    It owns the library's engine and execution context, but no memory for tensors and scratch.

    Parameters
    ----------
    engine : GpuEngine
    file : str
        Which of its files.
    tensors : mapping
        Name to mode, dtype and shape of the tensors it must have.
    library : Library
    runtime : object
        The library's runtime.
    messages : Messages
        What its logger fills.
    device : Device
        Active.

    Raises
    ------
    EngineError
        The library refuses the engine, or it has other tensors.
    OutOfDeviceMemory
        It does not fit.
    DeviceError
        The library fails otherwise.
    """

    def __init__(
        self,
        engine: GpuEngine,
        file: str,
        tensors: Mapping[str, Tensor],
        *,
        library: Library,
        runtime: Any,
        messages: Messages,
        device: Device,
    ) -> None:
        self.name = str(engine.folder / file)
        self._file = file
        self._engine = engine
        self._library = library
        self._messages = messages
        self._device = device
        self._cuda_engine: Any = None
        self._context: Any = None
        self._cache: Any = None
        self._cache_is_new = False
        self._bound: tuple[dict[str, int], int] | None = None
        try:
            self._load(runtime, engine.read(file), tensors)
        except BaseException:
            self.close()  # now, while the GPU is active, and not when the error is forgotten
            raise

    def bind(self, tensors: Mapping[str, int], scratch: int) -> None:
        """See `trtseg.cuda.chain.Executor`; nothing is done where nothing has changed."""
        wanted = (dict(tensors), scratch)
        if wanted == self._bound:
            return
        self._context.set_device_memory(scratch, self.scratch_bytes)
        for name, address in tensors.items():
            if not self._context.set_tensor_address(name, address):
                raise self._failed(f"takes no address for tensor {name}")
        self._bound = wanted

    def enqueue(self) -> None:
        """See `trtseg.cuda.chain.Executor`."""
        enqueued = self._context.execute_async_v3(self._device.stream)
        self._messages.raise_if_interrupted()
        if not enqueued:
            raise self._failed("cannot run a batch of tiles")

    def keep_cache(self) -> None:
        """Keep what was compiled for this GPU beside the engine, for the next start.

        A folder that cannot be written, or a library that gives nothing to be kept, costs that
        start some seconds and nothing else.
        """
        if not self._cache_is_new:
            return
        self._cache_is_new = False
        content = self._cache.serialize()
        if content is None:
            return
        path = self._cache_path()
        with contextlib.suppress(OutputError, OSError):
            with atomic_write(path) as stream:
                stream.write(bytes(content))
            path.chmod(0o644)  # whatever the umask: a file that others can write is not read again

    def close(self) -> None:
        """Free the library's objects, at once and whoever still holds the session."""
        self._context = self._cache = self._cuda_engine = None

    def _load(self, runtime: Any, content: bytes, tensors: Mapping[str, Tensor]) -> None:
        self._messages.lines.clear()
        self._check_valid(runtime, content)
        self._cuda_engine = runtime.deserialize_cuda_engine(content)
        self._messages.raise_if_interrupted()
        if self._cuda_engine is None:
            raise self._refused(None, "load it")
        self._check_tensors(tensors)
        self.scratch_bytes = int(self._cuda_engine.device_memory_size_v2)
        self._context = self._make_context()
        self._messages.raise_if_interrupted()
        if self._context is None:
            raise self._refused(self.scratch_bytes, "run it")

    def _check_valid(self, runtime: Any, content: bytes) -> None:
        """Ask the library, where it can say, whether the engine can run here at all."""
        if not self._library.has_engine_validity:
            return
        validity, diagnostics = runtime.get_engine_validity(content)
        if validity != self._library.flag("EngineValidity", "INVALID"):
            return
        members = getattr(self._library.trt.EngineInvalidityDiagnostics, "__members__", {})
        reasons = {name for name, one in members.items() if int(one) & int(diagnostics)}
        said = "; ".join(sorted(reasons)) or self._messages.reason
        if not reasons or reasons & _NOT_THE_ENGINES:
            raise _no_start(self._library, self._device, said)
        # Where that is why, this says more.
        self._engine.check_device(self._device.compute_capability, self._device.name)
        raise self._refused(None, "run it here", said)

    def _check_tensors(self, expected: Mapping[str, Tensor]) -> None:
        received = {}
        for number in range(self._cuda_engine.num_io_tensors):
            name = self._cuda_engine.get_tensor_name(number)
            received[name] = (
                self._cuda_engine.get_tensor_mode(name).name,
                self._cuda_engine.get_tensor_dtype(name).name,
                tuple(self._cuda_engine.get_tensor_shape(name)),
            )
        if received != expected:
            raise EngineError(
                f"{self.name}: tensors {_described(received)}",
                expected=_described(expected),
                action=f"compile again: {gpu_build_command(self._engine.models)}",
            )

    def _make_context(self) -> Any:
        trt, library = self._library.trt, self._library
        strategy = library.flag("ExecutionContextAllocationStrategy", "USER_MANAGED")
        if not hasattr(self._cuda_engine, "create_runtime_config"):
            return self._cuda_engine.create_execution_context(strategy)
        config = self._cuda_engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if library.has_cuda_graph_strategy:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if library.has_runtime_cache:
            self._cache = config.create_runtime_cache()
            kept = self._kept_cache()
            self._cache_is_new = kept is None or not self._cache.deserialize(kept)
            config.set_runtime_cache(self._cache)
        return self._cuda_engine.create_execution_context(config)

    def _kept_cache(self) -> bytes | None:
        """What an earlier start compiled; like an engine it is code, so nobody's but the user's."""
        try:
            return read_owned(self._cache_path())
        except (FileNotFoundError, EngineError):
            return None  # it is compiled again, and replaces what cannot be trusted

    def _cache_path(self) -> Path:
        """One for each model of GPU: those that share a folder would replace each other's."""
        major, minor = self._device.compute_capability
        stem = self._file.partition(".")[0]
        model = re.sub(r"[^A-Za-z0-9]+", "_", self._device.name)
        return self._engine.folder / f"{stem}.sm_{major}{minor}.{model}.cache"

    def _refused(self, needed: int | None, what: str, reason: str = "") -> Exception:
        """The error of an engine that the library does not take."""
        said = reason or self._messages.reason
        if _of_memory(said):
            return OutOfDeviceMemory(needed, self._device.memory()[0], f"{self.name} ({said})")
        return EngineError(
            f"{self.name}: {self._library.name} {self._library.version} cannot {what} ({said})",
            expected=f"an engine built by this version for {self._device.name}",
            action=f"compile again: {gpu_build_command(self._engine.models)}",
        )

    def _failed(self, what: str) -> DeviceError:
        """The error of an engine that was taken and does not run."""
        said = self._messages.reason
        if _of_memory(said):  # kernels may be loaded when they are first run
            return OutOfDeviceMemory(None, self._device.memory()[0], f"{self.name} ({said})")
        return DeviceError(
            f"{self.name}: {self._library.name} {what} ({said})",
            expected="an engine that runs",
            action="see nvidia-smi and the system's log, run again, or run with --device cpu",
        )


class NetworkSession(Session):
    """The engine of a network for one batch of tiles; a `trtseg.cuda.chain.Executor`.

    Parameters
    ----------
    engine : GpuEngine
    batch : int
        The file is ``b<batch>.engine``.
    means
        As for `Session`, whose errors it raises.
    """

    def __init__(self, engine: GpuEngine, batch: int, **means: Any) -> None:
        self.net = engine.net
        self.spec = engine.spec
        self.batch = batch
        super().__init__(engine, engine_file(batch), expected_tensors(engine.spec, batch), **means)


def expected_tensors(spec: NetworkSpec, batch: int) -> dict[str, Tensor]:
    """Name to mode, dtype and shape of the tensors a network's engine must have."""
    tensors: dict[str, Tensor] = {
        name: ("INPUT", "FLOAT", (batch, 1, side, side, side))
        for name, side in spec.input_sizes().items()
    }
    return {**tensors, "logit": ("OUTPUT", "FLOAT", (batch, *[spec.out] * 3))}


def _of_memory(said: str) -> bool:
    """Whether a library's message is of want of memory."""
    return "memory" in said.lower() and "illegal" not in said.lower()


def _no_start(library: Library, device: Device, reason: str) -> DeviceError:
    return DeviceError(
        f"{library.name} {library.version} cannot start on {device.name} ({reason})",
        expected="a driver for the CUDA version that the library was built with (nvidia-smi shows "
        "the driver's)",
        action="update the driver, install the library for an older CUDA (see docs/gpu.md), or run "
        "with --device cpu",
    )


def _described(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {mode.lower()} {dtype} {'x'.join(map(str, shape))}"
        for name, (mode, dtype, shape) in sorted(tensors.items())
    )
