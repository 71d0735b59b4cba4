"""A double of TensorRT-RTX and TensorRT that runs on the host double of a device.

An "engine" is JSON that names its tensors and the function that it computes. What a library offers
is what the module made here has: see `trtseg.backends.tensorrt_library`.
"""

from __future__ import annotations

import inspect
import json
import re
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.executors import SPEC, Function, compute
from tests.cuda.host_device import HostDevice, view
from trtseg.architecture import NetworkSpec
from trtseg.backends.tensorrt_library import Library


class Severity(Enum):
    ERROR = 1
    VERBOSE = 4


class Logger:
    """Stands for ILogger; the library's own subclass does the work."""


class Strategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class Graphs(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Validity(Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class Diagnostics(IntEnum):
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    INSUFFICIENT_GPU_MEMORY = 8


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    HALF = 1


class FakeTensorRT:
    """The library, and what was asked of it.

    Parameters
    ----------
    device : HostDevice
    spec : NetworkSpec
    functions : dict of str to Function
        What engines compute, by the name in their JSON.
    kind : str
        ``rtx``, which offers most (graphs, a cache of kernels, validity), ``11``, or ``10.3``,
        which has no configuration of a run either. tests/backends/on_bindings.py holds them
        against the libraries.

    Attributes
    ----------
    weights_bytes : int
        Device memory of an engine, besides its scratch.
    failures : set of str
        ``deserialize``, ``context``, ``address``, ``enqueue``, ``enqueue 16`` (of that batch
        alone), ``serialize``: what is to fail.
    reason : str
        What is logged on a failure.
    validity : tuple
    """

    def __init__(
        self,
        device: HostDevice,
        spec: NetworkSpec,
        functions: dict[str, Function],
        *,
        kind: str = "rtx",
    ) -> None:
        self.device = device
        self.spec = spec
        self.functions = functions
        self.kind = kind
        self.rtx = kind == "rtx"
        self.weights_bytes = 1000
        self.failures: set[str] = set()
        self.reason = "a reason"
        self.validity: tuple[Validity, int] = (Validity.VALID, 0)
        self.opened: list[int] = []  # batches, in order
        self.contexts: list[Any] = []
        self.caches: list[bytes | None] = []  # what each cache was filled with
        self.logger: Any = None
        self.products = 0  # matrix products that were enqueued

    @property
    def library(self) -> Library:
        name = "tensorrt_rtx" if self.rtx else "tensorrt"
        return Library(self.module, name, "9.8.7")

    @property
    def module(self) -> Any:
        fake = self

        class Runtime(_Runtime):
            def __init__(self, logger: Any) -> None:
                fake.logger = logger
                if "runtime" in fake.failures:
                    fake.log()
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                self.fake = fake

        if self.rtx:
            Runtime.get_engine_validity = lambda self, content: fake.validity
        module = SimpleNamespace(
            ILogger=Logger,
            Runtime=Runtime,
            IExecutionContext=_Context,
            ExecutionContextAllocationStrategy=Strategy,
            TensorIOMode=Mode,
            DataType=DataType,
        )
        if self.kind != "10.3":
            module.IRuntimeConfig = _RtxConfig if self.rtx else _Config
        if self.rtx:
            module.CudaGraphStrategy = Graphs
            module.EngineValidity = Validity
            module.EngineInvalidityDiagnostics = Diagnostics
        return module

    def log(self) -> None:
        self.logger.log(Severity.VERBOSE, "noise")
        self.logger.log(Severity.ERROR, self.reason)

    def fails(self, name: str) -> bool:
        if name in self.failures:
            self.log()
        return name in self.failures


def assert_like(trt: Any, kind: str) -> None:
    """Assert that a library has all that its double has: names, and numbers of arguments.

    Parameters
    ----------
    trt : module
        The library itself.
    kind : str
        As for `FakeTensorRT`.
    """
    fake = FakeTensorRT(HostDevice(), SPEC, {}, kind=kind)
    with fake.device.active():
        engine = type(_engine(fake, json.loads(engine_bytes(SPEC, 1, ""))))
    doubles = {**vars(fake.module), "ICudaEngine": engine}
    if fake.rtx:
        doubles["IRuntimeCache"] = _Cache
    for name, double in doubles.items():
        real = getattr(trt, name)
        if issubclass(double, Enum):
            assert set(double.__members__) <= set(real.__members__), name
            continue
        for member in {one for one in dir(double) if not one.startswith("_")}:
            assert hasattr(real, member), f"{name}.{member}"
            if inspect.isfunction(getattr(double, member)):
                arguments = len(inspect.signature(getattr(double, member)).parameters)
                assert arguments in _arguments(getattr(real, member)), f"{name}.{member}"


def _arguments(function: Any) -> set[int]:
    """Numbers of arguments that a function of the library takes, by what it says of itself."""
    found: set[int] = set()
    for listed in re.findall(rf"{function.__name__}\((self.*?)\) ->", function.__doc__):
        found.update(range(1 + len(re.findall(r", \w+:(?![^,]*=)", listed)), 2 + listed.count(":")))
    return found


def engine_bytes(
    spec: NetworkSpec, batch: int, function: str, *, scratch: int = 4096, **tensors: Any
) -> bytes:
    """A serialised engine; `tensors` replaces name to (mode, dtype, shape), None leaves it out."""
    known = {
        name: ["INPUT", "FLOAT", [batch, 1, *[n] * 3]] for name, n in spec.input_sizes().items()
    }
    known["logit"] = ["OUTPUT", "FLOAT", [batch, *[spec.out] * 3]]
    chosen = {name: one for name, one in {**known, **tensors}.items() if one is not None}
    return json.dumps(
        {"batch": batch, "function": function, "scratch": scratch, "tensors": chosen}
    ).encode()


def product_bytes(side: int = 32) -> bytes:
    """A serialised engine of a matrix product."""
    tensors = {
        name: ["OUTPUT" if name == "product" else "INPUT", "HALF", [side, side]]
        for name in ("one", "other", "product")
    }
    return json.dumps(
        {"batch": side, "function": "product", "scratch": 512, "tensors": tensors}
    ).encode()


def multiply(side: int, addresses: dict[str, int]) -> None:
    """What such an engine does."""
    one, other, product = (
        view(addresses[name], np.float16, (side, side)) for name in ("one", "other", "product")
    )
    product[...] = one @ other


class _Runtime:
    fake: FakeTensorRT

    def deserialize_cuda_engine(self, content: bytes) -> Any:
        assert self.fake.device._active
        return None if self.fake.fails("deserialize") else _engine(self.fake, json.loads(content))


def _engine(fake: FakeTensorRT, data: dict[str, Any]) -> Any:
    names = list(data["tensors"])
    fake.opened.append(data["batch"])
    held = fake.device.allocate(fake.weights_bytes)

    class Engine:
        num_io_tensors = len(names)
        device_memory_size_v2 = data["scratch"]

        def get_tensor_name(self, number: int) -> str:
            return names[number]

        def get_tensor_mode(self, name: str) -> Mode:
            return Mode[data["tensors"][name][0]]

        def get_tensor_dtype(self, name: str) -> DataType:
            return DataType[data["tensors"][name][1]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(data["tensors"][name][2])

        def create_execution_context(self, chosen: Any) -> Any:
            strategy = chosen if fake.kind == "10.3" else chosen.strategy
            assert not fake.rtx or chosen.cache is not None, "what is compiled would not be kept"
            assert strategy is Strategy.USER_MANAGED
            if fake.fails("context"):
                return None
            context = _Context(fake, data, chosen)
            fake.contexts.append(context)
            return context

        def __del__(self) -> None:
            with fake.device.active():
                fake.device.free(held)

    if fake.kind != "10.3":
        Engine.create_runtime_config = lambda self: (_RtxConfig if fake.rtx else _Config)(fake)
    return Engine()


class _Cache:
    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake = fake
        fake.caches.append(None)

    def deserialize(self, content: bytes) -> bool:
        if content != b"compiled kernels":
            return False
        self.fake.caches[-1] = content
        return True

    def serialize(self) -> memoryview | None:
        return None if self.fake.fails("serialize") else memoryview(b"compiled kernels")


class _Config:
    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake = fake
        self.strategy = Strategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy


class _RtxConfig(_Config):
    cuda_graph_strategy: Any = Graphs.DISABLED

    def __init__(self, fake: FakeTensorRT) -> None:
        super().__init__(fake)
        self.cache: Any = None

    def create_runtime_cache(self) -> _Cache:
        return _Cache(self.fake)

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.cache = cache
        return True


class _Context:
    def __init__(self, fake: FakeTensorRT, data: dict[str, Any], config: Any) -> None:
        self.fake = fake
        self.data = data
        self.config = config
        self.addresses: dict[str, int] = {}
        self.bindings = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size == self.data["scratch"]
        self.device_memory = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bindings += 1
        self.addresses[name] = address
        return not self.fake.fails("address")

    def execute_async_v3(self, stream: int) -> bool:
        fake = self.fake
        assert stream == fake.device.stream
        assert self.device_memory
        if fake.fails("enqueue") or fake.fails(f"enqueue {self.data['batch']}"):
            return False
        addresses = dict(self.addresses)
        if self.data["function"] == "product":
            fake.products += 1
            fake.device.submit(lambda: multiply(self.data["batch"], addresses))
            return True
        function = fake.functions[self.data["function"]]
        fake.device.submit(lambda: compute(function, fake.spec, self.data["batch"], addresses))
        return True
