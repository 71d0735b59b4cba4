"""Networks that run on the host double of a device in place of TensorRT's, and the CPU's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.cuda.host_device import HostDevice, view
from trtseg import tiling
from trtseg.architecture import NetworkSpec, PathwaySpec
from trtseg.backends.base import logistic
from trtseg.normalise import z_score
from trtseg.scan import Geometry, Scan

#: One tile's inputs, each (n, n, n), to its logits, (out, out, out).
Function = Callable[[Mapping[str, NDArray[np.float32]]], NDArray[np.float32]]


def small(tile: int = 9, layers: int = 2) -> NetworkSpec:
    """Receptive field 5, results of 5 voxels per axis."""
    return NetworkSpec(
        pathways=tuple(
            PathwaySpec(factor, (1,) * layers, (), (0.0,) * layers) for factor in (1, 3)
        ),
        fc_maps=(1,),
        fc_residual_layers=(),
        fc_dropout=(0.0, 0.0),
        tile=tile,
        batch=3,
    )


SPEC = small()
#: Another padding and other tiles than SPEC's.
OTHER = small(tile=11, layers=3)


def threshold(spec: NetworkSpec, value: float = 0.0) -> Function:
    """Class 1 where the tile's own centre voxel exceeds `value`, whatever surrounds it."""
    centre = slice(spec.margin, spec.margin + spec.out)

    def logits(inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        return inputs["normal"][centre, centre, centre] - np.float32(value)

    return logits


def mixed(spec: NetworkSpec, value: float = 0.0) -> Function:
    """Logits in which every input of the tile has its share, its borders and fill included."""
    own = threshold(spec, value)

    def logits(inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        total = own(inputs).astype(np.float64)
        for weight, (_, one) in enumerate(sorted(inputs.items()), 1):
            ramp = np.linspace(-1, 1, one.size).reshape(one.shape)
            total += weight * float((ramp * one).mean())
        return total.astype(np.float32)

    return logits


def compute(function: Function, spec: NetworkSpec, batch: int, tensors: Mapping[str, int]) -> None:
    """Run a batch at once: inputs read, and logits written, through their addresses."""
    sides = spec.input_sizes()
    inputs = {
        name: view(tensors[name], np.float32, (batch, side, side, side))
        for name, side in sides.items()
    }
    target = view(tensors["logit"], np.float32, (batch, *[spec.out] * 3))
    for place in range(batch):
        target[place] = function({name: one[place] for name, one in inputs.items()})


@dataclass
class FunctionExecutor:
    """See `trtseg.cuda.chain.Executor`."""

    device: HostDevice
    net: str
    spec: NetworkSpec
    batch: int
    function: Function
    scratch_bytes: int = 64
    runs: int = 0

    def bind(self, tensors: Mapping[str, int], scratch: int) -> None:
        self._tensors = dict(tensors)
        self._scratch = scratch

    def enqueue(self) -> None:
        self.device.submit(self._run)

    def _run(self) -> None:
        self.runs += 1
        # Scratch memory is the network's to spoil.
        view(self._scratch, np.uint8, self.scratch_bytes)[...] = 0xEE
        compute(self.function, self.spec, self.batch, self._tensors)


def scan_of(
    shape: tuple[int, ...], *, dtype: str = "int16", order: str = "F", seed: int = 0
) -> NDArray:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(100, 40, shape).clip(0, 250).astype(dtype), order=order)


def scores_of(raw: NDArray) -> NDArray[np.float32]:
    return z_score(Scan(raw, Geometry(np.eye(4), {}))).data


def on_cpu(
    function: Function,
    spec: NetworkSpec,
    scores: NDArray[np.float32],
    roi: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Probabilities of class 1 by the published method, tile over tile; 0 outside the region."""
    plan = tiling.plan_tiles(scores.shape, spec, roi)
    padded = tiling.pad(scores, plan)
    maps = np.zeros(scores.shape, np.float32)
    for start in plan.starts:
        inputs = tiling.gather(padded, start[None], spec)
        logits = function({name: one[0, 0] for name, one in inputs.items()})
        tiling.stitch(maps, start, logistic(logits))
    return maps if roi is None else maps * roi


def assert_labels(found: NDArray[np.uint8], maps: NDArray[np.float32]) -> None:
    """Labels of these probabilities; where they tie up to rounding, either will do."""
    clear = np.abs(maps - 0.5) > 1e-4
    np.testing.assert_array_equal(found[clear], maps[clear] > 0.5)
    assert clear.mean() > 0.9
