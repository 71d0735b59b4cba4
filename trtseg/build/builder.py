"""Checkpoint -> verified engine folder, for both networks of a model set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from trtseg.architecture import NETWORKS, PUBLISHED
from trtseg.backends.base import logistic
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.openvino_library import version
from trtseg.build import checkpoint, graph, reference
from trtseg.build.freeze import FrozenNetwork, freeze
from trtseg.build.parts import parts
from trtseg.build.variables import network_variables
from trtseg.engine import WEIGHTS, build_lock, load_engine, write_engine
from trtseg.errors import EngineError
from trtseg.modelconfig import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.engine import Engine
    from trtseg.models import ModelSet

#: Largest accepted difference in probability between a built network and its checkpoint.
TOLERANCE = 1e-4
_SEED = 20200706

#: Called with a line that says what is being done.
Report = Callable[[str], None]


def build_models(
    models: ModelSet, root: Path, *, force: bool = True, report: Report | None = None
) -> list[Engine]:
    """Build both networks of a model set under ``root/<models>/``.

    Parameters
    ----------
    models : ModelSet
    root : Path
        The engines folder; made if missing.
    force : bool
        Build even where an intact build of the same checkpoint is there already.
    report : callable, optional
        Told of each step.

    Returns
    -------
    list of Engine
        BDN, CGM.

    Raises
    ------
    ModelError
        The checkpoint or its config is missing, damaged or of another architecture.
    MissingExtraError
        tensorflow or onnx is not installed.
    EngineError
        A frozen network disagrees with its checkpoint; nothing was written for it.
    OutputError
        The folder cannot be written.
    """
    say = report or (lambda _: None)
    with build_lock(root, models.name, say):
        return [_build(models, net, root, force, say) for net in NETWORKS]


def _build(models: ModelSet, net: str, root: Path, force: bool, say: Report) -> Engine:
    digests = models.digests(net)
    if not force:
        try:
            return load_engine(root, models.name, net, checkpoint=digests)
        except EngineError:
            pass  # missing, stale or damaged: all three are mended by building
    config = models.config(net)
    spec = PUBLISHED if config is None else read_config(config)
    say(f"{net.upper()}: reading the checkpoint")
    variables = checkpoint.read_variables(
        models.checkpoint(net), network_variables(spec).required(spec)
    )
    say(f"{net.upper()}: folding the weights")
    frozen = freeze(variables, spec)
    # What is proven is what is stored: the weights are read back from the bytes to be written.
    weights = frozen.to_bytes()
    graphs = parts(FrozenNetwork.from_bytes(weights, spec))
    say(f"{net.upper()}: comparing the frozen network with the checkpoint")
    difference = disagreement(variables, spec, graphs)
    if not difference <= TOLERANCE:
        raise EngineError(
            f"{models.name} {net.upper()}: the frozen network differs from its checkpoint by "
            f"{difference:.2e} in probability",
            expected=f"at most {TOLERANCE:.0e}",
            action="nothing was written; please report this checkpoint's architecture",
        )
    return write_engine(
        root,
        models.name,
        net,
        spec=spec,
        files={WEIGHTS: weights, **graphs},
        checkpoint=digests,
        notice=models.notice,
        proof={
            "compared": "probability of class 1 on one random tile: the parts in OpenVINO "
            "float32 against the checkpoint in float64, nothing folded",
            "largest_difference": difference,
            "tolerance": TOLERANCE,
            "seed": _SEED,
        },
        versions={
            "numpy": np.__version__,
            "tensorflow": checkpoint.tensorflow_version(),
            "onnx": graph.version(),
            "openvino": version(),
        },
    )


def disagreement(
    variables: dict[str, NDArray[np.float32]], spec: NetworkSpec, graphs: Mapping[str, bytes]
) -> float:
    """Largest difference in probability, on one random tile, of built graphs and their checkpoint.

    Parameters
    ----------
    variables : dict of str to ndarray
        The checkpoint's tensors.
    spec : NetworkSpec
    graphs : mapping of str to bytes
        The parts to judge.
    """
    rng = np.random.default_rng(_SEED)
    inputs = {
        name: rng.standard_normal((1, 1, side, side, side)).astype(np.float32)
        for name, side in spec.input_sizes().items()
    }
    expected = reference.evaluate(variables, spec, {n: tile[0] for n, tile in inputs.items()})
    network = OpenVINOBackend().compile(spec, graphs)
    return float(np.abs(logistic(network.tile_logits(inputs)) - expected).max())
