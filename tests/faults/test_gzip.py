"""Compressed scans with bits flipped or the end cut off: refused, or read as if nothing was.

A flip may be harmless in two places. In a member's header: the flags that announce text or are
reserved, the time, the compressor's own notes, the system, the name and the comment. And in the
compressed data, where other bits can stand for the very same bytes: bits that fill up a byte, and
copies taken from another place of a run. A cut is harmless only in zeros after the last member, or
where it takes whole members that follow the voxels.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.faults.counts import SLOW, count
from tests.faults.niftifile import header, voxels
from trtseg import nifti
from trtseg.errors import InputError
from trtseg.scan import Scan

SHAPE = (24, 20, 18)
DATA = np.random.default_rng(5).normal(600, 200, SHAPE).clip(0, 4095).astype(np.int16)
DATA[:, :, :6] = 0  # the long runs of a background
CONTENT = header(1, "<", "i2", SHAPE) + bytes(4) + voxels(DATA, "i2", "<")

NAME = b"scan.nii\0"
COMMENT = b"of a phantom\0"


def deflated(content: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def member(content: bytes, level: int = 6, flags: int = 0, extra: bytes = b"") -> bytes:
    """A gzip member with a time, by RFC 1952."""
    head = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, flags, 1_600_000_000, 0, 3) + extra
    tail = struct.pack("<II", zlib.crc32(content), len(content))
    return head + deflated(content, level) + tail


#: Kind to a file of it, and the bytes in which a flip may be harmless.
KINDS = {
    "plain": (member(CONTENT), range(3, 10)),
    "named": (member(CONTENT, 9, 0x18, NAME + COMMENT), range(3, 10 + len(NAME + COMMENT))),
    "stored": (member(CONTENT, 0), range(3, 10)),
    "fast": (member(CONTENT, 1), range(3, 10)),
}
MEMBERS = [member(part) for part in (CONTENT[:352], CONTENT[352:9000], CONTENT[9000:])]


def take(path: Path, content: bytes) -> Scan | None:
    """The scan, or None where it is refused."""
    path.write_bytes(content)
    try:
        return nifti.read_scan(path)
    except InputError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return None


def assert_same(scan: Scan, other: Scan) -> None:
    np.testing.assert_array_equal(scan.data, other.data)
    assert scan.data.dtype == other.data.dtype
    assert scan.warnings == other.warnings
    assert scan.geometry.affine.tobytes() == other.geometry.affine.tobytes()
    assert scan.geometry.header.keys() == other.geometry.header.keys()
    for field, value in scan.geometry.header.items():
        assert value.tobytes() == other.geometry.header[field].tobytes()


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def inflated(content: bytes) -> bytes:
    """All members of a file, by zlib's own reader of gzip, checksums included."""
    found = b""
    while content:
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
        found += unpacker.decompress(content)
        assert unpacker.eof
        content = unpacker.unused_data
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scan.nii.gz"


@pytest.mark.parametrize("kind", KINDS)
def test_flips(path: Path, kind: str) -> None:
    content, idle = KINDS[kind]
    intact = take(path, content)
    assert intact is not None
    np.testing.assert_array_equal(intact.data, DATA)
    rng = np.random.default_rng(len(content))
    bits = rng.choice(8 * len(content), count(50, 1000), replace=False).tolist()
    head = range(8 * (idle.stop + 2)) if SLOW else range(0, 8 * 10, 3)
    tail = range(8 * (len(content) - 10), 8 * len(content), 1 if SLOW else 3)
    harmless = 0
    for bit in [*head, *bits, *tail]:
        scan = take(path, flipped(content, bit))
        if scan is not None:
            assert_same(scan, intact)
            assert bit // 8 in idle or inflated(flipped(content, bit)) == CONTENT, f"bit {bit}"
            harmless += 1
    # The time's 32 bits are among those tried, so some must have been harmless.
    assert harmless > 0
    print(f"{kind}: {len(head) + len(bits) + len(tail)} flips, {harmless} harmless, 0 silent")


@pytest.mark.parametrize("kind", KINDS)
def test_cuts(path: Path, kind: str) -> None:
    content, _ = KINDS[kind]
    rng = np.random.default_rng(len(content) + 1)
    lengths = rng.choice(len(content), count(10, 200), replace=False).tolist()
    for kept in [0, 1, 2, 9, 10, 11, *lengths, *range(len(content) - 9, len(content))]:
        assert take(path, content[:kept]) is None, f"{kept} of {len(content)} bytes"


def test_flips_in_files_of_several_members(path: Path) -> None:
    content = b"".join(MEMBERS)
    intact = take(path, content)
    assert intact is not None
    np.testing.assert_array_equal(intact.data, DATA)
    starts = np.cumsum([0, *map(len, MEMBERS)])
    idle = {int(start) + byte for start in starts[:-1] for byte in range(3, 10)}
    rng = np.random.default_rng(9)
    for bit in rng.choice(8 * len(content), count(50, 1000), replace=False).tolist():
        scan = take(path, flipped(content, bit))
        if scan is not None:
            assert_same(scan, intact)
            assert bit // 8 in idle or inflated(flipped(content, bit)) == CONTENT, f"bit {bit}"


def test_cuts_between_members(path: Path) -> None:
    # Where a whole member is gone the rest is sound gzip: only the header's claim shows the loss.
    for kept in (1, 2):
        assert take(path, b"".join(MEMBERS[:kept])) is None
    # A member after the voxels may go: nothing of the image is in it.
    intact = take(path, b"".join(MEMBERS))
    followed = b"".join(MEMBERS) + member(b"remarks")
    for content in (followed, b"".join(MEMBERS) + bytes(512)):
        scan = take(path, content)
        assert scan is not None
        assert intact is not None
        assert_same(scan, intact)
    assert take(path, followed[:-1]) is None
    assert take(path, b"".join(MEMBERS) + b"\0\0remarks") is None


def test_a_checksum_that_fits_other_voxels(path: Path) -> None:
    """Damage before compression is beyond gzip: what the header says of the size still counts."""
    assert take(path, gzip.compress(CONTENT[:-2])) is None
    assert take(path, gzip.compress(CONTENT[:352])) is None
