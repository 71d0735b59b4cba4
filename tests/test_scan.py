from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from trtseg.errors import InputError
from trtseg.scan import Geometry, Scan

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
