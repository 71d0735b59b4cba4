"""What a backend is: something that loads built networks and runs them over volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trtseg import tiling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.engine import Engine
    from trtseg.tiling import TilePlan

#: Called with the number of tiles just finished.
Progress = Callable[[int], None]


class ChainProgress(Protocol):
    """Told of the tiles of each network as they finish."""

    def __call__(self, network: str, done: int, total: int) -> None:
        """`done` of `total` tiles of ``"bdn"`` or ``"cgm"`` are finished."""


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


@dataclass(frozen=True)
class ChainOutput:
    """What both networks say of a scan.

    Attributes
    ----------
    brain, cortex : NetworkOutput
        Labels, and probabilities where asked for; the cortex's are gated. The brain has no
        probabilities where its mask was given. The caller owns the arrays.
    brain_voxels, cortex_voxels : int
        Labels that are 1.
    times : mapping of str to float
        Seconds of each stage, in the order they ran.
    """

    brain: NetworkOutput
    cortex: NetworkOutput
    brain_voxels: int
    cortex_voxels: int
    times: Mapping[str, float]


@dataclass(frozen=True)
class Work:
    """What was executed.

    Attributes
    ----------
    multiply_adds : int
    bytes : int
        Activations read and written, each layer on its own.
    """

    multiply_adds: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        """The sum of both."""
        return Work(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        """The same, that many times."""
        return Work(times * self.multiply_adds, times * self.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What a device reached at its best, measured.

    Attributes
    ----------
    operations_per_second : float
        Two for each multiply-add of one large product.
    bytes_per_second : float
        Read and written by one large copy.
    """

    operations_per_second: float
    bytes_per_second: float


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

    def work(self, volume: NDArray[np.float32], plan: TilePlan) -> Work:
        """What `run` executes."""


class Backend(Protocol):
    """A device and the library that drives it; ``close`` frees what it holds."""

    device: str
    precision: str

    @property
    def description(self) -> str:
        """The device and the library, for people."""

    def load(self, engine: Engine) -> Network:
        """Load a built network."""

    def ceilings(self) -> Ceilings:
        """Measure what the device reaches at its best; takes seconds."""

    def close(self) -> None:
        """Free the device; loaded networks are unusable afterwards."""


def run_tiles(
    volume: NDArray[np.float32],
    plan: TilePlan,
    evaluate: Callable[[dict[str, NDArray[np.float32]]], Iterable[NDArray[np.float32]]],
    *,
    batch: int,
    probabilities: bool = False,
    progress: Progress | None = None,
) -> NetworkOutput:
    """Run the planned tiles each on its own, later ones over earlier ones, as DeepMedic does.

    Parameters
    ----------
    volume : ndarray, shape ``plan.shape``, float32
        Z-scores.
    plan : TilePlan
    evaluate : callable
        Given the inputs of some tiles, as `trtseg.tiling.gather` cuts them, gives the class
        difference of each, (out, out, out).
    batch : int
        Most tiles it is given.
    probabilities : bool
    progress : callable, optional
    """
    padded = tiling.pad(volume, plan)
    labels = np.zeros(plan.shape, np.uint8)
    maps = np.zeros(plan.shape, np.float32) if probabilities else None
    for starts in plan.batches(batch):
        found = evaluate(tiling.gather(padded, starts, plan.spec))
        for start, logits in zip(starts, found, strict=True):
            tiling.stitch(labels, start, logits > 0)
            if maps is not None:
                tiling.stitch(maps, start, logistic(logits))
        if progress is not None:
            progress(len(starts))
    return NetworkOutput(labels, maps)


def network_progress(progress: ChainProgress | None, net: str, total: int) -> Progress | None:
    """What one network tells of its tiles, told as the chain does; says at once that 0 are done."""
    if progress is None:
        return None
    done = 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress(net, done, total)

    advance(0)
    return advance


def logistic(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probability of class 1 from the class difference, elementwise, float32."""
    with np.errstate(over="ignore"):  # exp overflows to inf for logits below -88: the result is 0
        result: NDArray[np.float32] = 1 / (np.float32(1) + np.exp(-logit))
    return result
