"""Type x container, shape x container, values x container: what is taken and what is refused.

The tables are the specification: each cell is one file, put together byte by byte, and says what
`read_scan` and `z_score` make of it. A column is a kind of file, the version of NIfTI and the byte
order; "hdr" and "img" name the file of the pair that is given, "ana" is an Analyze 7.5 pair, and a
kind in capitals has its suffix in capitals.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.niftifile import ROWS, TYPES, analyze_header, header, save, voxels
from trtseg import nifti
from trtseg.errors import EXIT_INPUT, InputError
from trtseg.normalise import z_score

#: Outcome to the words of its refusal; those not here are accepted.
REFUSALS = {
    "unknown": "that nibabel cannot read (data code",
    "complex": "complex voxels",
    "colour": "colour voxels",
    "rank": "an image of",
    "empty": "an image with axes of",
    "const": "a constant image",
    "finite": "voxels that are not finite numbers",
    "large": "too large to average",
    "short": "bytes of voxels in the file; expected",
}
MANY = "4-D file of 2 volumes: the first is segmented"
ANALYZE = "Analyze 7.5 file"

TYPE_TABLE = """
      nii1<   NII1>   nii2<   nii2>   gz1<    gz1>    GZ2<    gz2>    hdr1<   img1>   IMG2<   hdr2>   ana<    ana>
u1    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
i1    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      unknown unknown
u2    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      unknown unknown
i2    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
u4    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      unknown unknown
i4    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
u8    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      unknown unknown
i8    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      unknown unknown
f4    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
f8    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
f16   unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown
bit   unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown
rgb   colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour
rgba  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  colour  unknown unknown
c8    complex complex complex complex complex complex complex complex complex complex complex complex complex complex
c16   complex complex complex complex complex complex complex complex complex complex complex complex unknown unknown
c32   unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown unknown
"""  # noqa: E501

SHAPE_TABLE = """
              nii1<   nii2>   gz1<    gz2>    hdr1<   hdr2>   ana<
4x5x6         ok      ok      ok      ok      ok      ok      ok
1x1x60        ok      ok      ok      ok      ok      ok      ok
60x1x1        ok      ok      ok      ok      ok      ok      ok
1x60x1        ok      ok      ok      ok      ok      ok      ok
1x1x2         ok      ok      ok      ok      ok      ok      ok
32767x1x1     ok      ok      ok      ok      ok      ok      ok
4x5x6x1       ok      ok      ok      ok      ok      ok      ok
4x5x6x2       many    many    many    many    many    many    many
4x5x6x2x1x1   many    many    many    many    many    many    many
4x5x6x1x1x1x1 ok      ok      ok      ok      ok      ok      ok
1x1x1         const   const   const   const   const   const   const
4x5x6x1x2     rank    rank    rank    rank    rank    rank    rank
4x5x6x2x2     rank    rank    rank    rank    rank    rank    rank
4x5x1x1x1x1x3 rank    rank    rank    rank    rank    rank    rank
4x5           rank    rank    rank    rank    rank    rank    rank
60            rank    rank    rank    rank    rank    rank    rank
0x5x6         empty   empty   empty   empty   empty   empty   empty
4x0x6         empty   empty   empty   empty   empty   empty   empty
4x5x0         empty   empty   empty   empty   empty   empty   empty
4x5x6x0       empty   empty   empty   empty   empty   empty   empty
-4x5x6        empty   empty   empty   empty   empty   empty   empty
"""

VALUE_TABLE = """
           nii1<   nii1>   nii2<   nii2>   gz1<    gz1>    gz2<    gz2>    hdr1<   img2>   ana<
