"""What a scan is once it is read: voxels and where they lie in space. No file access here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
