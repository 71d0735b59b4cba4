"""Opens OpenVINO, says what its failures mean, and alters its models. Sole importer of it."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.errors import DeviceError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from trtseg.errors import TrtsegError

    #: What the parts of a network hand over: float32, or the bits of bfloat16 as uint16, since
    #: NumPy has no bfloat16.
    Maps = NDArray[Any]

#: What OpenVINO, oneDNN, the C++ library and the loader of shared libraries say when memory runs
#: out; "temporarily unavailable" is a thread for whose stack there is no room, "Broken promise" a
#: kernel that memory was lacking for before, which oneDNN's cache does not try to make again.
NO_MEMORY = (
    "can't alloc",
    "Failed to allocate",
    "bad_alloc",
    "Resource temporarily unavailable",
    "Cannot allocate memory",
    "Broken promise",
    "failed to map segment",
)

#: Order of a transpose that makes rows of voxels, as `trtseg.build.parts` writes it, and one that
#: gives the same rows of a single tile.
ROWS = (0, 2, 3, 4, 1)
ROWS_BY_COPY = (2, 0, 3, 4, 1)


def openvino_module() -> ModuleType:
    """Import openvino without its telemetry."""
    # Importing openvino reports the import over the network and leaves an identifier in the home
    # folder, by its package openvino_telemetry; where that cannot be imported, it does neither.
    telemetry = "openvino_telemetry"
    hide = "openvino" not in sys.modules and telemetry not in sys.modules
    if hide:
        sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if hide:
            del sys.modules[telemetry]
    module: ModuleType = openvino
    return module


def version() -> str:
    """Version of the OpenVINO runtime in use."""
    return str(openvino_module().__version__)


def available_threads() -> int:
    """Cores this process may run on, which on shared machines is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settings(threads: int, precision: str) -> dict[str, str]:
    """What OpenVINO is told when it compiles a model."""
    return {
        # Said outright: on processors with bfloat16 units OpenVINO would choose that.
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
    }


# Failures


@contextmanager
def calling(refused: Callable[[str], TrtsegError] | None = None) -> Iterator[None]:
    """Turn what OpenVINO raises inside into errors that say what to do.

    Parameters
    ----------
    refused : callable, optional
        Makes the error to raise from OpenVINO's last line, where it is not for want of memory;
        default a DeviceError.

    Raises
    ------
    MemoryError
        Memory ran out.
    """
    try:
        yield
    except (RuntimeError, ImportError) as error:
        said = str(error).strip()
        if any(words in said for words in NO_MEMORY):
            raise MemoryError(said) from error
        if isinstance(error, ImportError):
            raise  # a package that is not here, or not whole, is no failure of OpenVINO's
        raise (refused or _failed)(said.rpartition("\n")[2] or type(error).__name__) from error


def no_cpu(said: str) -> DeviceError:
    """Error for a CPU that OpenVINO does not find; `said` is its own last line."""
    return DeviceError(
        f"OpenVINO finds no CPU device ({said})",
        expected="an x86-64 or arm64 processor it supports",
        action="install openvino again: pip install --force-reinstall openvino",
    )


def graph_refused(name: str, said: str) -> EngineError:
    """Error for a graph that OpenVINO does not take; `said` is its own last line."""
    return EngineError(
        f"{name}: OpenVINO cannot run it ({said})",
        expected="a graph that trtseg built",
        action="build again: trtseg engines build",
    )


def _failed(said: str) -> DeviceError:
    return DeviceError(
        f"OpenVINO failed on the CPU ({said})",
        expected="a processor and an OpenVINO that run what trtseg built",
        action="run it again; if it fails again: pip install --force-reinstall openvino",
    )


# Models and tensors


def copying_rows(model: Any) -> Any:
    """The same model with its rows made by plain copies, for sizes known at run time only.

    A convolution leaves its channels last in memory. OpenVINO drops a transpose to rows where sizes
    are fixed; where they are not, it carries it out and keeps channels last, so that its result,
    (1, i, j, k, C), lies in memory as (1, j, k, C, i) and must be put in order once more. A result
    (i, 1, j, k, C) lies in memory as (i, j, k, C), which is what was there before.
    """
    copying = model.clone()
    order = openvino_module().op.Constant(np.array(ROWS_BY_COPY, np.int64))
    for node in copying.get_ops():
        if node.get_type_name() == "Transpose":
            given = node.input_value(1).get_node()
            if given.get_type_name() == "Constant" and tuple(given.data.tolist()) == ROWS:
                node.input(1).replace_source_output(order.output(0))
    copying.validate_nodes_and_infer_types()
    return copying


def handing_over_bf16(model: Any, *, taken: bool) -> Any:
    """The same model with the features that it takes, or else those that it gives, in bfloat16.

    Besides the bytes, this spares conversions: OpenVINO keeps what a float32 result is summed from
    in float32, which are the residual sums of a whole pathway.
    """
    openvino = openvino_module()
    steps = openvino.preprocess.PrePostProcessor(model)
    ports = model.inputs if taken else model.outputs
    for index, port in enumerate(ports):
        if port.element_type == openvino.Type.f32:
            step = steps.input(index) if taken else steps.output(index)
            step.tensor().set_element_type(openvino.Type.bf16)
    return steps.build()


def maps_of(tensor: Any) -> Maps:
    """A tensor's values, in its own memory."""
    values: Maps = tensor.data
    return values if values.dtype == np.float32 else values.view(np.uint16)


def tensor_of(maps: Maps) -> Any:
    """The same values as OpenVINO takes them, in their own memory."""
    if maps.dtype != np.uint16:
        return maps
    openvino = openvino_module()
    return openvino.Tensor(maps, openvino.Shape(maps.shape), openvino.Type.bf16)
