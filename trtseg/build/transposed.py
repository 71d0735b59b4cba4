"""The transposed form: subsampled maps enter the first FC layer without being repeated.

A valid convolution with an odd kernel k over a map that was nearest-repeated by f equals a
transposed convolution of the map itself, with stride f and kernel f + k - 1. Along one axis, with
h = k // 2, the convolution is ::

    y[x] = sum over t of w[t] * map[(x + t - h) // f]

Writing x + t - h = c f + p (cell c, phase 0 <= p < f) and j = p - t + k - 1 gives
x + h = c f + j, so that y[x] is element x + h of the transposed convolution with the kernel ::

    K[j] = sum of w[t] over all p, t with p - t + k - 1 = j

which is the flipped taps, fully convolved with a box of f ones. The published edge padding of h
voxels becomes e = ceil(h / f) cells of edge padding, and shifts the result by e f; batch norm and
PReLU act on single values, so they commute with the repeat. The result equals the published form's
up to rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from trtseg.build.graph import (
    Graph,
    add_activation,
    add_convolution,
    add_pathway,
    add_repeat,
    add_score,
    add_sequence,
)
from trtseg.phases import reach

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from trtseg.architecture import PathwaySpec
    from trtseg.build.freeze import FrozenLayer, FrozenNetwork


def transposed(
    network: FrozenNetwork,
    *,
    batch: int | str = "N",
    half: bool = False,
    wide: Collection[str] = (),
) -> bytes:
    """Build the transposed form.

    Parameters, errors, and the graph's inputs and output are those of `trtseg.build.graph.plain`;
    what is listed in `wide` is of this form.
    """
    spec = network.spec
    graph = Graph(half=half, wide=wide)
    first, *middle, last = network.fc
    total, maps, channel = "", [], 0
    for pathway, layers in zip(spec.pathways, network.pathways, strict=True):
        features = add_pathway(graph, spec.input_size(pathway), pathway, layers, batch)
        channels = slice(channel, channel + pathway.feature_maps[-1])
        channel = channels.stop
        term = _first_term(graph, pathway, first, channels, features, spec.out)
        total = graph.node("Add", [total, term], label="fc.1") if total else term
        maps.append(features)
    before = None
    if middle and middle[0].residual:
        repeated = [
            add_repeat(graph, pathway, features, spec.out)
            for pathway, features in zip(spec.pathways, maps, strict=True)
        ]
        joined = repeated[0] if len(repeated) == 1 else graph.node("Concat", repeated, axis=1)
        before = joined, spec.concat_channels
    features = add_sequence(graph, "fc", middle, total, first=2, before=before)
    add_score(graph, f"fc.{len(network.fc)}", last, features)
    return graph.serialise()


def stretch(weight: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Kernel of the transposed convolution that replaces repeating and convolving.

    Parameters
    ----------
    weight : ndarray, shape (out, in, k, k, k)
    factor : int
        Times that the map is repeated per axis (f).

    Returns
    -------
    ndarray, shape (in, out, f + k - 1, f + k - 1, f + k - 1), float32
        In ONNX's order for ConvTranspose. Summed in float64.
    """
    kernel = weight.astype(np.float64).swapaxes(0, 1)
    for axis in (2, 3, 4):
        flipped = np.flip(kernel, axis)
        shape = list(flipped.shape)
        shape[axis] += factor - 1
        kernel = np.zeros(shape)
        for shift in range(factor):
            where = [slice(None)] * 5
            where[axis] = slice(shift, shift + flipped.shape[axis])
            kernel[tuple(where)] += flipped
    return np.ascontiguousarray(kernel, np.float32)


def _first_term(
    graph: Graph,
    pathway: PathwaySpec,
    first: FrozenLayer,
    channels: slice,
    features: str,
    out: int,
) -> str:
    """Add what the first FC layer makes of one pathway's features, on the full grid."""
    label = f"fc.1.{pathway.name}"
    values = add_activation(graph, label, first, features, channels=channels)
    kernel = first.weight.shape[2]
    factor = pathway.factor
    # Factor 1 gives kernel // 2 voxels of edge: the padding of the published form.
    edge = reach(factor, kernel)
    if edge:
        values = graph.pad_edges(label, values, edge)
    if factor == 1:
        return add_convolution(
            graph, label, replace(first, weight=first.weight[:, channels]), values
        )
    weight = stretch(first.weight[:, channels], factor)
    side = weight.shape[2]
    begin = edge * factor + kernel // 2
    end = (-(-out // factor) + 2 * edge - 1) * factor + side - begin - out
    return graph.node(
        "ConvTranspose",
        [values, graph.constant(f"{label}.weight", weight)],
        label=label,
        kernel_shape=[side] * 3,
        strides=[factor] * 3,
        pads=[begin] * 3 + [end] * 3,
    )
