"""Scans turned to one canonical orientation, and results turned back.

The networks take the array as it is stored, whatever its axes mean, and give other labels for the
same head stored with other axes or directions. Turned to one orientation first, all 48 ways to
store a scan give the same labels. That orientation is RAS+: indices that grow to the right, to the
front and to the top. It is nibabel's "closest canonical" and a common convention; the repository of
the published networks does not say how their training scans were stored, so that RAS+ promises
labels that do not depend on how a scan is stored, not better ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg import nifti
from trtseg.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from trtseg.scan import Scan

#: Degrees a scan is tilted, about each axis either way, to see whether its orientation is clear:
#: far above the rounding of an affine to float32, which could else tip two copies of a scan stored
#: in different ways to different sides, and far below what an oblique scan is turned by.
TILT_DEGREES = 0.1

#: Letters of the directions towards which an index falls and grows: right/left axis first.
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True)
class Orientation:
    """How the axes of a stored array lie in the body.

    Attributes
    ----------
    axes : tuple of int
        For each canonical axis (right, anterior, superior) the stored axis closest to it.
    flips : tuple of bool
        For each canonical axis, whether that stored axis runs the other way.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @property
    def code(self) -> str:
        """Where each stored index grows to, such as ``"LPS"``: left, posterior, superior."""
        letters = [""] * 3
        for (low, high), axis, flip in zip(_LETTERS, self.axes, self.flips, strict=True):
            letters[axis] = low if flip else high
        return "".join(letters)

    @property
    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)


def orientation_of(affine: ArrayLike) -> Orientation:
    """Find the orientation of a stored array, as nibabel finds it.

    Parameters
    ----------
    affine : array_like, shape (4, 4)
        Voxel indices to mm (right, anterior, superior).

    Returns
    -------
    Orientation

    Raises
    ------
    InputError
        The affine cannot be inverted; or it lies within `TILT_DEGREES` of half way between two
        orientations, so that the choice would hang on rounding.
    """
    directions = nifti.closest_axes(affine)
    matrix = np.asarray(affine, dtype=np.float64)
    # NaN, nibabel's sign of an axis without a direction, equals nothing and ends here as well.
    if not all(np.array_equal(directions, nifti.closest_axes(tilt @ matrix)) for tilt in _tilts()):
        raise InputError(
            "a scan half way between two orientations: its axes are as close to one direction of "
            "the body as to another",
            expected=f"one closest orientation, clear by {TILT_DEGREES:g} degrees",
            action="segment it without --reorient, or resample it to straight axes",
        )
    first, second, third = np.argsort(directions[:, 0]).tolist()
    right, anterior, superior = (directions[[first, second, third], 1] < 0).tolist()
    return Orientation((first, second, third), (right, anterior, superior))


def check_unambiguous(scan: Scan) -> None:
    """Refuse a scan whose header does not say one orientation.

    Parameters
    ----------
    scan : Scan
        As `trtseg.nifti` reads it.

    Raises
    ------
    InputError
        Neither qform nor sform is coded; or both are, and put a corner voxel more than
        `trtseg.nifti.FORM_TOLERANCE_MM` apart.
    """
    if not nifti.has_orientation(scan.geometry):
        raise InputError(
            "a header without orientation (qform and sform codes are 0)",
            expected="a coded qform or sform, from which the orientation is known",
            action="segment it without --reorient, or repair its header",
        )
    conflict = nifti.form_conflict(scan.geometry, scan.shape)
    if conflict:
        raise InputError(
            f"a header whose {conflict}",
            expected=f"agreement within {nifti.FORM_TOLERANCE_MM:g} mm, so one orientation",
            action="segment it without --reorient, or set the code of the wrong one to 0",
        )


def to_canonical(scan: Scan) -> tuple[Scan, Orientation]:
    """Turn a scan to the canonical orientation: axes permuted and flipped, nothing resampled.

    Parameters
    ----------
    scan : Scan

    Returns
    -------
    canonical : Scan
        Every voxel value at the same place in the body. `data` is contiguous with the first index
        fastest, as a NIfTI file holds it: one fixed order, so that the sums of `z_score` round
        alike for all ways to store a scan, and a file that is canonical already gives what it
        gives untouched. `geometry` is that of `trtseg.nifti.geometry_of_affine`, with the affine
        in double precision. `warnings` are the scan's.
    orientation : Orientation
        Of the stored array, for `restore`.

    Raises
    ------
    InputError
        As for `orientation_of`.
    """
    orientation = orientation_of(scan.geometry.affine)
    affine = scan.geometry.affine @ _index_affine(orientation, scan.shape)
    geometry = replace(nifti.geometry_of_affine(affine), affine=affine)
    data = np.asfortranarray(reorient(scan.data, orientation))
    return replace(scan, data=data, geometry=geometry), orientation


def reorient(array: NDArray[Any], orientation: Orientation) -> NDArray[Any]:
    """Turn an array on the stored grid, such as a mask, to the canonical orientation.

    Parameters
    ----------
    array : ndarray, shape (i, j, k) of the stored scan
    orientation : Orientation
        Of the stored scan.

    Returns
    -------
    ndarray
        A view of the same voxels.
    """
    canonical: NDArray[Any] = array.transpose(orientation.axes)[orientation._slices]
    return canonical


def restore(array: NDArray[Any], orientation: Orientation) -> NDArray[Any]:
    """Turn a canonical array back to the stored grid: the exact inverse of `reorient`.

    Parameters
    ----------
    array : ndarray, shape of the canonical scan
    orientation : Orientation
        Of the stored scan.

    Returns
    -------
    ndarray, shape (i, j, k) of the stored scan
        The same values and dtype, in C order.
    """
    stored: NDArray[Any] = array[orientation._slices].transpose(np.argsort(orientation.axes))
    return np.ascontiguousarray(stored)


def _index_affine(orientation: Orientation, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Canonical voxel indices to stored ones, shape (4, 4)."""
    matrix = np.diag([0.0, 0.0, 0.0, 1.0])
    for canonical, (axis, flip) in enumerate(zip(orientation.axes, orientation.flips, strict=True)):
        matrix[axis, canonical] = -1 if flip else 1
        matrix[axis, 3] = shape[axis] - 1 if flip else 0
    return matrix


def _tilts() -> list[NDArray[np.float64]]:
    """Rotations by the tilt about each axis in space, either way, shape (4, 4) each."""
    tilts = []
    for angle in (math.radians(TILT_DEGREES), -math.radians(TILT_DEGREES)):
        for one, other in ((1, 2), (2, 0), (0, 1)):
            matrix = np.eye(4)
            matrix[one, one] = matrix[other, other] = math.cos(angle)
            matrix[one, other], matrix[other, one] = -math.sin(angle), math.sin(angle)
            tilts.append(matrix)
    return tilts
