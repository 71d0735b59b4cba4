"""The files of a volume, .nii, .nii.gz or .hdr/.img: their names and bytes, whatever is in them."""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING, Any

from isal import igzip, isal_zlib

from trtseg.errors import DeviceError, InputError, OutputError
from trtseg.files import atomic_write

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator
    from pathlib import Path

_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img")
_PAIR = {".hdr": ".img", ".img": ".hdr"}

#: What reading a damaged or cut gzip file raises; to isal's type stubs its error is none.
_GZIP_ERRORS: tuple[type[Exception], ...] = (
    igzip.BadGzipFile,
    EOFError,
    isal_zlib.error,  # type: ignore[assignment]
)

# Measured on a 200 x 200 x 180 label map, ISA-L takes 1 ms and 120 kB at this level, 8 ms and more
# bytes at its highest; zlib takes 7 ms and 150 kB at its lowest, 18 ms and 60 kB at its default.
_GZIP_LEVEL = 1


def volume_suffix(path: Path) -> str:
    """.nii, .nii.gz, .hdr or .img, in lower case; empty where a name ends in none of them."""
    name = path.name.lower()
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def volume_stem(path: Path) -> str:
    """File name without .nii, .nii.gz, .hdr or .img, in whatever case they are written."""
    return path.name[: len(path.name) - len(volume_suffix(path))]


def volume_files(path: Path) -> tuple[Path, ...]:
    """The file itself, or header and image of the .hdr/.img pair that it is one of."""
    suffix = volume_suffix(path)
    if suffix not in _PAIR:
        return (path,)
    other = path.with_suffix(_PAIR[suffix].upper() if path.suffix.isupper() else _PAIR[suffix])
    return (path, other) if suffix == ".hdr" else (other, path)


def check_files(path: Path) -> None:
    """Refuse a scan or mask of which a file is not there, by the name of that file.

    Parameters
    ----------
    path : Path
        A .nii or .nii.gz file, or either file of an .hdr/.img pair.

    Raises
    ------
    InputError
        The file, or one of its pair, is missing, not readable or not a regular file.
    """
    for file in volume_files(path):
        with open_volume(file):
            pass


@contextlib.contextmanager
def open_volume(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file for reading; what fails in the block is told as an error of this file.

    Parameters
    ----------
    path : Path

    Yields
    ------
    io.BufferedIOBase
        The file's bytes, decompressed where its name ends in .nii.gz.

    Raises
    ------
    InputError
        The file is missing, not readable or not a regular file; or its gzip data are truncated or
        damaged.
    DeviceError
        Memory runs out in the block.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise InputError(f"{path}: {kind}", expected="a NIfTI file")
        with path.open("rb") as raw:
            if volume_suffix(path) == ".nii.gz":
                with igzip.open(raw, "rb") as decompressed:
                    yield decompressed
            else:
                yield raw
    except _GZIP_ERRORS as error:
        raise InputError(
            f"{path}: truncated or damaged gzip data ({error})",
            expected="an intact .nii.gz file",
            action="copy or export the file again",
        ) from error
    except MemoryError as error:
        raise DeviceError(
            f"{path}: an image larger than the memory left",
            action="free memory, or crop the image",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise InputError(
            f"{path}: {getattr(error, 'strerror', None) or error}",
            expected="a NIfTI file that can be read",
            action="check the name and its permissions",
        ) from error


def write_volume(path: Path, header: bytes, voxels: bytes) -> None:
    """Write a file of header and voxels, whole or not at all.

    Parameters
    ----------
    path : Path
        Name ending in .nii or .nii.gz, which is compressed, with neither time nor name in it; its
        folder must exist.
    header, voxels : bytes

    Raises
    ------
    OutputError
        The file cannot be written there, or has another suffix.
    """
    suffix = volume_suffix(path)
    if suffix not in (".nii", ".nii.gz"):
        raise OutputError(f"{path}: an unknown suffix", expected="a name in .nii or .nii.gz")
    with atomic_write(path) as stream, contextlib.ExitStack() as stack:
        target: Any = stream
        if suffix == ".nii.gz":
            target = stack.enter_context(
                igzip.IGzipFile("", "wb", compresslevel=_GZIP_LEVEL, fileobj=stream, mtime=0)
            )
        target.write(header)
        target.write(voxels)
