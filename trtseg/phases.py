"""How the first FC layer sees a subsampled pathway: small convolutions on its own, coarse grid.

The published network repeats a subsampled map f times per axis (nearest neighbour) and convolves
the repeated map. Along an axis, output voxel x lies in cell x // f, and its taps x - h ... x + h
fall into few cells: which ones depends on the *phase* x % f only. Phases whose taps fall into the
same cells share one *variant*: a convolution on the coarse grid whose taps are sums of the original
ones. For kernel 3, factor 3 has the variants (left, own, own), (own, own, own), (own, own, right),
and so has factor 5, whose phases 1, 2 and 3 are one variant.

All variants of the three axes are computed for every cell, and each output voxel picks its own from
them by an index. The result is the published one up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def axis_variants(factor: int, kernel: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Variants along one axis.

    Parameters
    ----------
    factor : int
        Subsampling factor f.
    kernel : int
        Side of the FC layer's kernel, odd.

    Returns
    -------
    variants : tuple of tuple of int
        Per variant, the cell that each of the kernel's taps falls into, relative to its own.
    of_phase : tuple of int, length `factor`
        Variant of each phase.
    """
    half = kernel // 2
    cells = [
        tuple((phase + tap) // factor for tap in range(-half, half + 1)) for phase in range(factor)
    ]
    variants = tuple(sorted(set(cells)))
    return variants, tuple(variants.index(one) for one in cells)


def reach(factor: int, kernel: int) -> int:
    """Cells beyond a voxel's own that its taps can fall into, on either side."""
    return -(-(kernel // 2) // factor)


def collapse(weight: NDArray[np.float32], cells: tuple[int, ...], axis: int) -> NDArray[np.float32]:
    """Sum the taps of `weight` that fall into one cell, along `axis`; in float64, then float32."""
    first, last = min(cells), max(cells)
    taps = np.moveaxis(weight.astype(np.float64), axis, -1)
    summed = np.zeros((*taps.shape[:-1], last - first + 1))
    for tap, cell in enumerate(cells):
        summed[..., cell - first] += taps[..., tap]
    return np.ascontiguousarray(np.moveaxis(summed, -1, axis), np.float32)


def cell_range(low: int, high: int, factor: int) -> tuple[int, int]:
    """Cells that voxels ``low ... high - 1`` of a tile lie in: (first, end), end exclusive."""
    return low // factor, (high - 1) // factor + 1


def box_indices(
    box: NDArray[np.int_], factor: int, kernel: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows that the voxels of a box pick, in C order of the box.

    Parameters
    ----------
    box : ndarray, shape (3, 2)
        First and end voxel per axis, in tile coordinates.
    factor, kernel : int

    Returns
    -------
    variant_rows : ndarray, shape (voxels,), int32
        Row in the variants' results: all cells of variant (0, 0, 0), then of (0, 0, 1), and so on.
    cell_rows : ndarray, shape (voxels,), int32
        Row in the box's cells with `reach` cells of edge around them.
    """
    variants, of_phase = axis_variants(factor, kernel)
    edge = reach(factor, kernel)
    row = variant = edged = np.zeros((1, 1, 1), np.int64)
    cells = 1
    for axis, (low, high) in enumerate(box.tolist()):
        first, end = cell_range(low, high, factor)
        voxels = np.arange(low, high)
        along = [1, 1, 1]
        along[axis] = -1
        cell = (voxels // factor - first).reshape(along)
        row = row * (end - first) + cell
        edged = edged * (end - first + 2 * edge) + cell + edge
        variant = variant * len(variants) + np.take(of_phase, voxels % factor).reshape(along)
        cells *= end - first
    return (variant * cells + row).ravel().astype(np.int32), edged.ravel().astype(np.int32)
