from __future__ import annotations

import numpy as np
import pytest

from tests.images import AFFINE
from trtseg.affine import affine_warnings, as_affine, corner_distance, sides_alike
from trtseg.errors import InputError


def test_an_affine_is_taken_as_float64():
    taken = as_affine("a", [[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, -3, 7], [0, 0, 0, 1]])

    assert taken.dtype == np.float64
    assert taken.tolist() == [[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, -3, 7], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("affine", "found"),
    [
        (np.eye(3), "shape (3, 3)"),
        (np.eye(4) * 1j, "complex"),
        ("eye", "shape ()"),
        ([[1, 2], [3]], "no array"),
        (np.diag([1, 1, 1, 2]), "last row"),
        (np.diag([1, 1, 0, 1]), "singular"),
        (np.diag([1, np.nan, 1, 1]), "not finite"),
        (np.diag([1e-60, 1, 1, 1]), "singular"),
    ],
)
def test_affine_of_no_use(affine, found):
    with pytest.raises(InputError, match=r"^an image: ") as caught:
        as_affine("an image", affine)
    assert found in str(caught.value)


def sheared(degrees: float) -> np.ndarray:
    affine = AFFINE.copy()
    angle = np.radians(degrees)
    first, second = (AFFINE[:3, axis] / np.linalg.norm(AFFINE[:3, axis]) for axis in (0, 1))
    affine[:3, 1] = 0.75 * (np.cos(angle) * first + np.sin(angle) * second)
    return affine


@pytest.mark.parametrize(("degrees", "said"), [(85, "85.00"), (95, "85.00"), (89.88, "89.88")])
def test_sheared_affine_is_warned_of(degrees, said):
    (warning,) = affine_warnings(sheared(degrees))

    assert warning.startswith(
        f"sheared affine, with voxel axes at {said} degrees, expected 90 within 0.1:"
    )


@pytest.mark.parametrize("degrees", [89.92, 90, 90.08])
def test_shear_of_rounding_is_not_spoken_of(degrees):
    assert affine_warnings(sheared(degrees)) == ()


@pytest.mark.parametrize(
    "sizes", [(0.5, 0.5, 0.5), (1.2, 1.2, 1.2), (0.8, 0.8, 1.2), (0.5, 0.75, 0.6), (1, 1, 1)]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_voxels_of_the_known_sizes_are_not_spoken_of(sizes, dtype):
    affine = np.diag([*sizes, 1]) @ np.diag([-1, -1, 1, 1])
    assert affine_warnings(affine.astype(dtype).astype("f8")) == ()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((0.49, 0.49, 0.49), "0.49 x 0.49 x 0.49 mm"),
        ((1, 1, 1.25), "1 x 1 x 1.25 mm"),
        ((0.75, 0.75, 1.15), "0.75 x 0.75 x 1.15 mm"),
        ((1.1, 1.1, 3.3), "1.1 x 1.1 x 3.3 mm"),
        ((8e-4, 8e-4, 8e-4), "0.0008 x 0.0008 x 0.0008 mm"),
    ],
)
def test_voxels_of_other_sizes_are_warned_of(sizes, said):
    affine = np.diag([-1, -1, 1, 1]) @ AFFINE @ np.diag([*np.divide(sizes, (0.8, 0.75, 0.75)), 1])
    (warning,) = affine_warnings(affine)

    assert warning.startswith(
        f"voxels of {said}, expected sides of 0.5 to 1.2 mm and none over 1.5 times another "
    )


@pytest.mark.parametrize(
    ("sizes", "alike"),
    [
        ((0.8, 0.8, 0.8), True),
        ((1.2, 0.8, 0.9), True),  # 1.5 times
        (np.float32([0.8, 1.2, 0.8]), True),
        ((0.8, 0.8, 1.21), False),
        ((3.3, 1.1, 1.1), False),
    ],
)
def test_sides_that_are_alike(sizes, alike):
    assert sides_alike(sizes) is alike


def test_corners_apart():
    # Half a turn about the first voxel, in the plane of the first two axes.
    one, other = np.diag([0.8, 0.75, 2, 1]), np.diag([-0.8, -0.75, 2, 1])

    # The corner 3 x 0.8 and 4 x 0.75 mm from it lies twice sqrt(2.4^2 + 3^2) mm off.
    assert corner_distance(one, other, (4, 5, 6)) == pytest.approx(7.683749, abs=1e-6)
    assert corner_distance(one, other, (1, 1, 6)) == 0
    other[2, 3] += 0.5
    assert corner_distance(one, other, (1, 1, 6)) == 0.5
