"""Scans read, labels and probabilities written: NIfTI-1 and NIfTI-2 files.

The only module that imports nibabel. What a header says comes from nibabel's header classes; the
voxels are read here, so that the claim of a header is checked before memory is given to it and a
gzip file is read to its end, where its checksum is (nibabel stops at the last voxel).
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtseg.affine import affine_warnings, as_affine, check_affine, corner_distance
from trtseg.errors import InputError
from trtseg.scan import Geometry, Scan, as_array, check_voxel_type, real_voxels
from trtseg.volumefile import open_volume, volume_files, volume_suffix, write_volume

#: The NIfTI header fields that say where voxels lie; all others stay behind with the scan.
GEOMETRY_FIELDS = (
    "pixdim",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
    "xyzt_units",
)

#: Longest description a NIfTI header holds: its `descrip` has 80 bytes, the last one zero.
MAX_DESCRIPTION = 79

#: Distance in mm that a header's qform and sform may put between a corner voxel and itself: well
#: above the rounding of both to float32, well below what shows on a screen.
FORM_TOLERANCE_MM = 0.01

#: Bytes after the last voxel that give no warning: so many fill a file up to a multiple of 16, the
#: unit that the NIfTI-1 standard recommends for `vox_offset`. A wrong size in a header hides a row
#: of voxels at least, which is more in every scan of use.
MAX_PADDING = 15

_CHUNK = 1 << 20
_HEADER_BYTES = 540  # NIfTI-2, the longest of the headers read here
_MAX_CLAIM = 16 << 30
_MAX_AXIS = 32767  # int16, the type of NIfTI-1's dim; longer "axes" there are surface data
_SPATIAL_UNITS = {1: "metre", 3: "micrometre"}  # the three low bits of xyzt_units
_ANALYZE_WARNING = (
    "Analyze 7.5 file: it does not store which side is left; nibabel's affine is taken, and a .mat "
    "file beside it is not read"
)
# nibabel logs what it repairs in a header to stderr; a logger of our own keeps it silent without
# changing nibabel's for the rest of the process.
_SILENT = logging.Logger(__name__, level=logging.CRITICAL + 1)
_FATAL = 40  # nibabel's level of a header it cannot repair


@dataclass(frozen=True)
class _Header:
    """What a file says of its voxels, checked as far as it can be without reading them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    geometry: Geometry
    warnings: tuple[str, ...]

    @property
    def volumes(self) -> int:
        return math.prod(self.shape[3:])

    @property
    def volume_bytes(self) -> int:
        return math.prod(self.shape[:3]) * self.dtype.itemsize

    @property
    def claim(self) -> int:
        return self.volumes * self.volume_bytes


def read_scan(path: Path) -> Scan:
    """Read a 3-D image, or the first volume of a 4-D one.

    Parameters
    ----------
    path : Path
        A .nii or .nii.gz file, or either file of an .hdr/.img pair: NIfTI-1 or NIfTI-2 in either
        byte order, or an Analyze 7.5 pair, for which nibabel's affine is taken with a warning.

    Returns
    -------
    Scan
        `data` has shape (i, j, k), native byte order, and memory of its own: the stored integers
        or floats where the header does not scale them (`scl_slope` 0, not finite, or 1 with
        `scl_inter` 0), else float64. `warnings` has a line for a 4-D file of several volumes; for
        a header whose `bitpix` is not that of its `datatype`; for a header without orientation, or
        whose unit is not the millimetre; for a coded qform and sform that disagree
        (`form_conflict`); for what `trtseg.affine.affine_warnings` finds; and for more than
        `MAX_PADDING` bytes after the last voxel that the header claims.

    Raises
    ------
    InputError
        The file is missing, not readable, not NIfTI, truncated or damaged; or its image is not one
        3-D volume of finite real numbers with an affine that can be inverted.
    DeviceError
        The image is larger than the memory left.
    """
    scan, _ = read_first_volume(path)
    return scan


def read_first_volume(path: Path) -> tuple[Scan, int]:
    """Read as `read_scan` does, and tell how many volumes the file has."""
    header_path, data_path = _header_and_data(path)
    with open_volume(header_path) as stream:
        block = stream.read(_HEADER_BYTES)
    header = _parse(header_path, block, single=header_path == data_path)
    with open_volume(data_path) as stream:
        _check_claim(data_path, header)
        voxels, surplus = _first_volume(data_path, stream, header)
        data = real_voxels(str(data_path), _as_voxels(voxels, header))
    warnings = (*header.warnings, *_surplus_warnings(surplus))
    return Scan(data, header.geometry, warnings), header.volumes


