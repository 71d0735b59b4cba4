from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from trtseg.errors import InputError
from trtseg.scan import Geometry, Scan, as_array, check_voxel_type, real_voxels

GEOMETRY = Geometry(np.eye(4), {})


def test_shape():
    assert Scan(np.zeros((4, 5, 6), np.int16), GEOMETRY).shape == (4, 5, 6)


def test_defaults():
    assert Scan(np.zeros((1, 1, 1)), GEOMETRY).warnings == ()
    assert GEOMETRY.nifti_version == 1


def test_frozen():
    scan = Scan(np.zeros((1, 2, 3)), GEOMETRY)
    with pytest.raises(FrozenInstanceError):
        scan.data = np.ones((1, 2, 3))  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        GEOMETRY.affine = np.zeros((4, 4))  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(), (4,), (4, 5), (4, 5, 6, 1), (4, 5, 6, 7)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(InputError, match=f"{len(shape)} dimensions.*expected 3 dimensions"):
        Scan(np.zeros(shape), GEOMETRY)


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6), (4, 5, 0)])
def test_empty_axes_are_refused(shape):
    with pytest.raises(InputError, match="empty axis"):
        Scan(np.zeros(shape), GEOMETRY)


@pytest.mark.parametrize(
    ("matrix", "millilitres"),
    [
        (np.diag([0.8, 0.8, 0.8]), 0.000512),
        (np.diag([-1.0, 2.0, 3.0]), 0.006),  # a mirrored axis has a negative determinant
        ([[0, 0, 2.0], [1.0, 0, 0], [0, 0.5, 0]], 0.001),  # permuted axes
        ([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1.5]], 0.0015),  # turned by an angle
        ([[1.0, 0.5, 0], [0, 1.0, 0], [0, 0, 1.0]], 0.001),  # sheared
    ],
)
def test_voxel_volume(matrix, millilitres):
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = (10, -20, 30)
    assert Geometry(affine, {}).voxel_volume_ml == pytest.approx(millilitres, rel=1e-12)


@pytest.mark.parametrize("data", [[[1, 2], [3]], [[1], [[2]]]])
def test_object_that_is_no_array(data):
    with pytest.raises(InputError, match="a list: list that is no array"):
        as_array("a list", data)


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        ("U1", r"non-numeric voxels \(str32\)"),
        ("O", r"non-numeric voxels \(object\)"),
        ("c8", r"complex voxels \(complex64\)"),
        ([("R", "u1"), ("G", "u1"), ("B", "u1")], r"colour voxels \(RGB\)"),
    ],
)
def test_voxels_that_are_no_real_numbers(dtype, found):
    with pytest.raises(InputError, match=f"an array: {found}"):
        check_voxel_type("an array", np.dtype(dtype))
    with pytest.raises(InputError, match=f"an array: {found}"):
        real_voxels("an array", np.zeros((1, 2, 3), dtype))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        *((name, name) for name in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")),
        *((name, name) for name in ("f2", "f4", "f8")),
        *((">i2", "i2"), (">f4", "f4"), ("?", "u1"), ("longdouble", "f8")),
    ],
)
def test_real_voxels_of_any_type(dtype, wanted):
    data = np.arange(120).reshape(4, 5, 6).astype(dtype)

    found = real_voxels("an array", data)

    np.testing.assert_array_equal(found, data)
    assert found.dtype == np.dtype(wanted)
    assert found.dtype.isnative
    assert np.shares_memory(found, data) == (data.dtype == np.dtype(wanted))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(value):
    data = np.zeros((4, 5, 6))
    data[1, 2, 3:6] = value
    with pytest.raises(InputError, match="an array: 3 voxels that are not finite"):
        real_voxels("an array", data)


def test_voxels_beyond_float64():
    if np.finfo(np.longdouble).max == np.finfo(np.float64).max:
        pytest.skip("this machine's long double is float64")
    data = np.full((1, 1, 2), np.finfo(np.longdouble).max)
    with pytest.raises(InputError, match="2 voxels that are not finite"):
        real_voxels("an array", data)
