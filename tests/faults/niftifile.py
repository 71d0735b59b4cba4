"""NIfTI files put together byte by byte from the standard, without the code under test."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Type to its code in the NIfTI standard and its bits per voxel.
TYPES = {
    "bit": (1, 1),
    "u1": (2, 8),
    "i2": (4, 16),
    "i4": (8, 32),
    "f4": (16, 32),
    "c8": (32, 64),
    "f8": (64, 64),
    "rgb": (128, 24),
    "i1": (256, 8),
    "u2": (512, 16),
    "u4": (768, 32),
    "i8": (1024, 64),
    "u8": (1280, 64),
    "f16": (1536, 128),
    "c16": (1792, 128),
    "c32": (2048, 256),
    "rgba": (2304, 32),
}

#: Voxels of 0.8 mm, the first axis to the left.
ROWS = ((-0.8, 0.0, 0.0, 40.0), (0.0, 0.8, 0.0, -30.0), (0.0, 0.0, 0.8, -20.0))

#: NIfTI-1 field to its place and struct format (Analyze 7.5 has the same places for the first six).
FIELDS_1 = {
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "cal_max": (124, "f"),
    "descrip": (148, "80s"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern": (256, "3f"),
    "qoffset": (268, "3f"),
    "srow": (280, "12f"),
    "magic": (344, "4s"),
}
#: NIfTI-2 field to its place and struct format.
FIELDS_2 = {
    "sizeof_hdr": (0, "i"),
    "magic": (4, "8s"),
    "datatype": (12, "h"),
    "bitpix": (14, "h"),
    "dim": (16, "8q"),
    "pixdim": (104, "8d"),
    "vox_offset": (168, "q"),
    "scl_slope": (176, "d"),
    "scl_inter": (184, "d"),
    "cal_max": (192, "d"),
    "descrip": (240, "80s"),
    "qform_code": (344, "i"),
    "sform_code": (348, "i"),
    "quatern": (352, "3d"),
    "qoffset": (376, "3d"),
    "srow": (400, "12d"),
    "xyzt_units": (500, "i"),
}


def header(
    version: int,
    endian: str,
    kind: str,
    shape: Sequence[int],
    *,
    pair: bool = False,
    **fields: Any,
) -> bytes:
    """A header of 348 or 540 bytes; `fields` overrides by name, tuples for those of several."""
    code, bits = TYPES[kind]
    size = 348 if version == 1 else 540
    letters = "i1" if pair else "+1"
    magic = (
        b"n" + letters.encode() + b"\0"
        if version == 1
        else b"n" + letters[0].encode() + b"2\0\r\n\x1a\n"
    )
    values: dict[str, Any] = {
        "sizeof_hdr": size,
        "dim": (len(shape), *shape, *(1,) * (7 - len(shape))),
        "datatype": code,
        "bitpix": bits,
        "pixdim": (-1.0, 0.8, 0.8, 0.8, 1.0, 1.0, 1.0, 1.0),
        "vox_offset": 0 if pair else size + 4,
        "scl_slope": 1.0,
        "scl_inter": 0.0,
        "xyzt_units": 2,
        "qform_code": 1,
        "sform_code": 1,
        "quatern": (0.0, 1.0, 0.0),
        "qoffset": (40.0, -30.0, -20.0),
        "srow": tuple(number for row in ROWS for number in row),
        "magic": magic,
        **fields,
    }
    block = bytearray(size)
    places = FIELDS_1 if version == 1 else FIELDS_2
    for name, value in values.items():
        place, form = places[name]
        several = value if isinstance(value, tuple) else (value,)
        struct.pack_into(endian + form, block, place, *several)
    return bytes(block)


def analyze_header(endian: str, kind: str, shape: Sequence[int], **fields: Any) -> bytes:
    """An Analyze 7.5 header: no magic, no orientation."""
    plain = header(1, endian, kind, shape, pair=True, **fields)
    return plain[:120] + bytes(20) + plain[140:252] + bytes(96)


def voxels(values: np.ndarray, kind: str, endian: str) -> bytes:
    """Values as stored, first axis fastest; of colours and bits only the number of bytes counts."""
    if kind == "bit":
        return bytes(-(-values.size // 8))
    if kind in ("rgb", "rgba"):
        return bytes(values.size * len(kind))
    if kind in ("f16", "c32"):  # no machine here has the type; zeros are zeros in all of them
        return bytes(values.size * int(kind[1:]))
    return values.astype(np.dtype(kind).newbyteorder(endian)).tobytes(order="F")


def save(folder: Path, container: str, block: bytes, data: bytes) -> Path:
    """Write header and voxels as "nii", "gz", "hdr" or "img"; give the file to read.

    A container in capitals has its suffix in capitals.
    """
    kind = container.lower()
    upper = str.upper if container.isupper() else str
    if kind in ("hdr", "img"):
        (folder / upper("scan.hdr")).write_bytes(block)
        (folder / upper("scan.img")).write_bytes(data)
        return folder / upper(f"scan.{kind}")
    content = block + bytes(4) + data
    path = folder / upper("scan.nii" if kind == "nii" else "scan.nii.gz")
    path.write_bytes(gzip.compress(content, mtime=0) if kind == "gz" else content)
    return path
