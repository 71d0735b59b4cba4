"""What a backend is: something that loads built networks and runs them over volumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.engine import Engine
    from trtseg.tiling import TilePlan

#: Called with the number of tiles just finished.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class NetworkOutput:
    """What a network says of a volume. The backend made the arrays; the caller owns them.

    Attributes
    ----------
    labels : ndarray, shape of the volume, uint8
        1 where class 1 is the likelier, else 0; 0 where no tile was planned.
    probabilities : ndarray, shape of the volume, float32, or None
        Probability of class 1, where asked for.
    """

    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None


class Network(Protocol):
    """One loaded network."""

    spec: NetworkSpec

    def run(
        self,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Run the planned tiles over a z-scored volume of shape ``plan.shape``."""


class Backend(Protocol):
    """A device and the library that drives it; ``close`` frees what it holds."""

    device: str

    def load(self, engine: Engine) -> Network:
        """Load a built network."""

    def close(self) -> None:
        """Free the device; loaded networks are unusable afterwards."""


def logistic(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probability of class 1 from the class difference, elementwise, float32."""
    with np.errstate(over="ignore"):  # exp overflows to inf for logits below -88: the result is 0
        result: NDArray[np.float32] = 1 / (np.float32(1) + np.exp(-logit))
    return result