def scan_from_image(image: Any, *, name: str = "image in memory") -> Scan:
    """Take a scan from a nibabel image in memory, as `read_scan` takes it from a file.

    Parameters
    ----------
    image : nibabel.spatialimages.SpatialImage
        An image of any format nibabel reads, with an affine in mm. A NIfTI image keeps its header
        fields where they agree with its affine (nibabel's own rule on saving); for all others the
        geometry is that of `scan_from_array`.
    name : str
        What an error is said to be about.

    Returns
    -------
    Scan
        `data` shares memory with an image that holds an array of native byte order.

    Raises
    ------
    InputError
        As for `read_scan`, and for an object that is no spatial image or has no affine.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.spatialimages import SpatialImage

    if not isinstance(image, SpatialImage) or image.affine is None:
        raise InputError(
            f"{name}: {type(image).__name__}"
            + (" without an affine" if isinstance(image, SpatialImage) else ""),
            expected="a nibabel spatial image with an affine, such as nibabel.load returns",
        )
    with _nibabel_errors(name):
        volumes = _check_shape(name, image.shape)
        data = np.asanyarray(image.dataobj[_first(image.shape)])
        if isinstance(data, np.memmap):
            data = np.array(data)
        header = image.header
        if isinstance(header, Nifti1Header) and np.allclose(image.affine, header.get_best_affine()):
            geometry = _geometry(name, header, header.get_best_affine())
        else:
            geometry = geometry_of_affine(image.affine, name=name)
        warnings = (*_volume_warnings(volumes), *_geometry_warnings(geometry, image.shape[:3]))
    return Scan(real_voxels(name, np.asarray(data)), geometry, warnings)


def scan_from_array(data: ArrayLike, affine: ArrayLike) -> Scan:
    """Make a scan of an array and an affine.

    Parameters
    ----------
    data : array_like, shape (i, j, k) or (i, j, k, n)
        Real numbers of any type; of several volumes the first is taken, with a warning.
    affine : array_like, shape (4, 4)
        Voxel indices to mm.

    Returns
    -------
    Scan
        `data` shares memory with an array of native byte order. The geometry is that of
        `geometry_of_affine`; `warnings` as for `read_scan`.

    Raises
    ------
    InputError
        As for `read_scan`.
    """
    name = "array in memory"
    array = as_array(name, data)
    volumes = _check_shape(name, array.shape)
    with _nibabel_errors(name):
        geometry = geometry_of_affine(affine, name=name)
        warnings = (*_volume_warnings(volumes), *_geometry_warnings(geometry, array.shape[:3]))
    return Scan(real_voxels(name, array[_first(array.shape)]), geometry, warnings)


def geometry_of_affine(affine: ArrayLike, *, name: str = "affine in memory") -> Geometry:
    """NIfTI-1 geometry of an affine alone, as ``Nifti1Image(data, affine)`` has it, in mm.

    Parameters
    ----------
    affine : array_like, shape (4, 4)
        Voxel indices to mm.
    name : str
        What an error is said to be about.

    Returns
    -------
    Geometry
        The affine, rounded to float32, as sform with code 2; qform code 0.

    Raises
    ------
    InputError
        The affine is not 4 x 4 with the last row 0 0 0 1, not finite, or cannot be inverted.
    """
    from nibabel.nifti1 import Nifti1Header

    matrix = as_affine(name, affine)
    header = Nifti1Header()
    header.set_sform(matrix, code="aligned")
    header.set_qform(matrix, code="unknown")
    header.set_xyzt_units("mm")
    return _geometry(name, header, header.get_sform())


def closest_axes(affine: ArrayLike) -> NDArray[np.float64]:
    """The direction in space that each voxel axis is closest to, as nibabel finds it.

    Parameters
    ----------
    affine : array_like, shape (4, 4)
        Voxel indices to mm.

    Returns
    -------
    ndarray of float64, shape (3, 2)
        nibabel's ``io_orientation``. Per voxel axis: 0 for right/left, 1 for anterior/posterior or
        2 for superior/inferior; and 1 where the index grows to the right, anterior or superior,
        else -1. A row of NaN is an axis that has no direction.

    Raises
    ------
    InputError
        As for `geometry_of_affine`.
    """
    from nibabel.orientations import io_orientation

    matrix = as_affine("affine in memory", affine)
    with np.errstate(all="ignore"):
        return np.asarray(io_orientation(matrix), dtype=np.float64)


def has_orientation(geometry: Geometry) -> bool:
    """Whether the header says where the voxels lie: its qform or its sform is coded."""
    header = _repaired_header(geometry)
    return bool(header["qform_code"] != 0 or header["sform_code"] != 0)


def form_conflict(geometry: Geometry, shape: tuple[int, int, int]) -> str:
    """What the header's qform and sform disagree on.

    Parameters
    ----------
    geometry : Geometry
        As `read_scan`, `scan_from_image` or `scan_from_array` makes it.
    shape : tuple of int
        Voxels per axis (i, j, k).

    Returns
    -------
    str
        By how much, where both are coded and put one of the array's eight corner voxels more than
        `FORM_TOLERANCE_MM` apart, or the qform stands for no rotation; else empty.
    """
    distance = _form_distance(_repaired_header(geometry), shape)
    if distance <= FORM_TOLERANCE_MM:
        return ""
    apart = f"up to {distance:.3g} mm apart" if distance < math.inf else "apart beyond measure"
    return f"qform and sform put the same voxel {apart}"


def write_labels(
    path: Path, labels: NDArray[np.uint8], geometry: Geometry, *, description: str = ""
) -> None:
    """Write a label map on a scan's voxels, whole or not at all.

    The header is a fresh one: dimensions and type of the labels, the geometry fields of the scan
    bit for bit, slope 1, intercept 0, the description; nothing else of the scan's header. The same
    labels give the same bytes (a gzip file has neither time nor name in it).

    Parameters
    ----------
    path : Path
        Name ending in .nii or .nii.gz; its folder must exist.
    labels : ndarray of uint8, shape (i, j, k)
    geometry : Geometry
        Geometry of the scan; its `nifti_version` is the version written.
    description : str
        Up to 79 ASCII characters for the header's `descrip`.

    Raises
    ------
    OutputError
        The file cannot be written there, or has another suffix.
    ValueError
        The array has another type or rank, or the description does not fit.
    """
    _write(path, labels, np.dtype(np.uint8), geometry, description)


def write_probabilities(
    path: Path, probabilities: NDArray[np.float32], geometry: Geometry, *, description: str = ""
) -> None:
    """Write a probability map on a scan's voxels.

    Parameters
    ----------
    path, geometry, description
        As for `write_labels`; so are the errors.
    probabilities : ndarray of float32, shape (i, j, k)
    """
    _write(path, probabilities, np.dtype(np.float32), geometry, description)


def _header_and_data(path: Path) -> tuple[Path, Path]:
    if not volume_suffix(path):
        raise InputError(
            f"{path}: a name without a NIfTI suffix",
            expected="a name ending in .nii, .nii.gz, .hdr or .img",
        )
    files = volume_files(path)
    return files[0], files[-1]


@contextlib.contextmanager
def _nibabel_errors(name: str) -> Iterator[None]:
    """Turn what nibabel raises on a bad header or its data into an InputError."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError

    try:
        # Fields that are not finite are met below by a check, not by numpy's warning.
        with np.errstate(all="ignore"):
            yield
    except (
        HeaderDataError,
        HeaderTypeError,
        ImageFileError,
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: an image that nibabel cannot read ({reason})",
            expected="a valid NIfTI image",
            action="export it again",
        ) from error


