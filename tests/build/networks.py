"""Small networks with random weights, their checkpoints, and a way to run a graph of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtseg.architecture import NetworkSpec, PathwaySpec
from trtseg.backends.openvino_library import openvino_module
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.variables import network_variables

Arrays = dict[str, NDArray[np.float32]]

#: Receptive field 9, tiles of 15, results of 7 (no multiple of 3, as in the published networks).
TINY = NetworkSpec(
    pathways=(
        PathwaySpec(1, feature_maps=(2, 3, 3, 4), residual_layers=(4,), dropout=(0.0,) * 4),
        PathwaySpec(3, feature_maps=(2, 3, 3, 4), residual_layers=(4,), dropout=(0.0,) * 4),
    ),
    fc_maps=(8, 8),
    rolling_batches=4,
    train_segment=13,
    tile=15,
)

ONE_LAYER = NetworkSpec(
    pathways=(PathwaySpec(1, (1,), (), (0.0,)),),
    fc_maps=(1,),
    fc_kernel=1,
    fc_residual_layers=(),
    fc_dropout=(0.0, 0.0),
    rolling_batches=1,
    train_segment=4,
    tile=3,
)
ADJACENT_RESIDUALS = NetworkSpec(
    pathways=(
        PathwaySpec(1, (1, 2, 2, 3), (2, 3, 4), (0.0, 0.5, 0.0, 0.25)),
        PathwaySpec(2, (2, 2, 2, 2), (), (0.0,) * 4),
        PathwaySpec(4, (1, 1, 4, 4), (3,), (0.0,) * 4),
    ),
    fc_maps=(10, 9, 12),
    fc_kernel=5,
    fc_residual_layers=(2, 3),
    fc_dropout=(0.5, 0.0, 0.25, 0.5),
    rolling_batches=2,
    train_segment=11,
    tile=14,
)
NO_SUBSAMPLED = NetworkSpec(
    pathways=(PathwaySpec(1, (2, 3, 3), (3,), (0.0,) * 3),),
    fc_maps=(4, 5),
    fc_kernel=3,
    fc_dropout=(0.0, 0.5, 0.5),
    rolling_batches=2,
    train_segment=9,
    tile=11,
)
POINTWISE_FC = NetworkSpec(
    pathways=(
        PathwaySpec(1, (2, 3), (2,), (0.0,) * 2),
        PathwaySpec(3, (2, 2), (), (0.0,) * 2),
    ),
    fc_maps=(4,),
    fc_kernel=1,
    fc_residual_layers=(),
    fc_dropout=(0.0, 0.5),
    rolling_batches=2,
    train_segment=7,
    tile=10,
)

#: Name to architecture: what DeepMedic allows and trtseg computes.
ARCHITECTURES = {
    "tiny": TINY,
    "one-layer": ONE_LAYER,
    "adjacent-residuals": ADJACENT_RESIDUALS,
    "no-subsampled": NO_SUBSAMPLED,
    "pointwise-fc": POINTWISE_FC,
}


def random_variables(spec: NetworkSpec, seed: int = 0) -> Arrays:
    """Variables of the size trained ones have: no layer vanishes, no score saturates."""
    rng = np.random.default_rng(seed)
    variables = {}
    for name, shape in network_variables(spec).required(spec).items():
        stem = name.removeprefix("net/").split("_")[0]
        if stem == "W":
            values = rng.normal(0, np.sqrt(1.5 / np.prod(shape[1:])), shape)
        elif stem in ("gBn", "varBnsForRollingAverage"):
            values = rng.uniform(0.5, 1.5, shape)
        elif stem == "aPrelu":
            values = rng.uniform(0.0, 0.5, shape)
        else:
            values = rng.normal(0, 0.3, shape)
        variables[name] = values.astype(np.float32)
    return variables


def enlarge(network: FrozenNetwork, name: str, number: int, factor: float) -> FrozenNetwork:
    """Multiply the weights of layer `number` (1-based) of a sequence, and divide the next one's."""
    names = [*(one.name for one in network.spec.pathways), "fc"]
    sequences = dict(zip(names, [*network.pathways, network.fc], strict=True))
    layers = list(sequences[name])
    for place, by in ((number - 1, factor), (number, 1 / factor)):
        layers[place] = replace(layers[place], weight=layers[place].weight * np.float32(by))
    sequences[name] = tuple(layers)
    *pathways, fc = sequences.values()
    return replace(network, pathways=tuple(pathways), fc=fc)


def random_inputs(spec: NetworkSpec, seed: int = 0) -> Arrays:
    """One tile's inputs, each (1, n, n, n)."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((1, side, side, side)).astype(np.float32)
        for name, side in spec.input_sizes().items()
    }


def save_checkpoint(prefix: Path, tensors: Mapping[str, NDArray[np.generic]]) -> Path:
    """Write a TensorFlow tensor bundle of one shard; gives its prefix."""
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(values) for values in tensors.values()],
    )
    return prefix


def run_graph(onnx: bytes, inputs: Arrays) -> NDArray[np.float32]:
    """Logits of one tile by OpenVINO, in one graph: (out, out, out)."""
    core = openvino_module().Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = core.compile_model(core.read_model(onnx), "CPU", config)
    results = compiled({name: values[None] for name, values in inputs.items()})
    return np.array(results[0][0])


def ports(values: Iterable[Any]) -> dict[str, list[str | int]]:
    """Name to shape of the inputs or outputs of an ONNX graph, all of float32."""
    from onnx import TensorProto

    shapes = {}
    for value in values:
        tensor = value.type.tensor_type
        assert tensor.elem_type == TensorProto.FLOAT
        shapes[value.name] = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return shapes


def probability(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logistic function in float64."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
