"""Builds ONNX graphs from folded weights, and the published graph form. Sole importer of onnx.

The published form takes one input per pathway, named as in ``NetworkSpec.input_sizes()``, float32
of shape (N, 1, n, n, n), and gives ``logit``, the class difference, float32 (N, out, out, out).
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trtseg.build.freeze import FrozenLayer, FrozenNetwork

#: ONNX operator set: old enough for every runtime in range, new enough for Pad and Slice by input.
OPSET = 17
OUTPUT = "logit"


def plain(network: FrozenNetwork) -> bytes:
    """Build the published form: nearest repeat, concatenate, pad by edge, convolve.

    Parameters
    ----------
    network : FrozenNetwork

    Returns
    -------
    bytes
        A serialised ONNX model; the batch axis N is symbolic.

    Raises
    ------
    MissingExtraError
        onnx is not installed.
    """
    spec = network.spec
    graph = Graph()
    maps = []
    for pathway, layers in zip(spec.pathways, network.pathways, strict=True):
        side = spec.input_size(pathway)
        graph.add_input(pathway.name, ("N", 1, side, side, side))
        features = add_sequence(graph, pathway.name, layers, pathway.name)
        if pathway.factor > 1:
            # Gather by an index table repeats and crops in one exact step, whatever the size.
            table = np.repeat(np.arange(side), pathway.factor)[: spec.out].astype(np.int64)
            indices = graph.constant(f"{pathway.name}.repeat", table)
            for axis in (2, 3, 4):
                features = graph.node("Gather", [features, indices], axis=axis)
        maps.append(features)
    joined = maps[0] if len(maps) == 1 else graph.node("Concat", maps, axis=1)
    edge = spec.fc_kernel // 2
    if edge:
        pads = np.array([0, 0, edge, edge, edge, 0, 0, edge, edge, edge], np.int64)
        joined = graph.node("Pad", [joined, graph.constant("fc.pads", pads)], mode="edge")
    score = add_sequence(graph, "fc", network.fc, joined)
    axes = graph.constant("squeeze", np.array([1], np.int64))
    graph.add_output(OUTPUT, graph.node("Squeeze", [score, axes]))
    return graph.serialise()


def version() -> str:
    """Version of the onnx package in use."""
    return str(_onnx().__version__)


def add_sequence(graph: Graph, name: str, layers: Sequence[FrozenLayer], features: str) -> str:
    """Add a sequence of layers, residual sums included; gives the name of its result."""
    before, before_channels, before_kernel = features, layers[0].weight.shape[1], 1
    for number, layer in enumerate(layers, 1):
        label = f"{name}.{number}"
        values = add_activation(graph, label, layer, features)
        channels, channels_in, kernel = layer.weight.shape[:3]
        operands = [
            values,
            graph.constant(f"{label}.weight", layer.weight),
            graph.constant(f"{label}.bias", layer.bias),
        ]
        result = graph.node("Conv", operands, kernel_shape=[kernel] * 3)
        if layer.residual:
            # What two valid convolutions take off per side; the published crop comes to the same.
            margin = (before_kernel - 1) // 2 + (kernel - 1) // 2
            tap = graph.crop(label, before, [margin] * 3, [margin] * 3)
            result = graph.add_to_first(label, result, channels, tap, before_channels, axis=1)
        before, before_channels, before_kernel = features, channels_in, kernel
        features = result
    return features


def add_activation(
    graph: Graph,
    label: str,
    layer: FrozenLayer,
    values: str,
    *,
    channels: slice = slice(None),
    channels_last: bool = False,
) -> str:
    """Add what precedes a layer's convolution: scale, shift and PReLU of some of its channels."""
    shape = (1, 1, -1) if channels_last else (1, -1, 1, 1, 1)

    def per_channel(name: str, value: NDArray[np.float32]) -> str:
        return graph.constant(f"{label}.{name}", value[channels].reshape(shape))

    if layer.scale is not None:
        values = graph.node("Mul", [values, per_channel("scale", layer.scale)])
    if layer.shift is not None:
        values = graph.node("Add", [values, per_channel("shift", layer.shift)])
    if layer.slope is not None:
        values = graph.node("PRelu", [values, per_channel("slope", layer.slope)])
    return values


class Graph:
    """Collects the nodes, constants, inputs and outputs of one ONNX graph."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def add_input(self, name: str, shape: tuple[int | str, ...], *, integer: bool = False) -> str:
        """Declare an input, float32 or int32; a word in `shape` is a size chosen at run time."""
        kind = _onnx().TensorProto.INT32 if integer else _onnx().TensorProto.FLOAT
        self._inputs.append(_onnx().helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def add_output(self, name: str, value: str) -> None:
        """Make `value` an output called `name`, float32."""
        onnx = _onnx()
        self._nodes.append(onnx.helper.make_node("Identity", [value], [name], name))
        self._outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; gives its name."""
        onnx = _onnx()
        self._constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Add an operation with one result; gives the result's name."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(_onnx().helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def crop(self, label: str, values: str, before: list[int], after: list[int]) -> str:
        """Take voxels off (1, C, i, j, k) maps, `before` and `after` per axis."""
        if not any(before) and not any(after):
            return values
        ends = [-n if n else np.iinfo(np.int64).max for n in after]
        bounds = [
            self.constant(f"{label}.crop.{name}", np.array(value, np.int64))
            for name, value in (("starts", before), ("ends", ends), ("axes", [2, 3, 4]))
        ]
        return self.node("Slice", [values, *bounds])

    def add_to_first(
        self, label: str, result: str, channels: int, tap: str, tap_channels: int, *, axis: int
    ) -> str:
        """Add `tap` to the first channels of `result`, channels being `axis`."""
        # Padding the tap with zero channels keeps one addition, which every runtime fuses well.
        if channels > tap_channels:
            rank = 5 if axis == 1 else 3
            pads = np.zeros(2 * rank, np.int64)
            pads[rank + axis] = channels - tap_channels
            tap = self.node("Pad", [tap, self.constant(f"{label}.extra", pads)], mode="constant")
        return self.node("Add", [result, tap])

    def serialise(self) -> bytes:
        """Check the graph and give its bytes; the same graph gives the same bytes."""
        onnx = _onnx()
        graph = onnx.helper.make_graph(
            self._nodes, "trtseg", self._inputs, self._outputs, initializer=self._constants
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=8,
            producer_name="trtseg",
        )
        # Shapes of the results are written in, so that every runtime knows their rank.
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))


def _onnx() -> ModuleType:
    try:
        import onnx
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError as error:
        raise MissingExtraError(
            "writing a graph needs onnx, which is not installed",
            expected="the build extra",
            action="pip install 'trtseg[build]'",
        ) from error
    module: ModuleType = onnx
    return module
