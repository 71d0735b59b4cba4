"""Builds ONNX graphs from folded weights, and the published graph form. Sole importer of onnx.

The published form takes one input per pathway, named as in ``NetworkSpec.input_sizes()``, float32
of shape (N, 1, n, n, n), and gives ``logit``, the class difference, float32 (N, out, out, out).

A form in half precision has the same inputs and output: it casts the inputs to float16 first, holds
its weights and intermediate tensors in float16, and computes the last layer in float32. Operations
that leave float16's range can be kept in float32 (`Graph`'s `wide`): casts are put around them, and
nothing else of the graph changes. `kept_layers` tells which they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trtseg.architecture import PathwaySpec
    from trtseg.build.freeze import FrozenLayer, FrozenNetwork

#: ONNX operator set: old enough for every runtime in range, new enough for Pad and Slice by input.
OPSET = 17
OUTPUT = "logit"

#: What the name of a tensor ends in that was cast, or of a constant that is not rounded.
AS_HALF, _AS_SINGLE = ".float16", ".float32"

#: What an operation is in a layer. An addition of a constant is part of an activation; what is not
#: listed only moves values.
_PARTS = {
    "Add": "sum",
    "Conv": "convolution",
    "ConvTranspose": "convolution",
    "Mul": "activation",
    "PRelu": "activation",
}


@dataclass(frozen=True)
class Operation:
    """One node of a graph: ``kind`` is ONNX's name of the operator.

    ``kept`` says what an operation is that a graph of half precision computes in float32 for its
    range: layer and part (``fc.2 convolution``), or ``copy``; it is empty for all others.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]
    kept: str = ""


@dataclass(frozen=True)
class GraphContent:
    """What a serialised graph holds: its operations in order, and its constants by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, NDArray[Any]]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class _Node:
    """An operation as it was added; `half` in float16, unless it is kept in float32."""

    operation: Operation
    half: bool
    label: str


def plain(
    network: FrozenNetwork,
    *,
    batch: int | str = "N",
    half: bool = False,
    wide: Collection[str] = (),
) -> bytes:
    """Build the published form: nearest repeat, concatenate, pad by edge, convolve.

    Parameters
    ----------
    network : FrozenNetwork
    batch : int or str
        Tiles per run; a word leaves it to be chosen at run time.
    half : bool
        Whether to compute in float16; see the module's text.
    wide : collection of str
        Results to be kept in float32 all the same; see `Graph`.

    Returns
    -------
    bytes
        A serialised ONNX model.

    Raises
    ------
    EngineError
        A weight is beyond float32's range.
    MissingExtraError
        onnx is not installed.
    """
    spec = network.spec
    graph = Graph(half=half, wide=wide)
    maps = []
    for pathway, layers in zip(spec.pathways, network.pathways, strict=True):
        features = add_pathway(graph, spec.input_size(pathway), pathway, layers, batch)
        maps.append(add_repeat(graph, pathway, features, spec.out))
    joined = maps[0] if len(maps) == 1 else graph.node("Concat", maps, axis=1)
    edge = spec.fc_kernel // 2
    if edge:
        joined = graph.pad_edges("fc", joined, edge)
    features = add_sequence(graph, "fc", network.fc[:-1], joined)
    add_score(graph, f"fc.{len(network.fc)}", network.fc[-1], features)
    return graph.serialise()


def matrix_product(side: int, factors: tuple[str, str], product: str) -> bytes:
    """A graph of one float16 matrix product, by whose rate a GPU's ceiling is measured.

    Parameters
    ----------
    side : int
        Rows and columns of both factors, which are inputs.
    factors, product : str
        Names of the tensors.

    Raises
    ------
    MissingExtraError
        onnx is not installed.
    """
    onnx = _onnx()
    tensor = onnx.helper.make_tensor_value_info
    half = onnx.TensorProto.FLOAT16
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", list(factors), [product])],
        "product",
        [tensor(name, half, (side, side)) for name in factors],
        [tensor(product, half, (side, side))],
    )
    return _serialised(graph)


def add_pathway(
    graph: Graph, side: int, pathway: PathwaySpec, layers: Sequence[FrozenLayer], batch: int | str
) -> str:
    """Add a pathway with its input of `side` voxels per axis; gives the name of its features."""
    values = graph.add_input(pathway.name, (batch, 1, side, side, side))
    return add_sequence(graph, pathway.name, layers, graph.narrow(values))


def add_repeat(graph: Graph, pathway: PathwaySpec, features: str, out: int) -> str:
    """Repeat a subsampled map by its factor per axis and keep the first `out` voxels."""
    if pathway.factor == 1:
        return features
    # Gather by an index table repeats and crops in one exact step, whatever the size.
    table = (np.arange(out) // pathway.factor).astype(np.int64)
    indices = graph.constant(f"{pathway.name}.repeat", table)
    for axis in (2, 3, 4):
        features = graph.node("Gather", [features, indices], axis=axis)
    return features


def add_score(graph: Graph, label: str, layer: FrozenLayer, features: str) -> None:
    """Add the classification layer, in float32, and make its result the graph's output."""
    values = add_activation(graph, label, layer, graph.widen(features))
    axes = graph.constant("squeeze", np.array([1], np.int64))
    if graph.half:
        # A weighted sum over channels instead of a convolution: runtimes join it with the cast and
        # the activation, so that the float32 features are never written to memory.
        weight = graph.constant(f"{label}.weight", layer.weight)
        weighted = graph.node("Mul", [values, weight])
        total = graph.node("ReduceSum", [weighted, axes], keepdims=0)
        bias = graph.constant(f"{label}.bias", layer.bias)
        score = graph.node("Add", [total, bias])
    else:
        score = graph.node("Squeeze", [add_convolution(graph, label, layer, values), axes])
    graph.add_output(OUTPUT, score)


