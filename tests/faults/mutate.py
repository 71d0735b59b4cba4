"""Reads mutated scans in a process of its own: ``python -m tests.faults.mutate COUNT SEED FOLDER``.

Prints as JSON what became of them, the largest memory the process held and the slowest input.
"""

from __future__ import annotations

import collections
import faulthandler
import gzip
import json
import re
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.faults.niftifile import FIELDS_1, FIELDS_2, analyze_header, header, voxels
from trtseg import nifti
from trtseg.errors import InputError
from trtseg.normalise import z_score

#: Seconds after which one input is taken to hang; each takes about a millisecond.
HANG = 20
#: Bytes of address space, over what the process has at the start, that may ever be asked for.
ROOM = 500 << 20

SHAPE = (3, 4, 5)
VALUES = np.arange(60).reshape(SHAPE)
#: Container, version, byte order, type, shape, further fields.
SEEDS: tuple[tuple[str, int, str, str, tuple[int, ...], dict[str, Any]], ...] = (
    ("nii", 1, "<", "i2", SHAPE, {}),
    ("nii", 1, ">", "f4", SHAPE, {}),
    ("nii", 2, "<", "u1", SHAPE, {}),
    ("nii", 2, ">", "f8", SHAPE, {}),
    ("gz", 1, "<", "u2", SHAPE, {}),
    ("gz", 2, ">", "i4", SHAPE, {}),
    ("hdr", 1, "<", "i8", SHAPE, {}),
    ("hdr", 2, "<", "i1", SHAPE, {}),
    ("hdr", 0, "<", "i2", SHAPE, {}),
    ("hdr", 0, ">", "f4", SHAPE, {}),
    ("nii", 1, "<", "u1", (3, 4, 5, 2), {}),
    ("nii", 1, "<", "i2", SHAPE, {"scl_slope": 0.5, "scl_inter": -3.0}),
    ("gz", 1, "<", "i2", SHAPE, {"sform_code": 0}),
    ("nii", 2, "<", "f4", SHAPE, {"qform_code": 0, "sform_code": 0}),
)
#: Numbers at which arithmetic and formats have their edges.
EDGES = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 347, 348, 352, 540, 544, 1536, 2304, 4096),
    *(32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1),
    *(0.5, 0.8, 1e-3, 1e-30, 1e-45, 1e-310, 1e9, 1e30, 3.4e38, 1e300),
    *(float("nan"), float("inf"), float("-inf")),
)

edits = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 8 * 560 - 1)),
    st.tuples(st.just("bytes"), st.integers(0, 559), st.binary(min_size=1, max_size=16)),
    st.tuples(
        st.just("field"),
        st.sampled_from(sorted(set(FIELDS_1) | set(FIELDS_2))),
        st.integers(0, 11),
        st.one_of(st.sampled_from(EDGES), st.sampled_from(EDGES).map(lambda edge: -edge)),
    ),
    st.tuples(st.just("copy"), st.integers(0, 559), st.integers(0, 559), st.integers(1, 64)),
)
mutants = st.tuples(
    st.sampled_from(SEEDS),
    st.lists(edits, min_size=1, max_size=6),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 700)),
)


def main(count: int, number: int, folder: Path) -> None:
    tally: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    own = Path("/proc/self/statm").read_text().split()
    resource.setrlimit(resource.RLIMIT_AS, (int(own[0]) * resource.getpagesize() + ROOM,) * 2)

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(mutants)
    def read(mutant: tuple[Any, list[Any], int | None]) -> None:
        nonlocal slowest
        path = write(folder, *mutant)
        faulthandler.dump_traceback_later(HANG, exit=True)
        started = time.perf_counter()
        tally[outcome(path)] += 1
        slowest = max(slowest, time.perf_counter() - started)
        faulthandler.cancel_dump_traceback_later()

    read()
    report = {"outcomes": dict(tally), "peak_bytes": peak(), "slowest_seconds": round(slowest, 3)}
    print(json.dumps(report))


def peak() -> int:
    """Largest memory of this process; getrusage would count that of the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM in /proc/self/status")


def write(
    folder: Path, made: tuple[str, int, str, str, Any, Any], changes: list[Any], kept: int | None
) -> Path:
    """Put a mutant on disk; give the file to read."""
    container, version, endian, kind, shape, fields = made
    pair = container == "hdr"
    if version:
        block = header(version, endian, kind, shape, pair=pair, **fields)
    else:
        block = analyze_header(endian, kind, shape)
    data = voxels(np.resize(VALUES, shape), kind, endian)
    content = bytearray(block if pair else block + bytes(4) + data)
    for change in changes:
        edit(content, FIELDS_2 if version == 2 else FIELDS_1, endian, change)
    path = folder / {"hdr": "a.hdr", "nii": "a.nii", "gz": "a.nii.gz"}[container]
    mutated = bytes(content[:kept])
    path.write_bytes(gzip.compress(mutated, 1) if container == "gz" else mutated)
    if pair:
        path.with_suffix(".img").write_bytes(data)
    return path


def edit(content: bytearray, places: dict[str, tuple[int, str]], endian: str, change: Any) -> None:
    name, *rest = change
    if name == "flip":
        place, bit = divmod(rest[0], 8)
        content[place % len(content)] ^= 1 << bit
    elif name == "bytes":
        place, value = rest
        content[place : place + len(value)] = value[: max(0, len(content) - place)]
    elif name == "copy":
        source, place, length = rest
        taken = content[source : source + length]
        content[place : place + len(taken)] = taken[: max(0, len(content) - place)]
    elif rest[0] in places:
        field, index, value = rest
        place, form = places[field]
        if not form.endswith("s"):
            item = struct.calcsize(f"={form[-1]}")
            place += index % int(form[:-1] or 1) * item
            content[place : place + item] = packed(endian, form[-1], item, value)


def packed(endian: str, letter: str, item: int, value: float) -> bytes:
    """A number as the field stores it; cut to its bits where it does not fit."""
    if letter in "fd":
        with np.errstate(all="ignore"):
            return np.array(value, f"{endian}f{item}").tobytes()
    whole = int(value) if abs(value) < 2**64 else 0  # NaN compares False
    order = "little" if endian == "<" else "big"
    return (whole & (1 << 8 * item) - 1).to_bytes(item, order)


def outcome(path: Path) -> str:
    """Read as `trtseg segment` does; what is accepted must make sense and be written back."""
    try:
        scan = nifti.read_scan(path)
    except InputError as error:
        message = str(error)
        assert path.stem in message, message
        assert "\n" not in message, message
        return "refused: " + re.sub(r"-?\d+", "#", message.split(": ", 1)[1])[:30].strip()
    assert scan.data.ndim == 3
    assert scan.data.dtype.isnative
    assert np.isfinite(scan.data).all()
    assert np.isfinite(np.linalg.inv(scan.geometry.affine)).all()
    assert not any("\n" in warning for warning in scan.warnings)
    try:
        scores = z_score(scan).data
    except InputError as error:
        return "refused: z-score, " + str(error)[:28].strip()
    assert np.isfinite(scores).all()
    assert abs(float(scores.mean(dtype=np.float64))) < 1e-3
    out = path.with_name("out.nii")
    nifti.write_labels(out, np.zeros(scan.shape, np.uint8), scan.geometry)
    np.testing.assert_array_equal(nifti.read_scan(out).geometry.affine, scan.geometry.affine)
    return "accepted"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
