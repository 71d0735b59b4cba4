"""Brain masks that a person gives, which must lie on the scan's own voxels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.affine import corner_distance
from trtseg.errors import InputError
from trtseg.nifti import read_first_volume, scan_from_image
from trtseg.scan import as_array, real_voxels

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from trtseg.scan import Geometry, Scan

#: Distance in mm that a mask's corner voxels may lie off the scan's: well above the rounding of an
#: affine to float32, well below a voxel.
MASK_TOLERANCE_MM = 0.1

#: Value above which a mask's voxel is brain; halfway, since scaled masks hold 0.99999997 for 1.
MASK_THRESHOLD = 0.5


def read_mask(path: Path, like: Geometry, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Read a brain mask that lies on a scan's own voxels.

    Parameters
    ----------
    path : Path
        Any file `trtseg.nifti.read_scan` takes; integers or scaled floats.
    like : Geometry
        Geometry of the scan.
    shape : tuple of int
        Shape (i, j, k) of the scan.

    Returns
    -------
    ndarray of bool, shape (i, j, k)
        True where the value is above 0.5.

    Raises
    ------
    InputError
        As for `read_scan`; and the mask has several volumes, another shape, or an affine that puts
        one of the array's eight corner voxels more than 0.1 mm off the scan's.
    DeviceError
        The image is larger than the memory left.
    """
    scan, volumes = read_first_volume(path)
    return _on_grid(str(path), scan, volumes, like, shape)


def mask_from_image(image: Any, like: Geometry, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """A brain mask in a nibabel image, which must lie where `read_mask` wants a file's to.

    Parameters
    ----------
    image : nibabel image
    like : Geometry
        Geometry of the scan.
    shape : tuple of int
        Shape (i, j, k) of the scan.

    Returns
    -------
    ndarray of bool, shape (i, j, k)
        True where the value is above 0.5.

    Raises
    ------
    InputError
        As for `trtseg.nifti.scan_from_image` and `read_mask`.
    """
    scan = scan_from_image(image, name="mask")
    return _on_grid("mask", scan, math.prod(image.shape[3:]), like, shape)


def mask_from_array(array: ArrayLike, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Make a brain mask of an array on a scan's own voxels.

    Parameters
    ----------
    array : array_like, shape (i, j, k)
        Booleans or real numbers.
    shape : tuple of int
        Shape (i, j, k) of the scan.

    Returns
    -------
    ndarray of bool, shape (i, j, k)
        True where the value is above 0.5.

    Raises
    ------
    InputError
        Another shape, values that are not real numbers, or not finite.
    """
    name = "mask array"
    return _above_half(name, real_voxels(name, as_array(name, array)), shape)


def _on_grid(
    name: str, scan: Scan, volumes: int, like: Geometry, shape: tuple[int, int, int]
) -> NDArray[np.bool_]:
    if volumes > 1:
        raise InputError(f"{name}: 4-D with {volumes} volumes", expected="one 3-D mask")
    mask = _above_half(name, scan.data, shape)
    distance = corner_distance(scan.geometry.affine, like.affine, shape)
    if not distance <= MASK_TOLERANCE_MM:
        raise InputError(
            f"{name}: a mask whose corner voxels lie up to {distance:.3g} mm off the scan's",
            expected=f"the scan's own voxel grid, within {MASK_TOLERANCE_MM} mm",
            action="resample the mask onto the scan",
        )
    return mask


def _above_half(name: str, data: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    if data.shape != tuple(shape):
        raise InputError(
            f"{name}: a mask of shape {data.shape}",
            expected=f"the scan's shape {tuple(shape)}",
            action="resample the mask onto the scan",
        )
    return np.asarray(data > MASK_THRESHOLD)
