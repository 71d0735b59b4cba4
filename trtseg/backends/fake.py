"""A backend without a network: the decision is a threshold on the tile's own centre voxels.

A test double kept as ordinary code. Its labels are ``volume > threshold`` for any volume and any
tiling, which makes it the round-trip check of padding, gathering and stitching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtseg.backends.base import Ceilings, Work, run_tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import NetworkOutput, Progress
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
        return run_tiles(
            volume,
            plan,
            self._logits,
            batch=self.spec.batch,
            probabilities=probabilities,
            progress=progress,
        )

    def _logits(self, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        centre = slice(self.spec.margin, self.spec.margin + self.spec.out)
        values = inputs["normal"][:, 0, centre, centre, centre]
        logits: NDArray[np.float32] = values - np.float32(self.threshold)
        return logits

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
