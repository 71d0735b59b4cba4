"""Folded weights -> the graphs the CPU runs: the network in three parts that share work.

- ``normal.onnx``: the normal pathway. Valid convolutions do not depend on the tile, so one run over
  a large block serves all of its tiles.
- ``sub.onnx``: the subsampled pathways of a tile.
- ``fc.onnx``: what follows, for the voxels of a tile that are wanted. The first FC layer treats the
  subsampled maps on their own coarse grids (see `trtseg.phases`) instead of repeating them.

Rows are voxels from the first FC layer on: the layers after it are products with a matrix.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from trtseg.build.graph import OUTPUT, Graph, add_activation, add_sequence
from trtseg.engine import FC_PART, NORMAL_PART, SUB_PART
from trtseg.phases import axis_variants, collapse, reach

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.architecture import PathwaySpec
    from trtseg.build.freeze import FrozenLayer, FrozenNetwork

_LAST = (0, 2, 3, 4, 1)


def parts(network: FrozenNetwork) -> dict[str, bytes]:
    """Build the parts of a network.

    Returns
    -------
    dict of str to bytes
        File name to serialised ONNX. Without subsampled pathways there is no ``sub.onnx``.

        ``normal.onnx`` maps ``normal``, float32 (1, 1, i, j, k), to ``features``,
        (1, C, i - 2m, j - 2m, k - 2m), m being the margin.

        ``sub.onnx`` maps ``sub<f>``, float32 (N, 1, n, n, n), to ``sub<f>.features``.

        ``fc.onnx`` takes ``normal``, the features of a box with the FC kernel's half side of edge
        around it; per factor f ``sub<f>``, the cells of the box with `trtseg.phases.reach` cells
        of edge; ``sub<f>.variant`` and ``sub<f>.cell``, int32, from `trtseg.phases.box_indices`.
        It gives ``logit``, float32 (voxels of the box,): the class difference.

    Raises
    ------
    MissingExtraError
        onnx is not installed.
    """
    graphs = {NORMAL_PART: _normal(network), FC_PART: _fc(network)}
    if len(network.pathways) > 1:
        graphs[SUB_PART] = _sub(network)
    return graphs


def _normal(network: FrozenNetwork) -> bytes:
    graph = Graph()
    pathway = network.spec.pathways[0]
    graph.add_input(pathway.name, (1, 1, "i", "j", "k"))
    features = add_sequence(graph, pathway.name, network.pathways[0], pathway.name)
    graph.add_output("features", features)
    return graph.serialise()


def _sub(network: FrozenNetwork) -> bytes:
    graph = Graph()
    spec = network.spec
    for pathway, layers in zip(spec.pathways[1:], network.pathways[1:], strict=True):
        side = spec.input_size(pathway)
        graph.add_input(pathway.name, ("N", 1, side, side, side))
        features = add_sequence(graph, pathway.name, layers, pathway.name)
        graph.add_output(f"{pathway.name}.features", features)
    return graph.serialise()


def _fc(network: FrozenNetwork) -> bytes:
    graph = Graph()
    spec = network.spec
    first, *others = network.fc
    half = spec.fc_kernel // 2
    sums, taps = [], []
    channel = 0
    for pathway in spec.pathways:
        channels = slice(channel, channel + pathway.feature_maps[-1])
        channel = channels.stop
        name = pathway.name
        shape = (1, pathway.feature_maps[-1], f"{name}.i", f"{name}.j", f"{name}.k")
        graph.add_input(name, shape)
        values = add_activation(graph, f"fc.1.{name}", first, name, channels=channels)
        weight = first.weight[:, channels]
        if pathway.factor == 1:
            operands = [
                values,
                graph.constant("fc.1.weight", weight),
                graph.constant("fc.1.bias", first.bias),
            ]
            result = graph.node("Conv", operands, kernel_shape=[spec.fc_kernel] * 3)
            sums.append(_rows(graph, "fc.1", result, len(weight)))
            centre = graph.crop("fc.1.centre", name, [half] * 3, [half] * 3)
            taps.append(_rows(graph, "fc.1.tap", centre, weight.shape[1]))
        else:
            sums.append(_variants(graph, pathway, spec.fc_kernel, values, weight))
            rows = _rows(graph, f"{name}.tap", name, weight.shape[1])
            index = graph.add_input(f"{name}.cell", (f"{name}.voxels",), integer=True)
            taps.append(graph.node("Gather", [rows, index], axis=1))
    features = sums[0]
    for term in sums[1:]:
        features = graph.node("Add", [features, term])
    before, before_channels = taps, spec.concat_channels
    for number, layer in enumerate(others, 2):
        label = f"fc.{number}"
        result = _product(graph, label, layer, features)
        channels, channels_in = layer.weight.shape[:2]
        if layer.residual:
            tap = before[0] if len(before) == 1 else graph.node("Concat", before, axis=2)
            result = graph.add_to_first(label, result, channels, tap, before_channels, axis=2)
        before, before_channels, features = [features], channels_in, result
    flat = graph.node("Reshape", [features, graph.constant("flat", np.array([-1], np.int64))])
    graph.add_output(OUTPUT, flat)
    return graph.serialise()


def _variants(
    graph: Graph, pathway: PathwaySpec, kernel: int, values: str, weight: NDArray[np.float32]
) -> str:
    """Convolve each variant over the cells; then every voxel picks its own variant and cell."""
    variants, _ = axis_variants(pathway.factor, kernel)
    edge = reach(pathway.factor, kernel)
    results = []
    for chosen in itertools.product(range(len(variants)), repeat=3):
        label = f"{pathway.name}.variant.{''.join(map(str, chosen))}"
        cells = [variants[one] for one in chosen]
        summed = weight
        for axis, one in enumerate(cells, 2):
            summed = collapse(summed, one, axis)
        window = graph.crop(
            label, values, [edge + min(one) for one in cells], [edge - max(one) for one in cells]
        )
        result = graph.node(
            "Conv",
            [window, graph.constant(f"{label}.weight", summed)],
            kernel_shape=list(summed.shape[2:]),
        )
        results.append(_rows(graph, label, result, len(weight)))
    joined = results[0] if len(results) == 1 else graph.node("Concat", results, axis=1)
    index = graph.add_input(f"{pathway.name}.variant", (f"{pathway.name}.voxels",), integer=True)
    return graph.node("Gather", [joined, index], axis=1)


def _product(graph: Graph, label: str, layer: FrozenLayer, rows: str) -> str:
    values = add_activation(graph, label, layer, rows, channels_last=True)
    matrix = layer.weight.reshape(layer.weight.shape[:2]).T
    result = graph.node("MatMul", [values, graph.constant(f"{label}.weight", matrix)])
    return graph.node("Add", [result, graph.constant(f"{label}.bias", layer.bias)])


def _rows(graph: Graph, label: str, values: str, channels: int) -> str:
    """(1, channels, i, j, k) to (1, voxels, channels)."""
    last = graph.node("Transpose", [values], perm=list(_LAST))
    shape = graph.constant(f"{label}.rows", np.array([1, -1, channels], np.int64))
    return graph.node("Reshape", [last, shape])