ramp:f4    ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
scaled:i2  ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
scaled:u1  ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
scaled:f8  ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
shifted:i2 ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
turned:i2  turned  turned  turned  turned  turned  turned  turned  turned  turned  turned  turned
unscaled:i2 ok     ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
one:i2     ok      ok      ok      ok      ok      ok      ok      ok      ok      ok      ok
zero:i2    const   const   const   const   const   const   const   const   const   const   const
seven:u1   const   const   const   const   const   const   const   const   const   const   const
third:f4   const   const   const   const   const   const   const   const   const   const   const
third:f8   const   const   const   const   const   const   const   const   const   const   const
drowned:f8 const   const   const   const   const   const   const   const   const   const   const
nan:f4     finite  finite  finite  finite  finite  finite  finite  finite  finite  finite  finite
nan:f8     finite  finite  finite  finite  finite  finite  finite  finite  finite  finite  finite
inf:f4     finite  finite  finite  finite  finite  finite  finite  finite  finite  finite  finite
-inf:f8    finite  finite  finite  finite  finite  finite  finite  finite  finite  finite  finite
burst:f8   finite  finite  finite  finite  finite  finite  finite  finite  finite  finite  finite
huge:f8    large   large   large   large   large   large   large   large   large   large   large
cut:i2     short   short   short   short   short   short   short   short   short   short   short
claim:i2   short   short   short   short   short   short   short   short   short   short   short
"""


def cells(table: str) -> list[Any]:
    """Row, column and outcome of every cell."""
    lines = table.strip().splitlines()
    columns = lines[0].split()
    found = []
    for line in lines[1:]:
        row, *outcomes = line.split()
        found += [
            pytest.param(row, column, outcome, id=f"{row}-{column}-{outcome}")
            for column, outcome in zip(columns, outcomes, strict=True)
        ]
    return found


ALL_CELLS = [*cells(TYPE_TABLE), *cells(SHAPE_TABLE), *cells(VALUE_TABLE)]


def test_the_tables_name_every_type_and_enough_cells() -> None:
    assert {cell.values[0] for cell in cells(TYPE_TABLE)} == set(TYPES)
    assert len(cells(TYPE_TABLE)) == 17 * 14
    assert len(cells(SHAPE_TABLE)) == 21 * 7
    assert len(cells(VALUE_TABLE)) == 21 * 11
    assert {cell.values[2] for cell in ALL_CELLS} == {"ok", "many", "turned", *REFUSALS}


def container(column: str) -> tuple[str, int, str]:
    """Kind of file, NIfTI version (0: Analyze 7.5) and byte order of a column."""
    if column.startswith("ana"):
        return ("hdr" if column.endswith("<") else "img", 0, column[-1])
    return column[:-2], int(column[-2]), column[-1]


def put(
    folder: Path, column: str, kind: str, shape: tuple[int, ...], data: bytes, **fields: Any
) -> Path:
    """A scan file in the column's container; gives its path."""
    name, version, endian = container(column)
    pair = name.lower() in ("hdr", "img")
    if version:
        block = header(version, endian, kind, shape, pair=pair, **fields)
    else:
        block = analyze_header(endian, kind, shape, **fields)
    return save(folder, name, block, data)


def judge(path: Path, outcome: str, column: str, expected: np.ndarray) -> None:
    """Assert a cell's outcome; `expected` are the z-scores of what is accepted."""
    if outcome in REFUSALS:
        with pytest.raises(InputError) as caught:
            z_score(nifti.read_scan(path))
        message = str(caught.value)
        assert REFUSALS[outcome] in message
        assert "; expected " in message
        assert "\n" not in message
        assert caught.value.exit_code == EXIT_INPUT
        return
    scan = nifti.read_scan(path)
    scores = z_score(scan).data
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=2e-7, atol=2e-7)
    notes = [MANY] * (outcome == "many") + [ANALYZE] * (container(column)[1] == 0)
    assert len(scan.warnings) == len(notes)
    for warning, note in zip(scan.warnings, notes, strict=True):
        assert warning.startswith(note)
    if container(column)[1]:
        np.testing.assert_allclose(scan.geometry.affine[:3], ROWS, rtol=1e-7)
        assert scan.geometry.nifti_version == container(column)[1]


def ramp(*shape: int) -> np.ndarray:
    """0, 1, 2, ... in the order of the file, so that a wrong order of axes shows."""
    return np.arange(math.prod(shape)).reshape(shape, order="F")


def ramp_scores(values: np.ndarray, of: int) -> np.ndarray:
    """z-scores of a ramp of `of` values: mean (n - 1) / 2, variance (n^2 - 1) / 12."""
    return (values - (of - 1) / 2) / math.sqrt((of**2 - 1) / 12)


