"""What a scan is: voxels, of which some are refused, and where they lie. No file access here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtseg.errors import InputError

#: Millilitres per cubic millimetre.
ML_PER_MM3 = 1e-3


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an image lie, as its NIfTI header says it.

    Attributes
    ----------
    affine : ndarray, shape (4, 4), float64
        Voxel indices to millimetres (the header's own choice of sform, then qform, then zooms).
    header : dict of str to ndarray or scalar
        The NIfTI header fields that carry geometry and nothing else, bit for bit as read
        (`pixdim`, `qform_code`, `sform_code`, `quatern_*`, `qoffset_*`, `srow_*`, `xyzt_units`).
        Written back unchanged, so that results overlay the scan exactly.
    nifti_version : int
        1 or 2: NIfTI-2 holds these fields in double precision, and narrowing would change them.
    """

    affine: NDArray[np.float64]
    header: dict[str, Any]
    nifti_version: int = 1

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in mL: |det| of the affine's 3 x 3 part (mm^3) / 1000."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) * ML_PER_MM3


@dataclass(frozen=True)
class Scan:
    """One 3-D image.

    Attributes
    ----------
    data : ndarray, shape (i, j, k)
        Voxel values: the stored integers where the header does not scale them, floats otherwise;
        float32 z-scores once normalised.
    geometry : Geometry
    warnings : tuple of str
        What the reader accepted but a person should know.
    """

    data: NDArray[Any]
    geometry: Geometry
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            raise InputError(
                f"an array of {self.data.ndim} dimensions {self.data.shape}",
                expected="3 dimensions (i, j, k)",
            )
        if 0 in self.data.shape:
            raise InputError(
                f"an array with an empty axis {self.data.shape}",
                expected="at least one voxel per axis",
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels per axis (i, j, k)."""
        i, j, k = self.data.shape
        return (i, j, k)


def as_array(name: str, data: ArrayLike) -> NDArray[Any]:
    """What numpy makes of `data`, called `name`.

    Raises
    ------
    InputError
        numpy makes no array of it.
    """
    try:
        return np.asarray(data)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{name}: {type(data).__name__} that is no array ({error})",
            expected="an array of real numbers",
        ) from error


def check_voxel_type(name: str, dtype: np.dtype[Any]) -> None:
    """Refuse voxels, of an image called `name`, that are not one real number each.

    Raises
    ------
    InputError
        They are colours, complex, or no numbers.
    """
    if dtype.kind not in "biuf":
        kind = "colour" if dtype.names else "complex" if dtype.kind == "c" else "non-numeric"
        channels = "".join(dtype.names or ())
        raise InputError(
            f"{name}: {kind} voxels ({channels or dtype.name})",
            expected="one real number per voxel",
            action="convert the image to grey-scale magnitudes",
        )


def real_voxels(name: str, data: NDArray[Any]) -> NDArray[Any]:
    """Finite real numbers in native byte order, of a type all of numpy and scipy take.

    Parameters
    ----------
    name : str
        What an error is said to be about.
    data : ndarray

    Returns
    -------
    ndarray
        The same array where it is that already; booleans as uint8, floats beyond float64 as that.

    Raises
    ------
    InputError
        As for `check_voxel_type`; or a voxel is NaN or infinite.
    """
    check_voxel_type(name, data.dtype)
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    if data.dtype.kind == "f":
        if data.dtype.itemsize > 8:
            with np.errstate(over="ignore"):
                data = data.astype(np.float64)
        missing = data.size - np.count_nonzero(np.isfinite(data))
        if missing:
            raise InputError(
                f"{name}: {missing} voxels that are not finite numbers (NaN or infinite)",
                expected="finite values everywhere",
                action="replace them, for example by 0 outside the reconstruction",
            )
    return data.astype(data.dtype.newbyteorder("="), copy=False)
