"""Folded weights -> ONNX. The only module that imports onnx.

Every form takes one input per pathway, named as in ``NetworkSpec.input_sizes()``, float32 of shape
(N, 1, n, n, n), and gives ``logit``, float32 of shape (N, out, out, out): the class difference.
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
    """Give the published form: nearest repeat, concatenate, pad by edge, convolve.

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
    graph = _Graph()
    maps = []
    for pathway, layers in zip(spec.pathways, network.pathways, strict=True):
        side = spec.input_size(pathway)
        graph.add_input(pathway.name, (1, side, side, side))
        features, _ = _sequence(graph, pathway.name, layers, pathway.name, side)
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
        pads = graph.constant("fc.pads", np.array([0, 0, *[edge] * 3, 0, 0, *[edge] * 3], np.int64))
        joined = graph.node("Pad", [joined, pads], mode="edge")
    score, _ = _sequence(graph, "fc", network.fc, joined, spec.out + 2 * edge)
    axes = graph.constant("squeeze", np.array([1], np.int64))
    graph.node("Squeeze", [score, axes], output=OUTPUT)
    return graph.serialise((spec.out, spec.out, spec.out))


def version() -> str:
    """Version of the onnx package in use."""
    return str(_onnx().__version__)


def _sequence(
    graph: _Graph, name: str, layers: Sequence[FrozenLayer], features: str, side: int
) -> tuple[str, int]:
    before, before_side, before_channels = features, side, layers[0].weight.shape[1]
    for number, layer in enumerate(layers, 1):
        label = f"{name}.{number}"
        values = _activate(graph, label, layer, features)
        channels_in = layer.weight.shape[1]
        kernel = layer.weight.shape[2]
        operands = [values, graph.constant(f"{label}.weight", layer.weight)]
        if layer.bias is not None:
            operands.append(graph.constant(f"{label}.bias", layer.bias))
        result = graph.node("Conv", operands, kernel_shape=[kernel] * 3)
        out_side = side - kernel + 1
        if layer.residual:
            tap = _centre(graph, label, before, before_side, out_side)
            result = _add_first_channels(
                graph, label, result, tap, layer.weight.shape[0] - before_channels
            )
        before, before_side, before_channels = features, side, channels_in
        features, side = result, out_side
    return features, side


def _activate(graph: _Graph, label: str, layer: FrozenLayer, values: str) -> str:
    if layer.scale is not None:
        values = graph.node("Mul", [values, graph.channels(f"{label}.scale", layer.scale)])
    if layer.shift is not None:
        values = graph.node("Add", [values, graph.channels(f"{label}.shift", layer.shift)])
    if layer.slope is not None:
        slope = graph.constant(f"{label}.slope", layer.slope.reshape(-1, 1, 1, 1))
        values = graph.node("PRelu", [values, slope])
    return values


def _centre(graph: _Graph, label: str, values: str, side: int, out_side: int) -> str:
    first = (side - 1) // 2 - (out_side - 1) // 2
    if side == out_side:
        return values
    bounds = [
        graph.constant(f"{label}.crop.{name}", np.array(value, np.int64))
        for name, value in (
            ("starts", [first] * 3),
            ("ends", [first + out_side] * 3),
            ("axes", [2, 3, 4]),
        )
    ]
    return graph.node("Slice", [values, *bounds])


def _add_first_channels(graph: _Graph, label: str, result: str, tap: str, extra: int) -> str:
    # Padding the tap with zero channels keeps one addition, which every runtime fuses well.
    if extra:
        pads = np.array([0, 0, 0, 0, 0, 0, extra, 0, 0, 0], np.int64)
        tap = graph.node("Pad", [tap, graph.constant(f"{label}.extra", pads)], mode="constant")
    return graph.node("Add", [result, tap])


class _Graph:
    """Collects nodes and constants of one ONNX graph."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []

    def add_input(self, name: str, shape: tuple[int, ...]) -> None:
        onnx = _onnx()
        kind = onnx.TensorProto.FLOAT
        self._inputs.append(onnx.helper.make_tensor_value_info(name, kind, ["N", *shape]))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        onnx = _onnx()
        self._constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def channels(self, name: str, value: NDArray[Any]) -> str:
        return self.constant(name, value.reshape(1, -1, 1, 1, 1))

    def node(self, kind: str, inputs: list[str], *, output: str = "", **attributes: Any) -> str:
        name = output or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(_onnx().helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def serialise(self, shape: tuple[int, ...]) -> bytes:
        onnx = _onnx()
        helper = onnx.helper
        output = helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["N", *shape])
        graph = helper.make_graph(
            self._nodes, "trtseg", self._inputs, [output], initializer=self._constants
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=8,
            producer_name="trtseg",
        )
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))


def _onnx() -> ModuleType:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingExtraError(
            "writing a graph needs onnx, which is not installed",
            expected="the build extra",
            action="pip install 'trtseg[build]'",
        ) from error
    module: ModuleType = onnx
    return module