def read_graph(content: bytes) -> GraphContent:
    """Read a graph that `Graph` serialised, for evaluation outside a runtime library."""
    onnx = _onnx()
    graph = onnx.load_from_string(content).graph
    return GraphContent(
        inputs=tuple(one.name for one in graph.input),
        outputs=tuple(one.name for one in graph.output),
        constants={one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer},
        operations=tuple(
            Operation(
                node.op_type,
                tuple(node.input),
                node.output[0],
                {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute},
                node.doc_string,
            )
            for node in graph.node
        ),
    )


def kept_layers(operations: Collection[Operation]) -> dict[str, list[str]]:
    """What is computed in float32 in a graph of half precision, for its range.

    Returns
    -------
    dict of str to list of str
        Layer's label, such as ``fc.2`` (in the transposed form, ``fc.1.sub3`` is what the first FC
        layer makes of a pathway), to ``convolution``, ``activation`` (what precedes the layer's
        convolution) and ``sum`` (with a residual, or of several terms), in the graph's order.
    """
    layers: dict[str, list[str]] = {}
    for operation in operations:
        label, _, part = operation.kept.rpartition(" ")
        if label and part not in layers.setdefault(label, []):
            layers[label].append(part)
    return layers


def version() -> str:
    """Version of the onnx package in use."""
    return str(_onnx().__version__)


def add_sequence(
    graph: Graph,
    name: str,
    layers: Sequence[FrozenLayer],
    features: str,
    *,
    first: int = 1,
    before: tuple[str, int] | None = None,
) -> str:
    """Add a sequence of layers, residual sums included; gives the name of its result.

    Parameters
    ----------
    graph : Graph
    name : str
        Stem of the layers' labels.
    layers : sequence of FrozenLayer
    features : str
        What the first of them reads.
    first : int
        Number of that layer in its sequence, 1-based.
    before : (str, int), optional
        Where layers went before: what the last of those read, cropped to the grid it gave, and the
        channels of that.
    """
    tapped, tapped_channels = before or (features, 0 if not layers else layers[0].weight.shape[1])
    tapped_kernel = 1
    for number, layer in enumerate(layers, first):
        label = f"{name}.{number}"
        values = add_activation(graph, label, layer, features)
        channels, channels_in, kernel = layer.weight.shape[:3]
        result = add_convolution(graph, label, layer, values)
        if layer.residual:
            # What two valid convolutions take off per side; the published crop comes to the same.
            margin = (tapped_kernel - 1) // 2 + (kernel - 1) // 2
            tap = graph.crop(label, tapped, [margin] * 3, [margin] * 3)
            result = graph.add_to_first(label, result, channels, tap, tapped_channels, axis=1)
        tapped, tapped_channels, tapped_kernel = features, channels_in, kernel
        features = result
    return features


def add_convolution(graph: Graph, label: str, layer: FrozenLayer, values: str) -> str:
    """Add a layer's valid convolution and bias."""
    operands = [
        values,
        graph.constant(f"{label}.weight", layer.weight),
        graph.constant(f"{label}.bias", layer.bias),
    ]
    return graph.node("Conv", operands, label=label, kernel_shape=[layer.weight.shape[2]] * 3)


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
        values = graph.node("Mul", [values, per_channel("scale", layer.scale)], label=label)
    if layer.shift is not None:
        values = graph.node("Add", [values, per_channel("shift", layer.shift)], label=label)
    if layer.slope is not None:
        values = graph.node("PRelu", [values, per_channel("slope", layer.slope)], label=label)
    return values


