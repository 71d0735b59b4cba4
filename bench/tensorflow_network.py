"""The checkpoint's network in TensorFlow 2, executed tile by tile as DeepMedic does: the peer.

Layers are DeepMedic's, unfolded (batch norm from the rolling averages, PReLU, dropout factor, valid
convolution, residual); channels come last, because TensorFlow's CPU convolution knows no other
layout, and without the transposes DeepMedic puts around each convolution, which favours TensorFlow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trtseg.architecture import NetworkSpec
from trtseg.backends.base import run_tiles
from trtseg.build.reference import batch_norm
from trtseg.build.variables import LayerVariables, network_variables
from trtseg.tiling import TilePlan


class TensorFlowNetwork:
    """Runs a whole plan in batches of ``spec.batch``, the last one filled with its last tile."""

    def __init__(self, variables: dict[str, NDArray[np.float32]], spec: NetworkSpec) -> None:
        self.spec = spec
        layout = network_variables(spec)
        self._pathways = [[_constants(variables, one) for one in p] for p in layout.pathways]
        self._fc = [_constants(variables, one) for one in layout.fc]
        self._bias = tf.constant(variables[layout.softmax_bias])
        self._call = tf.function(self._evaluate, reduce_retracing=True)

    def run(self, volume: NDArray[np.float32], plan: TilePlan) -> NDArray[np.uint8]:
        """Labels of a z-scored volume, later tiles overwriting earlier ones."""
        return run_tiles(volume, plan, self._differences, batch=self.spec.batch).labels

    def _differences(self, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Probability of class 1 less that of class 0: above 0 where class 1 is the likelier."""
        full = [one.take(range(self.spec.batch), 0, mode="clip") for one in inputs.values()]
        found = self._call([np.moveaxis(one, 1, -1) for one in full]).numpy()
        found = found[: len(inputs["normal"])]
        return found[..., 1] - found[..., 0]

    def _evaluate(self, inputs: list[Any]) -> Any:
        maps = []
        for pathway, layers, image in zip(self.spec.pathways, self._pathways, inputs, strict=True):
            features = _layers(layers, image)
            for axis in (1, 2, 3):
                features = tf.repeat(features, pathway.factor, axis=axis)
            maps.append(features[:, : self.spec.out, : self.spec.out, : self.spec.out])
        joined = tf.concat(maps, axis=-1)
        edge = self.spec.fc_kernel // 2
        for _ in range(edge):  # repeating the edge by one voxel, edge times
            for axis in (1, 2, 3):
                first = tf.gather(joined, [0], axis=axis)
                last = tf.gather(joined, [joined.shape[axis] - 1], axis=axis)
                joined = tf.concat([first, joined, last], axis=axis)
        return tf.nn.softmax(_layers(self._fc, joined) + self._bias)


def _constants(variables: dict[str, NDArray[np.float32]], layer: LayerVariables) -> dict[str, Any]:
    weight = np.transpose(variables[layer.weight], (2, 3, 4, 1, 0))
    constants: dict[str, Any] = {
        "weight": tf.constant(weight),
        "keep": layer.keep,
        "residual": layer.residual,
        "norm": None,
        "bias": None,
    }
    if layer.norm is not None:
        constants["norm"] = [
            tf.constant(one.astype(np.float32)) for one in batch_norm(variables, layer)
        ]
    if layer.input_bias is not None:
        constants["bias"] = tf.constant(variables[layer.input_bias])
    return constants


def _layers(layers: list[dict[str, Any]], features: Any) -> Any:
    before = features
    for layer in layers:
        values = features
        if layer["bias"] is not None:
            values = values + layer["bias"]
        if layer["norm"] is not None:
            scale, shift, slope = layer["norm"]
            values = values * scale + shift
            values = tf.maximum(values, 0.0) + slope * tf.minimum(values, 0.0)
        if layer["keep"] != 1.0:
            values = values * layer["keep"]
        result = tf.nn.conv3d(values, layer["weight"], [1] * 5, "VALID")
        if layer["residual"]:
            margin = (before.shape[1] - result.shape[1]) // 2
            size = result.shape[1]
            crop = slice(margin, margin + size)
            tap = before[:, crop, crop, crop]
            extra = result.shape[-1] - tap.shape[-1]
            result = result + tf.pad(tap, [[0, 0]] * 4 + [[0, extra]])
        before, features = features, result
    return features
