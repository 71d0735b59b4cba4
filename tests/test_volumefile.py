from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from isal import igzip

from trtseg.errors import EXIT_DEVICE, DeviceError, InputError, OutputError
from trtseg.volumefile import (
    check_files,
    open_volume,
    volume_files,
    volume_stem,
    volume_suffix,
    write_volume,
)

HEADER, VOXELS = bytes(range(200)), b"voxels" * 100


# Names


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("scan.nii", "scan"),
        ("scan.nii.gz", "scan"),
        ("sub-01_T2w.rec.NII.GZ", "sub-01_T2w.rec"),
        ("scan.hdr", "scan"),
        ("scan.IMG", "scan"),
        ("nii.nii.nii.gz", "nii.nii"),
        ("scan.gz", "scan.gz"),
        ("scan", "scan"),
    ],
)
def test_volume_stem(name, stem):
    path = Path("folder.nii") / name
    assert volume_stem(path) == stem
    assert volume_suffix(path) == name.removeprefix(stem).lower()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("a.nii", ["a.nii"]),
        ("a.nii.gz", ["a.nii.gz"]),
        ("a", ["a"]),
        ("a.hdr", ["a.hdr", "a.img"]),
        ("a.img", ["a.hdr", "a.img"]),
        ("a.b.IMG", ["a.b.HDR", "a.b.IMG"]),
    ],
)
def test_files_of_a_volume(name, files):
    found = volume_files(Path("folder") / name)
    assert found == tuple(Path("folder") / file for file in files)


def test_check_files_names_the_one_that_is_missing(tmp_path):
    (tmp_path / "a.hdr").touch()
    (tmp_path / "b.img").touch()
    (tmp_path / "c.hdr").touch()
    (tmp_path / "c.img").mkdir()
    for name, said in [
        ("a.hdr", r"a\.img: No such file"),
        ("a.img", r"a\.img: No such file"),
        ("b.img", r"b\.hdr: No such file"),
        ("c.hdr", r"c\.img: a folder"),
        ("d.nii.gz", r"d\.nii\.gz: No such file"),
    ]:
        with pytest.raises(InputError, match=said):
            check_files(tmp_path / name)
    (tmp_path / "a.img").touch()
    check_files(tmp_path / "a.hdr")


# Reading


def read(path: Path) -> bytes:
    with open_volume(path) as stream:
        return stream.read()


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a.nii", "a.hdr", "a.gz", "a"])
def test_bytes_as_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(VOXELS))
    assert read(tmp_path / name) == gzip.compress(VOXELS)


@pytest.mark.parametrize("name", ["a.nii.gz", "A.NII.GZ"])
def test_bytes_decompressed(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(HEADER) + gzip.compress(VOXELS))
    assert read(tmp_path / name) == HEADER + VOXELS


@pytest.mark.parametrize("kept", [0.5, -1])
def test_gzip_data_cut_short(tmp_path, kept):
    content = gzip.compress(HEADER + VOXELS)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    assert "truncated or damaged gzip data" in refusal(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_memory_that_runs_out_is_the_machines(tmp_path, name):
    write_volume(tmp_path / name, HEADER, VOXELS)
    said = "larger than the memory left"
    with pytest.raises(DeviceError, match=said) as caught, open_volume(tmp_path / name):
        raise MemoryError
    assert caught.value.exit_code == EXIT_DEVICE
    assert caught.value.found.startswith(f"{tmp_path / name}: ")


def test_folder(tmp_path):
    (tmp_path / "a.nii").mkdir()
    assert "a folder" in refusal(tmp_path / "a.nii")


def test_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.nii")
    assert "not a regular file" in refusal(tmp_path / "a.nii")


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.nii"
    path.touch()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refusal(path)


def test_nul_byte_in_the_name():
    assert "null" in refusal(Path("a\0b.nii"))


# Writing


@pytest.mark.parametrize("name", ["a.nii", "A.NII"])
def test_what_is_written_plain(tmp_path, name):
    write_volume(tmp_path / name, HEADER, VOXELS)
    assert (tmp_path / name).read_bytes() == HEADER + VOXELS


@pytest.mark.parametrize("name", ["a.nii.gz", "A.NII.GZ"])
def test_what_is_written_compressed(tmp_path, name):
    write_volume(tmp_path / name, HEADER, VOXELS)
    content = (tmp_path / name).read_bytes()
    assert gzip.decompress(content) == HEADER + VOXELS
    assert content[:3] == b"\x1f\x8b\x08"
    assert content[3] == 0  # no flags: no name, comment or extra field
    assert content[4:8] == bytes(4)  # no time


@pytest.mark.parametrize("name", ["a.hdr", "a.img", "a.mgz", "a"])
def test_other_suffixes_are_not_written(tmp_path, name):
    with pytest.raises(OutputError, match="suffix"):
        write_volume(tmp_path / name, HEADER, VOXELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    path = tmp_path / name
    write_volume(path, HEADER, VOXELS)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_volume(path, HEADER, b"others")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_compression_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_volume(path, HEADER, VOXELS)
    before = path.read_bytes()
    written = igzip.IGzipFile.write

    def fail_on_voxels(self: igzip.IGzipFile, data: bytes) -> int:
        if data != HEADER:
            raise OSError(errno.EIO, "Input/output error")
        return written(self, data)

    monkeypatch.setattr(igzip.IGzipFile, "write", fail_on_voxels)
    with pytest.raises(OutputError, match="Input/output error"):
        write_volume(path, HEADER, b"others")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.nii.gz"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "a.nii").mkdir()
    for path, said in [
        (tmp_path / "none" / "a.nii", "No such file"),
        (tmp_path / "file" / "a.nii", "Not a directory"),
        (tmp_path / "a.nii", "Is a directory"),
    ]:
        with pytest.raises(OutputError, match=said):
            write_volume(path, HEADER, VOXELS)