class Graph:
    """Collects the nodes, constants, inputs and outputs of one ONNX graph.

    Parameters
    ----------
    half : bool
        Whether to compute in float16, with constants stored so. Inputs are float32 all the same and
        go through `narrow`; what follows `widen` is float32 again.
    wide : collection of str
        In a graph of half precision, the results (names that `node` gave; they depend on nothing
        but the order of calls) whose operations are kept in float32: they read their operands cast
        to float32, or constants as they are, and what reads their result gets it cast to float16.
        That cast is called after the result, ``conv_31.float16``; where its name is listed too, all
        that would read it is kept in float32 instead. So is what reads a constant beyond float16's
        range. The casts of `narrow` always stay.
    """

    def __init__(self, *, half: bool = False, wide: Collection[str] = ()) -> None:
        self.half = half
        self._wide = frozenset(wide)
        self._in_half = half
        self._nodes: list[_Node] = []
        # By name, with whether they are to be rounded to float16.
        self._constants: dict[str, tuple[NDArray[Any], bool]] = {}
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
        self._add("Identity", [value], name)
        self._outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))

    def narrow(self, values: str) -> str:
        """Cast to float16, in a graph of half precision."""
        return self._cast(values, "FLOAT16") if self.half else values

    def widen(self, values: str) -> str:
        """Cast to float32, in a graph of half precision; constants from here on are float32."""
        self._in_half = False
        return self._cast(values, "FLOAT") if self.half else values

    def _cast(self, values: str, kind: str) -> str:
        return self.node("Cast", [values], to=getattr(_onnx().TensorProto, kind))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; gives its name."""
        floating = np.issubdtype(value.dtype, np.floating)
        value = _single(name, value) if floating else value
        self._constants[name] = (value, floating and self._in_half)
        return name

    def node(self, kind: str, inputs: list[str], *, label: str = "", **attributes: Any) -> str:
        """Add an operation with one result, of the layer `label`; gives the result's name."""
        return self._add(kind, inputs, f"{kind.lower()}_{len(self._nodes)}", label, attributes)

    def _add(
        self,
        kind: str,
        inputs: list[str],
        name: str,
        label: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        operation = Operation(kind, tuple(inputs), name, attributes or {})
        self._nodes.append(_Node(operation, self._in_half, label))
        return name

    def pad_edges(self, label: str, values: str, edge: int) -> str:
        """Repeat the edge voxels of (N, C, i, j, k) maps `edge` times on every side."""
        pads = np.array([0, 0, edge, edge, edge] * 2, np.int64)
        return self.node("Pad", [values, self.constant(f"{label}.pads", pads)], mode="edge")

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
        return self.node("Add", [result, tap], label=label)

    def serialise(self) -> bytes:
        """Check the graph and give its bytes; the same graph gives the same bytes."""
        onnx = _onnx()
        nodes = list(self._typed())
        read = {name for node in nodes for name in node.input}
        graph = onnx.helper.make_graph(
            nodes,
            "trtseg",
            self._inputs,
            self._outputs,
            initializer=[
                onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
                for name, value in self._stored(read)
            ],
        )
        return _serialised(graph)

    def _typed(self) -> Iterator[Any]:
        """The graph's nodes, with a cast wherever one reads what is of another type."""
        onnx = _onnx()
        to = {AS_HALF: onnx.TensorProto.FLOAT16, _AS_SINGLE: onnx.TensorProto.FLOAT}
        # Tensors whose readers are kept in float32.
        beyond = {name.removesuffix(AS_HALF) for name in self._wide if name.endswith(AS_HALF)}
        beyond |= {
            name for name, (value, half) in self._constants.items() if half and not _fits(value)
        }
        in_half = {name for name, (_, half) in self._constants.items() if half}
        kept: set[str] = set()
        casts: set[str] = set()
        for node in self._nodes:
            operation, half = node.operation, node.half
            inputs, note = list(operation.inputs), ""
            if operation.kind != "Cast":
                if half and (operation.output in self._wide or not beyond.isdisjoint(inputs)):
                    half, note = False, f"{node.label} {self._part(operation)}".strip()
                    kept.add(operation.output)
                other, suffix = (kept, AS_HALF) if half else (in_half, _AS_SINGLE)
                for place, name in enumerate(operation.inputs):
                    if name not in other:
                        continue
                    inputs[place] = cast = name + suffix
                    # Constants are stored as they are read.
                    if name not in self._constants and cast not in casts:
                        casts.add(cast)
                        yield onnx.helper.make_node("Cast", [name], [cast], cast, to=to[suffix])
            if half:
                in_half.add(operation.output)
            yield onnx.helper.make_node(
                operation.kind,
                inputs,
                [operation.output],
                operation.output,
                note,
                **operation.attributes,
            )

    def _part(self, operation: Operation) -> str:
        if operation.kind == "Add" and not self._constants.keys().isdisjoint(operation.inputs):
            return "activation"
        return _PARTS.get(operation.kind, "copy")

    def _stored(self, read: set[str]) -> Iterator[tuple[str, NDArray[Any]]]:
        """The graph's constants: rounded to float16, as they are, or both, as they are read."""
        for name, (value, half) in self._constants.items():
            single = name + _AS_SINGLE
            if half and single in read:
                yield single, value
            if not half:
                yield name, value
            elif name in read or single not in read:
                yield name, value.astype(np.float16)


def _serialised(graph: Any) -> bytes:
    onnx = _onnx()
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


def _single(name: str, value: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        single = value.astype(np.float32)
    if not np.isfinite(single).all():
        raise EngineError(
            f"{name}: a weight of {np.abs(value).max():.3g}",
            expected=f"at most {np.finfo(np.float32).max:g}, the range of float32",
            action="use weights that are finite",
        )
    return single


def _fits(value: NDArray[np.float32]) -> bool:
    """Whether all of it is finite in float16."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(np.float16)).all())


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