@pytest.mark.parametrize(("kind", "column", "outcome"), cells(TYPE_TABLE))
def test_types(tmp_path: Path, kind: str, column: str, outcome: str) -> None:
    if kind in ("f16", "c32") and np.finfo(np.longdouble).nmant == 112:
        pytest.skip("this machine's long double is NIfTI's 128-bit float")
    values = ramp(4, 5, 6)
    path = put(tmp_path, column, kind, (4, 5, 6), voxels(values, kind, container(column)[2]))
    judge(path, outcome, column, ramp_scores(values, 120))


@pytest.mark.parametrize(("text", "column", "outcome"), cells(SHAPE_TABLE))
def test_shapes(tmp_path: Path, text: str, column: str, outcome: str) -> None:
    shape = tuple(-4 if size == "-4" else int(size) for size in text.split("x"))
    values = ramp(*(abs(size) for size in shape))
    path = put(tmp_path, column, "i2", shape, voxels(values, "i2", container(column)[2]))
    taken = math.prod(shape[:3])
    first = np.zeros(0) if outcome in REFUSALS else values.ravel(order="F")[:taken]
    expected = ramp_scores(first, max(taken, 2))
    if outcome not in REFUSALS:
        expected = expected.reshape(shape[:3], order="F")
    judge(path, outcome, column, expected)


def halves(low: float, high: float) -> np.ndarray:
    values = np.full((4, 5, 6), float(low))
    values[2:] = high
    return values


def one_odd(value: float, rest: float) -> np.ndarray:
    values = np.full((4, 5, 6), float(rest))
    values[3, 4, 5] = value
    return values


#: Row to stored values, header fields, and bytes that the file lacks.
VALUES: dict[str, tuple[np.ndarray, dict[str, Any], int]] = {
    "ramp": (ramp(4, 5, 6), {}, 0),
    "scaled": (ramp(4, 5, 6), {"scl_slope": 0.25}, 0),
    "shifted": (ramp(4, 5, 6), {"scl_inter": -1024.0}, 0),
    "turned": (ramp(4, 5, 6), {"scl_slope": -2.0}, 0),
    "unscaled": (ramp(4, 5, 6), {"scl_slope": 0.0}, 0),
    "one": (one_odd(1, 0), {}, 0),
    "zero": (halves(0, 0), {}, 0),
    "seven": (halves(7, 7), {}, 0),
    "third": (halves(1 / 3, 1 / 3), {}, 0),
    "drowned": (1e15 + ramp(4, 5, 6) / 8, {}, 0),
    "nan": (one_odd(np.nan, 1), {}, 0),
    "inf": (one_odd(np.inf, 1), {}, 0),
    "-inf": (one_odd(-np.inf, 1), {}, 0),
    "burst": (halves(1e300, 2e300), {"scl_slope": 1e30}, 0),
    "huge": (halves(-1e300, 1e300), {}, 0),
    "cut": (ramp(4, 5, 6), {}, 1),
    "claim": (ramp(4, 5, 6), {"dim": (3, 1000, 1000, 1000, 1, 1, 1, 1)}, 0),
}


@pytest.mark.parametrize(("text", "column", "outcome"), cells(VALUE_TABLE))
def test_values(tmp_path: Path, text: str, column: str, outcome: str) -> None:
    row, kind = text.split(":")
    values, fields, lacking = VALUES[row]
    data = voxels(values, kind, container(column)[2])
    path = put(tmp_path, column, kind, (4, 5, 6), data[: len(data) - lacking], **fields)
    if row == "one":  # mean 1/120, variance 119/120^2
        expected = (values * 120 - 1) / math.sqrt(119)
    else:
        expected = ramp_scores(ramp(4, 5, 6), 120) * (-1 if outcome == "turned" else 1)
    judge(path, outcome, column, expected)


@pytest.mark.parametrize("dtype", ["?", "f2", "longdouble", ">f8", "<u4"])
def test_types_that_only_arrays_in_memory_have(dtype: str) -> None:
    values = ramp(4, 5, 6) >= 60 if dtype == "?" else ramp(4, 5, 6)
    expected = 2.0 * values - 1 if dtype == "?" else ramp_scores(values, 120)
    scan = nifti.scan_from_array(values.astype(dtype), np.diag([-0.8, 0.8, 0.8, 1]))
    np.testing.assert_allclose(z_score(scan).data, expected, rtol=2e-7, atol=2e-7)
