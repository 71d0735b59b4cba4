"""Runs built networks on the CPU with OpenVINO. The only module that imports openvino."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg import tiling
from trtseg.backends.base import NetworkOutput, logistic
from trtseg.engine import ONNX
from trtseg.errors import DeviceError, EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import Progress
    from trtseg.engine import Engine
    from trtseg.tiling import TilePlan

#: Tiles a request. One keeps memory lowest, and larger batches were not faster (bench/README.md).
BATCH = 1


def available_threads() -> int:
    """Cores this process may run on, which on shared machines is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OpenVINOBackend:
    """The CPU, in float32.

    Parameters
    ----------
    threads : int, optional
        Threads to run on; default `available_threads()`.

    Raises
    ------
    DeviceError
        OpenVINO has no CPU device here.
    """

    device = "cpu"

    def __init__(self, *, threads: int | None = None) -> None:
        self.threads = available_threads() if threads is None else threads
        import openvino

        self._core = openvino.Core()
        if "CPU" not in self._core.available_devices:
            raise DeviceError(
                "OpenVINO finds no CPU device",
                expected="an x86-64 or arm64 processor it supports",
                action="install openvino again: pip install --force-reinstall openvino",
            )

    def load(self, engine: Engine) -> OpenVINONetwork:
        """Compile a built network for the CPU.

        Raises
        ------
        EngineError
            OpenVINO refuses the graph.
        """
        model = self.compile(engine.file(ONNX), batch=BATCH)
        return OpenVINONetwork(engine.spec, model)

    def compile(self, graph: Path | bytes, *, batch: int) -> Any:
        """Compile an ONNX file (or its content) at a fixed batch; gives OpenVINO's compiled model.

        Raises
        ------
        EngineError
            OpenVINO refuses the graph.
        """
        # Said outright: on processors with bfloat16 units OpenVINO would otherwise choose that.
        config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self.threads),
        }
        try:
            model = self._core.read_model(graph if isinstance(graph, bytes) else str(graph))
            shapes = {}
            for port in model.inputs:
                shape = port.partial_shape
                shape[0] = batch
                shapes[port.any_name] = shape
            model.reshape(shapes)
            return self._core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            name = "a graph in memory" if isinstance(graph, bytes) else str(graph)
            raise EngineError(
                f"{name}: OpenVINO cannot run it ({str(error).strip().splitlines()[-1]})",
                expected="a graph that trtseg built",
                action="build again: trtseg engines build",
            ) from error

    def close(self) -> None:
        """Drop the library's handle; compiled networks go with their last reference."""
        self._core = None


class OpenVINONetwork:
    """A network compiled for the CPU; see `trtseg.backends.base.Network`."""

    def __init__(self, spec: NetworkSpec, model: Any) -> None:
        self.spec = spec
        self._request = model.create_infer_request()
        self._batch = int(model.inputs[0].shape[0])

    def run(
        self,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Run the planned tiles, one batch after the other."""
        padded = tiling.pad(volume, plan)
        labels = np.zeros(plan.shape, np.uint8)
        maps = np.zeros(plan.shape, np.float32) if probabilities else None
        for starts in plan.batches(self._batch):
            inputs = tiling.gather(padded, self._filled(starts), plan.spec)
            for start, logit in zip(starts, self.logits(inputs), strict=False):
                tiling.stitch(labels, start, logit > 0)
                if maps is not None:
                    tiling.stitch(maps, start, logistic(logit))
            if progress is not None:
                progress(len(starts))
        return NetworkOutput(labels, maps)

    def logits(self, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Class difference of one batch, float32 (batch, out, out, out); valid until the next."""
        self._request.infer(inputs, share_inputs=True)
        result: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return result

    def _filled(self, starts: NDArray[np.int32]) -> NDArray[np.int32]:
        missing = self._batch - len(starts)
        return starts if missing == 0 else np.concatenate([starts, starts[-1:].repeat(missing, 0)])


def version() -> str:
    """Version of the OpenVINO runtime in use."""
    import openvino

    return str(openvino.__version__)
