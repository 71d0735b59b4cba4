"""A backend without a network: the decision is a threshold on the tile's own centre voxels.

A test double kept as ordinary code. Its labels are ``volume > threshold`` for any volume and any
tiling, which makes it the round-trip check of padding, gathering and stitching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtseg import tiling
from trtseg.backends.base import Ceilings, NetworkOutput, Work, logistic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import Progress
    from trtseg.engine import Engine
    from trtseg.tiling import TilePlan


class FakeNetwork:
    """Class 1 where the z-score exceeds `threshold`; the "probability" is its logistic."""

    def __init__(self, spec: NetworkSpec, threshold: float = 0.0) -> None:
        self.spec = spec
        self.threshold = threshold

    def run(
        self,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Run the planned tiles; see `trtseg.backends.base.Network`."""
        padded = tiling.pad(volume, plan)
        labels = np.zeros(plan.shape, np.uint8)
        maps = np.zeros(plan.shape, np.float32) if probabilities else None
        centre = slice(plan.spec.margin, plan.spec.margin + plan.spec.out)
        for starts in plan.batches(plan.spec.batch):
            inputs = tiling.gather(padded, starts, plan.spec)
            logits = inputs["normal"][:, 0, centre, centre, centre] - np.float32(self.threshold)
            for start, logit in zip(starts, logits, strict=True):
                tiling.stitch(labels, start, logit > 0)
                if maps is not None:
                    tiling.stitch(maps, start, logistic(logit))
            if progress is not None:
                progress(len(starts))
        return NetworkOutput(labels, maps)

    def work(self, volume: NDArray[np.float32], plan: TilePlan) -> Work:
        """Nothing is multiplied; every voxel of a tile is read."""
        return Work(0, volume.itemsize * len(plan) * self.spec.tile**3)


class FakeBackend:
    """Loads `FakeNetwork` for any engine."""

    device = "fake"
    description = "no network"

    def __init__(self, precision: str = "f32") -> None:
        self.precision = precision

    def load(self, engine: Engine) -> FakeNetwork:
        """Give a network of the engine's architecture."""
        return FakeNetwork(engine.spec)

    def ceilings(self) -> Ceilings:
        """One of each a second."""
        return Ceilings(1.0, 1.0)

    def close(self) -> None:
        """Nothing is held."""