def _parse(path: Path, block: bytes, *, single: bool) -> _Header:
    from nibabel.nifti1 import Nifti1Header

    name = str(path)
    with _nibabel_errors(name):
        stored = _stored_header(path, block)
        _check_rank(path, stored)
        fixed = stored.copy()
        fixed.check_fix(logger=_SILENT, error_level=_FATAL)
        nifti = isinstance(fixed, Nifti1Header)
        if nifti:
            _check_magic(path, fixed, single=single)
        elif single:
            raise _not_nifti(path)
        volumes = _check_shape(name, fixed.get_data_shape())
        offset = _offset(path, fixed, single=single)
        dtype = fixed.get_data_dtype()
        check_voxel_type(name, dtype)
        slope, inter = fixed.get_slope_inter()
        affine = fixed.get_best_affine()
        if nifti:
            # The stored fields, not the repaired ones: results must carry the bits of the scan.
            geometry = _geometry(name, stored, affine)
        else:
            geometry = geometry_of_affine(affine, name=name)
        notes = () if nifti else (_ANALYZE_WARNING,)
        return _Header(
            shape=fixed.get_data_shape(),
            dtype=dtype,
            offset=offset,
            slope=1.0 if slope is None else float(slope),
            inter=0.0 if inter is None else float(inter),
            geometry=geometry,
            warnings=(
                *_volume_warnings(volumes),
                *notes,
                *_type_warnings(dtype, int(stored["bitpix"])),
                *_geometry_warnings(geometry, fixed.get_data_shape()[:3]),
            ),
        )


