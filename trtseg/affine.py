"""Affines, voxel indices to mm: which are refused, and what a person is warned of."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from trtseg.errors import InputError
from trtseg.scan import as_array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

#: Degrees by which two voxel axes may miss the right angle: about 0.2 mm over a fetal head, and
#: more than an affine written with four decimals is off.
SHEAR_TOLERANCE_DEGREES = 0.1

#: Voxel sizes in mm that give no warning: about 1.5 times either way from the 0.8 mm of the
#: phantoms the demo networks were trained on. The repository of the published networks does not
#: state the voxel size they were trained at.
VOXEL_SIZES_MM = (0.5, 1.2)

#: Longest side of a voxel over its shortest that passes. The networks were developed on
#: reconstructions with equal sides; stacks of thick slices have ratios of 3 and more.
MAX_ANISOTROPY = 1.5

#: What a side may be off by: float32 holds 1.2 as 1.2000000477.
_ROUNDING_MM = 1e-3


def as_affine(name: str, affine: ArrayLike) -> NDArray[np.float64]:
    """Take an affine that a caller gives.

    Parameters
    ----------
    name : str
        What an error is said to be about.
    affine : array_like, shape (4, 4)

    Returns
    -------
    ndarray of float64, shape (4, 4)

    Raises
    ------
    InputError
        The affine is not 4 x 4 with the last row 0 0 0 1, not finite, or cannot be inverted.
    """
    matrix = as_array(name, affine)
    if matrix.shape != (4, 4) or matrix.dtype.kind not in "iuf":
        raise InputError(
            f"{name}: an affine of shape {matrix.shape} and type {matrix.dtype}",
            expected="4 x 4 real numbers",
        )
    if not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise InputError(
            f"{name}: an affine with the last row {matrix[3].tolist()}", expected="0 0 0 1"
        )
    matrix = matrix.astype(np.float64)
    check_affine(name, matrix)
    return matrix


def check_affine(name: str, affine: NDArray[np.float64]) -> None:
    """Refuse an affine of shape (4, 4), called `name`, that is not finite or has no inverse.

    Raises
    ------
    InputError
        It is one of these.
    """
    with np.errstate(all="ignore"):
        finite = bool(np.isfinite(affine).all())
        invertible = (
            finite
            and 0.0 < abs(np.linalg.det(affine[:3, :3])) < math.inf
            and np.linalg.matrix_rank(affine[:3, :3]) == 3
        )
    if not invertible:
        kind = "a singular affine" if finite else "an affine with values that are not finite"
        raise InputError(
            f"{name}: {kind}",
            expected="an affine that maps voxels to mm and can be inverted",
            action="repair the header's qform or sform, or export the scan again",
        )


def corner_distance(
    one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    """Largest distance in mm that two affines put between a corner voxel's centre and itself.

    Parameters
    ----------
    one, other : ndarray, shape (4, 4)
    shape : tuple of int
        Voxels per axis (i, j, k) of the array whose eight corners are meant.
    """
    corners = np.array([(*c, 1) for c in itertools.product(*((0, size - 1) for size in shape))])
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def affine_warnings(affine: NDArray[np.float64]) -> tuple[str, ...]:
    """What a person should know of an affine, shape (4, 4): each as found, expected, and meant.

    Returns
    -------
    tuple of str
        A line for voxel axes that are not at right angles (`SHEAR_TOLERANCE_DEGREES`), and one for
        voxels far from those the networks are known to work on (`VOXEL_SIZES_MM`,
        `MAX_ANISOTROPY`).
    """
    return (*_shear_warnings(affine), *_voxel_warnings(affine))


def sides_alike(sizes: ArrayLike) -> bool:
    """Whether no voxel side in mm is over `MAX_ANISOTROPY` times another, but for rounding."""
    low, high = np.min(sizes) + _ROUNDING_MM, np.max(sizes) - _ROUNDING_MM
    return bool(high <= MAX_ANISOTROPY * low)


def _shear_warnings(affine: NDArray[np.float64]) -> tuple[str, ...]:
    with np.errstate(all="ignore"):
        sides = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        cosines = np.abs(np.triu(sides.T @ sides, 1))
        angle = float(np.degrees(np.arccos(min(1.0, cosines.max()))))
    if not angle < 90 - SHEAR_TOLERANCE_DEGREES:
        return ()
    return (
        f"sheared affine, with voxel axes at {angle:.2f} degrees, expected 90 within "
        f"{SHEAR_TOLERANCE_DEGREES:g}: the networks take voxels for upright boxes and see a skewed "
        "head, so the labels may be wrong; they overlay the scan, and volumes are those of its "
        "voxels",
    )


def _voxel_warnings(affine: NDArray[np.float64]) -> tuple[str, ...]:
    with np.errstate(all="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        low, high = sizes.min() + _ROUNDING_MM, sizes.max() - _ROUNDING_MM
    smallest, largest = VOXEL_SIZES_MM
    if low >= smallest and high <= largest and sides_alike(sizes):
        return ()
    return (
        f"voxels of {' x '.join(f'{size:.3g}' for size in sizes)} mm, expected sides of "
        f"{smallest:g} to {largest:g} mm and none over {MAX_ANISOTROPY:g} times another (the demo "
        "networks were trained at 0.8 mm; the published ones come without a stated size): the "
        "networks see voxels, not mm, so the labels may be wrong; consider resampling the scan",
    )
