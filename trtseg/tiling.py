"""Which tiles cover a scan, what each pathway sees of a tile, and where its result goes.

Pure functions on arrays: the reference for every backend. All of it restates DeepMedic v0.7.0's
whole-scan inference, its border quirks included; changing a tile's start changes the sampling phase
of the subsampled pathways, so the published tiling is part of the published result.

Two frames are used. *Scan* coordinates count voxels of the scan; *padded* coordinates count voxels
of the reflect-padded scan. A tile that starts at s in padded coordinates yields the voxels
s ... s + out - 1 in scan coordinates, because the padding before the scan equals the margin that
the valid convolutions take off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec

    Shape = tuple[int, int, int]


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one network over one scan, in the order in which they are written.

    Attributes
    ----------
    spec : NetworkSpec
    shape : tuple of int
        Voxels per axis of the scan.
    padding : tuple of (int, int)
        Voxels of reflect padding before and after, per axis.
    starts : ndarray, shape (tiles, 3), int32
        First voxel of each tile, in padded coordinates (and of its result, in scan coordinates).
    """

    spec: NetworkSpec
    shape: Shape
    padding: tuple[tuple[int, int], ...]
    starts: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def padded_shape(self) -> Shape:
        """Voxels per axis after padding."""
        i, j, k = (n + low + high for n, (low, high) in zip(self.shape, self.padding, strict=True))
        return (i, j, k)

    def batches(self, size: int) -> Iterator[NDArray[np.int32]]:
        """Yield the tile starts, `size` at a time; the last batch may be smaller."""
        for first in range(0, len(self.starts), size):
            yield self.starts[first : first + size]


def plan_tiles(shape: Shape, spec: NetworkSpec, roi: NDArray[np.bool_] | None = None) -> TilePlan:
    """Place the tiles of a scan.

    Per axis, starts are 0, out, 2 out ...; the tile that would pass the end is shifted back to end
    there and is the last. The third axis varies slowest, the first fastest.

    Parameters
    ----------
    shape : tuple of int
        Voxels per axis of the scan.
    spec : NetworkSpec
    roi : ndarray, shape `shape`, bool, optional
        Where results are wanted. A tile whose result holds no voxel of it is left out. (DeepMedic
        leaves a tile out only if its whole input holds none; what it computes beyond is masked
        away, so the masked result is the same.)

    Returns
    -------
    TilePlan
    """
    margin = spec.margin
    padding = tuple((margin, margin + max(0, spec.tile - (n + 2 * margin))) for n in shape)
    axes = [
        axis_starts(n + low + high, spec) for n, (low, high) in zip(shape, padding, strict=True)
    ]
    starts = [(i, j, k) for k in axes[2] for j in axes[1] for i in axes[0]]
    if roi is not None:
        out = spec.out
        starts = [s for s in starts if roi[tuple(slice(a, a + out) for a in s)].any()]
    return TilePlan(spec, shape, padding, np.array(starts, np.int32).reshape(-1, 3))


def axis_starts(size: int, spec: NetworkSpec) -> list[int]:
    """Tile starts along one axis of `size` padded voxels (at least one tile long)."""
    last = size - spec.tile
    return [*range(0, last, spec.out), last]


def pad(volume: NDArray[np.float32], plan: TilePlan) -> NDArray[np.float32]:
    """Reflect-pad a volume of shape ``plan.shape`` to ``plan.padded_shape``, C order."""
    return np.ascontiguousarray(np.pad(volume, plan.padding, "reflect"))


def fill_value(padded: NDArray[np.float32]) -> float:
    """Value of samples that fall outside the padded scan: the mean of its 8 corner voxels."""
    corners = padded[np.ix_(*([0, -1] for _ in range(3)))]
    return float(corners.mean(dtype=np.float64))


def axis_samples(start: int, size: int, factor: int, spec: NetworkSpec) -> NDArray[np.intp]:
    """Padded-scan index seen by each input slot of a pathway, along one axis; -1 means fill.

    Parameters
    ----------
    start : int
        The tile's start in padded coordinates.
    size : int
        Padded voxels along the axis.
    factor : int
        Subsampling factor of the pathway; 1 gives ``start ... start + tile - 1``.
    spec : NetworkSpec

    Returns
    -------
    ndarray, shape (slots,), intp
        Where the window begins before the scan, sampling restarts at index 0 whatever the phase,
        and the slots before it are fill; likewise past the end. This is what DeepMedic does.
    """
    field = spec.receptive_field
    slots = -(-spec.out // factor) + field - 1
    low = start + factor // 2 - ((factor - 1) // 2) * field
    high = low + slots * factor
    first = 0 if low >= 0 else -low // factor
    inside = np.arange(max(low, 0), min(high, size), factor)
    indices = np.full(slots, -1, np.intp)
    indices[first : first + len(inside)] = inside
    return indices


def gather(
    padded: NDArray[np.float32], starts: NDArray[np.int32], spec: NetworkSpec
) -> dict[str, NDArray[np.float32]]:
    """Cut the inputs of every pathway for a batch of tiles.

    Parameters
    ----------
    padded : ndarray, float32
        From `pad`.
    starts : ndarray, shape (batch, 3)
    spec : NetworkSpec

    Returns
    -------
    dict of str to ndarray, shape (batch, 1, n, n, n), float32
        Pathway name to its input, n being ``spec.input_sizes()[name]``.
    """
    fill = fill_value(padded)
    inputs = {}
    for pathway in spec.pathways:
        side = spec.input_size(pathway)
        batch = np.empty((len(starts), 1, side, side, side), np.float32)
        for tile, start in enumerate(starts):
            axes = [
                axis_samples(int(s), n, pathway.factor, spec)
                for s, n in zip(start, padded.shape, strict=True)
            ]
            batch[tile, 0] = _sample(padded, axes, fill)
        inputs[pathway.name] = batch
    return inputs


def _sample(
    padded: NDArray[np.float32], axes: list[NDArray[np.intp]], fill: float
) -> NDArray[np.float32]:
    values: NDArray[np.float32] = padded[np.ix_(*axes)]
    for axis, indices in enumerate(axes):
        outside = indices < 0
        if outside.any():
            np.moveaxis(values, axis, 0)[outside] = fill
    return values


def stitch(
    volume: NDArray[np.generic], start: NDArray[np.int32], result: NDArray[np.generic]
) -> None:
    """Write one tile's result over `volume` (shape of the scan), dropping what is padding.

    Called in plan order, so that a later tile overwrites an earlier one where they overlap.
    """
    where = tuple(slice(int(s), int(s) + n) for s, n in zip(start, result.shape, strict=True))
    target = volume[where]
    target[...] = result[tuple(slice(0, n) for n in target.shape)]