def _stored_header(path: Path, block: bytes) -> Any:
    """The header in a file's first bytes, exactly as stored."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header
    from nibabel.spm2analyze import Spm2AnalyzeHeader

    for kind in (Nifti2Header, Nifti1Header, Spm2AnalyzeHeader):
        if kind.may_contain_header(block):
            return kind(block[: kind.template_dtype.itemsize], check=False)
    raise _not_nifti(path, empty=not block)


def _not_nifti(path: Path, *, empty: bool = False) -> InputError:
    found = "an empty file" if empty else "not a NIfTI file"
    return InputError(
        f"{path}: {found}",
        expected="a NIfTI-1 or NIfTI-2 header in its first bytes",
        action="convert the scan to NIfTI, for example with dcm2niix, or copy it again",
    )


def _check_magic(path: Path, header: Any, *, single: bool) -> None:
    if header["magic"].item() != (header.single_magic if single else header.pair_magic):
        kinds = ("a single file", "an .hdr/.img pair")
        found, expected = kinds if not single else kinds[::-1]
        raise InputError(
            f"{path}: a header that says it belongs to {found}",
            expected=f"{expected}, by the file's name",
            action="rename the file",
        )


def _check_rank(path: Path, header: Any) -> None:
    # nibabel tells the byte order by this number, so that a wrong one spoils all the others.
    if not 1 <= header["dim"][0] <= 7:
        raise InputError(
            f"{path}: a header whose number of dimensions is not 1 to 7 in either byte order",
            expected="3 dimensions (i, j, k)",
            action="export the scan again",
        )


def _offset(path: Path, header: Any, *, single: bool) -> int:
    offset = int(header["vox_offset"])
    smallest = header.single_vox_offset if single else 0
    if offset < smallest:
        raise InputError(
            f"{path}: a header that puts the voxels at byte {offset}",
            expected=f"byte {smallest} or later",
            action="export the scan again",
        )
    return offset


def _check_shape(name: str, shape: tuple[int, ...]) -> int:
    """Refuse what is not one 3-D volume or several along one axis; return how many."""
    if len(shape) < 3 or any(size != 1 for size in shape[4:]):
        raise InputError(
            f"{name}: an image of {len(shape)} dimensions {shape}",
            expected="3 dimensions (i, j, k)",
            action="extract one 3-D volume",
        )
    if not all(1 <= size <= _MAX_AXIS for size in shape):
        raise InputError(
            f"{name}: an image with axes of {shape} voxels",
            expected=f"1 to {_MAX_AXIS} voxels per axis",
        )
    return math.prod(shape[3:])


def _first(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Index of an image's first volume."""
    return (slice(None),) * 3 + (0,) * (len(shape) - 3)


def _check_claim(path: Path, header: _Header) -> None:
    """Refuse, before memory is asked for, a header that claims more than can be there."""
    if volume_suffix(path) != ".nii.gz":
        _check_held(path, header, path.stat().st_size)
    if header.claim > _MAX_CLAIM:
        raise InputError(
            f"{path}: a header that claims {header.claim} bytes of voxels {header.shape}",
            expected=f"at most {_MAX_CLAIM} bytes",
            action="check the file, or crop the image",
        )


def _check_held(path: Path, header: _Header, size: int) -> None:
    held = max(0, size - header.offset)
    if held < header.claim:
        raise InputError(
            f"{path}: {held} bytes of voxels in the file",
            expected=f"{header.claim}, which its header claims for {header.shape}",
            action="copy or export the file again",
        )


def _first_volume(path: Path, stream: io.BufferedIOBase, header: _Header) -> tuple[bytearray, int]:
    """The bytes of the first volume, and how many there are after the last one.

    All after the first volume is read to the end of the file, for the checksum, and dropped.
    """
    voxels = bytearray()
    position = 0
    while chunk := stream.read(_CHUNK):
        start = max(0, header.offset - position)
        voxels += memoryview(chunk)[start : start + header.volume_bytes - len(voxels)]
        position += len(chunk)
    _check_held(path, header, position)
    return voxels, position - header.offset - header.claim


def _as_voxels(voxels: bytearray, header: _Header) -> NDArray[Any]:
    stored = np.frombuffer(voxels, dtype=header.dtype).reshape(header.shape[:3], order="F")
    if (header.slope, header.inter) == (1.0, 0.0):
        return stored
    with np.errstate(all="ignore"):
        scaled = stored.astype(np.float64)
        scaled *= header.slope
        scaled += header.inter
    return scaled


def _volume_warnings(volumes: int) -> tuple[str, ...]:
    if volumes == 1:
        return ()
    return (f"4-D file of {volumes} volumes: the first is segmented, as the published system does",)


