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

    from trtseg.architecture import NetworkSpec, PathwaySpec

    Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Block:
    """Tiles whose normal pathway is computed in one go.

    Attributes
    ----------
    tiles : ndarray, shape (tiles,), intp
        Indices into the plan.
    region : ndarray, shape (3, 2), int64
        Voxels whose normal-pathway features the tiles' boxes need, in scan coordinates, end
        exclusive. Voxel x depends on the padded voxels x ... x + receptive field - 1.
    """

    tiles: NDArray[np.intp]
    region: NDArray[np.int64]


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
    boxes : ndarray, shape (tiles, 3, 2), int32
        What each tile decides, in scan coordinates, end exclusive: the part of its result that no
        later tile overwrites, cut to the smallest box around the voxels that are wanted. Boxes are
        disjoint and hold every wanted voxel once.
    """

    spec: NetworkSpec
    shape: Shape
    padding: tuple[tuple[int, int], ...]
    starts: NDArray[np.int32]
    boxes: NDArray[np.int32]

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
        Where results are wanted. A tile that decides no voxel of it is left out. (DeepMedic leaves
        a tile out only if its whole input holds none; what it computes beyond is overwritten or
        masked away, so the masked result is the same.)

    Returns
    -------
    TilePlan
    """
    margin = spec.margin
    padding = tuple((margin, margin + max(0, spec.tile - (n + 2 * margin))) for n in shape)
    axes = [
        axis_starts(n + low + high, spec) for n, (low, high) in zip(shape, padding, strict=True)
    ]
    decided = [
        dict(zip(starts, axis_decided(starts, n), strict=True))
        for starts, n in zip(axes, shape, strict=True)
    ]
    tiles, boxes = [], []
    for start in ((i, j, k) for k in axes[2] for j in axes[1] for i in axes[0]):
        box = [decided[axis][first] for axis, first in enumerate(start)]
        wanted = box if roi is None else _wanted(roi, box)
        if wanted is not None:
            tiles.append(start)
            boxes.append(wanted)
    return TilePlan(
        spec,
        shape,
        padding,
        np.array(tiles, np.int32).reshape(-1, 3),
        np.array(boxes, np.int32).reshape(-1, 3, 2),
    )


def _wanted(roi: NDArray[np.bool_], box: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Smallest box around the `roi` voxels within `box`; None where there are none."""
    inside = roi[tuple(slice(low, high) for low, high in box)]
    wanted = []
    for axis, (low, _) in enumerate(box):
        others = tuple(other for other in range(3) if other != axis)
        hits = np.flatnonzero(inside.any(axis=others))
        if not len(hits):
            return None
        wanted.append((low + int(hits[0]), low + int(hits[-1]) + 1))
    return wanted


def group_tiles(plan: TilePlan, tiles: NDArray[np.intp], *, max_voxels: int) -> Iterator[Block]:
    """Split tiles into blocks of neighbours, halving the longest axis while a block is too large.

    Larger blocks compute fewer voxels twice, where blocks meet, and hold more memory.

    Parameters
    ----------
    plan : TilePlan
    tiles : ndarray, shape (n,), intp
        Indices into the plan.
    max_voxels : int
        Most voxels of a region; a single tile may exceed it.

    Yields
    ------
    Block
        Every tile is in one block.
    """
    if not len(tiles):
        return
    half = plan.spec.fc_kernel // 2
    starts, boxes = plan.starts[tiles].astype(np.int64), plan.boxes[tiles].astype(np.int64)
    low = np.maximum(boxes[:, :, 0] - half, starts).min(axis=0)
    high = np.minimum(boxes[:, :, 1] + half, starts + plan.spec.out).max(axis=0)
    places = [np.unique(starts[:, axis]) for axis in range(3)]
    divisible = [axis for axis in range(3) if len(places[axis]) > 1]
    if not divisible or np.prod(high - low) <= max_voxels:
        yield Block(tiles, np.stack([low, high], axis=1))
        return
    axis = max(divisible, key=lambda one: int(high[one] - low[one]))
    middle = places[axis][len(places[axis]) // 2]
    first = starts[:, axis] < middle
    yield from group_tiles(plan, tiles[first], max_voxels=max_voxels)
    yield from group_tiles(plan, tiles[~first], max_voxels=max_voxels)


def axis_starts(size: int, spec: NetworkSpec) -> list[int]:
    """Tile starts along one axis of `size` padded voxels (at least one tile long)."""
    last = size - spec.tile
    return [*range(0, last, spec.out), last]


def axis_decided(starts: list[int], size: int) -> list[tuple[int, int]]:
    """Voxels along one axis that each tile has the last word on: (first, end), end exclusive.

    Parameters
    ----------
    starts : list of int
        From `axis_starts`, ascending; a later tile overwrites an earlier one.
    size : int
        Voxels of the scan along the axis.
    """
    return list(zip(starts, [*starts[1:], size], strict=True))


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
    padded: NDArray[np.float32],
    starts: NDArray[np.int32],
    spec: NetworkSpec,
    *,
    pathways: tuple[PathwaySpec, ...] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Cut the inputs of the pathways (all of them by default) for a batch of tiles.

    Parameters
    ----------
    padded : ndarray, float32
        From `pad`.
    starts : ndarray, shape (batch, 3)
    spec : NetworkSpec
    pathways : tuple of PathwaySpec, optional

    Returns
    -------
    dict of str to ndarray, shape (batch, 1, n, n, n), float32
        Pathway name to its input, n being ``spec.input_sizes()[name]``.
    """
    fill = fill_value(padded)
    inputs = {}
    for pathway in spec.pathways if pathways is None else pathways:
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
