from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from tests.images import AFFINE, SHAPE, geometry, make_header, ramp, save
from trtseg.errors import InputError
from trtseg.masks import mask_from_array, mask_from_image, read_mask
from trtseg.nifti import read_scan


def write_mask(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, **fields: Any) -> Path:
    header = make_header(values.shape, values.dtype, **fields)
    header.set_sform(affine, code="scanner")
    content = header.binaryblock.ljust(352, b"\0") + values.tobytes(order="F")
    return save(path, content)


BRAIN = ramp() % 3 == 0


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
def test_mask_of_any_type(tmp_path, dtype):
    path = write_mask(tmp_path / "m.nii.gz", BRAIN.astype(dtype))
    mask = read_mask(path, geometry(), SHAPE)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, BRAIN)


def test_mask_of_scaled_values(tmp_path):
    stored = BRAIN.astype(np.uint8) * 255
    path = write_mask(tmp_path / "m.nii.gz", stored, scl_slope=0.99999997 / 255, scl_inter=0)
    assert read_scan(path).data.dtype == np.float64
    np.testing.assert_array_equal(read_mask(path, geometry(), SHAPE), BRAIN)


def test_mask_threshold_is_above_one_half(tmp_path):
    values = np.zeros(SHAPE, np.float32)
    half, one = np.float32(0.5), np.float32(1)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = half, np.nextafter(half, one), -3
    path = write_mask(tmp_path / "m.nii", values)
    assert np.argwhere(read_mask(path, geometry(), SHAPE)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("shape", [(5, 4, 6), (4, 5, 7), (4, 5, 5)])
def test_mask_of_another_shape(tmp_path, shape):
    path = write_mask(tmp_path / "m.nii", np.ones(shape, np.uint8))
    with pytest.raises(InputError) as caught:
        read_mask(path, geometry(), SHAPE)
    assert str(shape) in str(caught.value)
    assert str(SHAPE) in str(caught.value)
    with pytest.raises(InputError, match="mask of shape"):
        mask_from_array(np.ones(shape, bool), SHAPE)


def test_mask_that_lies_off_the_scan(tmp_path):
    shifted = AFFINE.copy()
    shifted[2, 3] += 0.05
    path = write_mask(tmp_path / "m.nii", BRAIN.astype("u1"), shifted)
    np.testing.assert_array_equal(read_mask(path, geometry(), SHAPE), BRAIN)
    shifted[2, 3] += 0.15
    path = write_mask(tmp_path / "m.nii", BRAIN.astype("u1"), shifted)
    with pytest.raises(InputError, match=r"m\.nii: .* up to 0\.2 mm off"):
        read_mask(path, geometry(), SHAPE)


def test_mask_whose_far_corner_alone_lies_off(tmp_path):
    longer = AFFINE.copy()
    longer[2, 2] += 0.05  # 5 voxels from the first plane to the last: 0.25 mm
    path = write_mask(tmp_path / "m.nii", BRAIN.astype("u1"), longer)
    with pytest.raises(InputError, match=r"up to 0\.25 mm off"):
        read_mask(path, geometry(), SHAPE)


def test_mask_of_other_handedness(tmp_path):
    path = write_mask(tmp_path / "m.nii", BRAIN.astype("u1"), np.diag([-1, 1, 1, 1]) @ AFFINE)
    with pytest.raises(InputError, match="mm off"):
        read_mask(path, geometry(), SHAPE)


def test_mask_with_nan(tmp_path):
    values = BRAIN.astype(np.float32)
    values[0, 0, 0] = np.nan
    path = write_mask(tmp_path / "m.nii", values)
    with pytest.raises(InputError, match="1 voxels that are not finite"):
        read_mask(path, geometry(), SHAPE)
    with pytest.raises(InputError, match="1 voxels that are not finite"):
        mask_from_array(values, SHAPE)


def test_mask_of_several_volumes(tmp_path):
    path = write_mask(tmp_path / "m.nii", np.ones((*SHAPE, 2), np.uint8))
    with pytest.raises(InputError, match="4-D with 2 volumes"):
        read_mask(path, geometry(), SHAPE)


@pytest.mark.parametrize("dtype", ["?", "u1", "i8", ">f4"])
def test_mask_from_array(dtype):
    mask = mask_from_array(BRAIN.astype(dtype), SHAPE)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, BRAIN)


@pytest.mark.parametrize("array", [BRAIN.astype("c8"), None, np.full(SHAPE, "x")])
def test_mask_that_is_no_array_of_numbers(array):
    with pytest.raises(InputError, match="mask array"):
        mask_from_array(array, SHAPE)


def test_mask_from_image():
    image = nibabel.Nifti1Image(BRAIN.astype(np.uint8), AFFINE)
    np.testing.assert_array_equal(mask_from_image(image, geometry(), SHAPE), BRAIN)


@pytest.mark.parametrize(
    ("values", "affine", "found"),
    [
        (np.ones((*SHAPE, 2), np.uint8), AFFINE, "mask: 4-D with 2 volumes"),
        (np.ones((5, 4, 6), np.uint8), AFFINE, r"mask: a mask of shape \(5, 4, 6\)"),
        (BRAIN.astype("u1"), AFFINE @ np.diag([1, 1, -1, 1]), "mask: .* mm off"),
    ],
)
def test_image_that_is_no_mask_of_the_scan(values, affine, found):
    with pytest.raises(InputError, match=found):
        mask_from_image(nibabel.Nifti1Image(values, affine), geometry(), SHAPE)
