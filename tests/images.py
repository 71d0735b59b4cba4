"""Small NIfTI images of one geometry, and their files, as nibabel's headers make them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from trtseg.nifti import scan_from_image
from trtseg.scan import Geometry

# Rotated about two axes, by the angles of Pythagorean triples; sides of 0.8, 0.75 and 0.75 mm.
AFFINE = np.array(
    [
        [-0.784158, 0.142574, -0.041584, 50.0],
        [-0.158416, -0.705743, 0.205842, 66.5],
        [0.0, 0.21, 0.72, -43.25],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
SHAPE = (4, 5, 6)
REAL_DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def ramp(shape: tuple[int, ...] = SHAPE, dtype: str = "i2") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def make_header(
    shape: tuple[int, ...], dtype: Any, *, version: int = 1, endian: str = "<", **fields: Any
) -> nibabel.Nifti1Header:
    kind = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    header = kind(endianness=endian)
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(AFFINE, code="scanner")
    header.set_qform(AFFINE, code="scanner")
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"] = header.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    return header


def file_bytes(data: np.ndarray, *, endian: str = "<", **header: Any) -> bytes:
    made = make_header(data.shape, data.dtype, endian=endian, **header)
    voxels = data.astype(data.dtype.newbyteorder(endian)).tobytes(order="F")
    return made.binaryblock.ljust(int(made["vox_offset"]), b"\0") + voxels


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)
    return path


def geometry() -> Geometry:
    header = make_header(SHAPE, "i2")
    return scan_from_image(nibabel.Nifti1Image(ramp(), AFFINE, header)).geometry