def _type_warnings(dtype: np.dtype[Any], bits: int) -> tuple[str, ...]:
    """What to say of a header that gives the voxels' size twice, and not the same."""
    if bits == 8 * dtype.itemsize:
        return ()
    return (
        f"header of {dtype.name} voxels that says {bits} bits per voxel (bitpix), expected "
        f"{8 * dtype.itemsize}: read as {dtype.name} (datatype), as nibabel reads it, so the "
        "values may be wrong",
    )


def _surplus_warnings(surplus: int) -> tuple[str, ...]:
    if surplus <= MAX_PADDING:
        return ()
    return (
        f"{surplus} bytes after the voxels that the header claims, expected none: they are not "
        "read, but the header may give too small a size or type, so look whether the scan is whole",
    )


def _geometry_warnings(geometry: Geometry, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """What a person should know of where the voxels lie: each as found, expected, and meant."""
    warnings = []
    if not has_orientation(geometry):
        warnings.append("header without orientation (qform and sform codes are 0)")
    unit = _SPATIAL_UNITS.get(int(geometry.header["xyzt_units"]) & 7)
    if unit:
        warnings.append(f"header with the {unit} as its unit: read as mm, as nibabel reads it")
    conflict = form_conflict(geometry, shape)
    if conflict:
        warnings.append(
            f"{conflict}, expected within {FORM_TOLERANCE_MM:g} mm: the labels carry both, as the "
            "scan does, so they overlay it in every program, but one that goes by the qform shows "
            "both elsewhere; volumes go by the sform"
        )
    return (*warnings, *affine_warnings(geometry.affine))


def _form_distance(header: Any, shape: tuple[int, int, int]) -> float:
    """Distance in mm between the corner voxels of a coded qform and sform; 0 where one is not."""
    from nibabel.spatialimages import HeaderDataError

    if header["qform_code"] == 0 or header["sform_code"] == 0:
        return 0.0
    try:
        with np.errstate(all="ignore"):
            qform = header.get_qform()
    except (HeaderDataError, ValueError):  # what nibabel raises on a quaternion of no rotation
        return math.inf
    distance = corner_distance(qform, header.get_sform(), shape)
    return math.inf if math.isnan(distance) else distance


def _repaired_header(geometry: Geometry) -> Any:
    """A nibabel header of the geometry fields, repaired as nibabel repairs it on loading."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    header = (Nifti2Header if geometry.nifti_version == 2 else Nifti1Header)()
    for field in GEOMETRY_FIELDS:
        header[field] = geometry.header[field]
    header.check_fix(logger=_SILENT, error_level=_FATAL)
    return header


def _geometry(name: str, header: Any, affine: NDArray[np.float64]) -> Geometry:
    """Geometry fields of a nibabel NIfTI header, with the affine it stands for."""
    from nibabel.nifti2 import Nifti2Header

    check_affine(name, affine)
    return Geometry(
        affine=np.array(affine, dtype=np.float64),
        header={field: _native(header[field]) for field in GEOMETRY_FIELDS},
        nifti_version=2 if isinstance(header, Nifti2Header) else 1,
    )


def _native(value: NDArray[Any]) -> Any:
    """A copy of a header field in native byte order; a scalar where the field is one."""
    return np.array(value, dtype=value.dtype.newbyteorder("="))[()]


def _write(
    path: Path,
    data: NDArray[Any],
    dtype: np.dtype[Any],
    geometry: Geometry,
    description: str,
) -> None:
    if data.dtype != dtype or data.ndim != 3:
        raise ValueError(f"{data.dtype} array of shape {data.shape}; expected 3-D {dtype}")
    header = _fresh_header(data, geometry, description)
    voxels = data.astype(dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    write_volume(path, header, voxels)


def _fresh_header(data: NDArray[Any], geometry: Geometry, description: str) -> bytes:
    """Header bytes up to the voxels: a new little-endian header with the scan's geometry."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    text = description.encode("ascii")
    if len(text) > MAX_DESCRIPTION:
        raise ValueError(f"description of {len(text)} bytes; at most {MAX_DESCRIPTION} fit")
    header = (Nifti2Header if geometry.nifti_version == 2 else Nifti1Header)(endianness="<")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    for field in GEOMETRY_FIELDS:
        if field != "pixdim":
            header[field] = geometry.header[field]
    # qfac and the three voxel sizes; a fourth size would be the time step of another image.
    header["pixdim"][:4] = geometry.header["pixdim"][:4]
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"] = 1
    header["scl_inter"] = 0
    header["descrip"] = text
    no_extensions = bytes(4)
    return bytes(header.binaryblock) + no_extensions
