"""The network evaluated from the checkpoint's variables, nothing folded: the build's proof.

Slow and plain on purpose: float64 numpy, one operation per line of DeepMedic's layer definition, so
that an error in folding or in a graph form has nothing here to hide behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtseg.build.variables import LayerVariables, network_variables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec

    Array = NDArray[np.float64]

#: Smallest batch-norm variance, added under the square root (DeepMedic v0.7.0).
BN_EPSILON = 1.18e-38


def evaluate(
    variables: Mapping[str, NDArray[np.float32]],
    spec: NetworkSpec,
    inputs: Mapping[str, NDArray[np.float32]],
) -> Array:
    """Probability of class 1 for one tile.

    Parameters
    ----------
    variables : mapping of str to ndarray
        The checkpoint's tensors, as `trtseg.build.checkpoint.read_variables` gives them.
    spec : NetworkSpec
    inputs : mapping of str to ndarray, shape (1, n, n, n)
        One tile as `trtseg.tiling.gather` cuts it, its batch axis dropped.

    Returns
    -------
    ndarray, shape (out, out, out), float64
    """
    layout = network_variables(spec)
    maps = []
    for pathway, layers in zip(spec.pathways, layout.pathways, strict=True):
        features = _layers(variables, layers, inputs[pathway.name].astype(np.float64))
        for axis in (1, 2, 3):
            features = np.repeat(features, pathway.factor, axis=axis)
        maps.append(features[:, : spec.out, : spec.out, : spec.out])
    edge = spec.fc_kernel // 2
    edges = [(0, 0), (edge, edge), (edge, edge), (edge, edge)]
    joined = np.pad(np.concatenate(maps), edges, "edge")
    scores = _layers(variables, layout.fc, joined)
    scores = scores + variables[layout.softmax_bias].astype(np.float64)[:, None, None, None]
    exponent = np.exp(scores - scores.max(axis=0))
    return np.asarray(exponent[1] / exponent.sum(axis=0))


def batch_norm(
    variables: Mapping[str, NDArray[np.float32]], layer: LayerVariables
) -> tuple[Array, Array, Array]:
    """Scale, shift and PReLU slope per channel, in float64.

    The variance is n / (n - 1) times the mean of the rolling variances, n being the values per
    channel of the layer's training input (DeepMedic v0.7.0 corrects the bias of each batch so).
    """
    names = layer.norm_names()
    gain, bias, slope, means, variances = (variables[n].astype(np.float64) for n in names)
    correction = layer.samples / (layer.samples - 1)
    deviation = np.sqrt(correction * variances.mean(axis=0) + BN_EPSILON)
    scale = gain / deviation
    return scale, bias - means.mean(axis=0) * scale, slope


def _layers(
    variables: Mapping[str, NDArray[np.float32]],
    layers: tuple[LayerVariables, ...],
    features: Array,
) -> Array:
    before = features
    for layer in layers:
        values = features
        if layer.input_bias is not None:
            values = values + float(variables[layer.input_bias][0])
        if layer.norm is not None:
            scale, shift, slope = (v[:, None, None, None] for v in batch_norm(variables, layer))
            values = values * scale + shift
            values = np.maximum(values, 0) + slope * np.minimum(values, 0)
        result = _convolve(values * layer.keep, variables[layer.weight].astype(np.float64))
        if layer.residual:
            result[: len(before)] += _centre(before, result.shape[1])
        before, features = features, result
    return features


def _centre(values: Array, side: int) -> Array:
    first = (values.shape[1] - 1) // 2 - (side - 1) // 2
    crop = slice(first, first + side)
    return values[:, crop, crop, crop]


def _convolve(values: Array, weight: Array) -> Array:
    side = weight.shape[2]
    shape = [n - side + 1 for n in values.shape[1:]]
    result = np.zeros((weight.shape[0], int(np.prod(shape))))
    for r, c, z in np.ndindex(side, side, side):
        window = values[:, r : r + shape[0], c : c + shape[1], z : z + shape[2]]
        result += weight[:, :, r, c, z] @ window.reshape(len(values), -1)
    return result.reshape(-1, *shape)
