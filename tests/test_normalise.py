from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtseg.errors import InputError
from trtseg.normalise import z_score
from trtseg.scan import Geometry, Scan

GEOMETRY = Geometry(np.diag([0.8, 0.8, 1.2, 1.0]), {"qform_code": 1})


def scores(data: np.ndarray) -> np.ndarray:
    return z_score(Scan(data, GEOMETRY)).data


def halves(low: float, high: float, dtype: str) -> np.ndarray:
    data = np.full((4, 5, 6), low, dtype)
    data[2:] = high
    return data


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 2, "u1"),
        (0, 1, "?"),
        (-128, 127, "i1"),
        (-32768, 32767, "i2"),
        (-32768, 32767, ">i2"),
        (0, 65535, "u2"),
        (-(2**31), 2**31 - 1, "i4"),
        (0, 2**63, "u8"),
        (-1e-30, 1e-30, "f4"),
        (-3e38, 3e38, "f4"),
        (-1e100, 1e100, "f8"),
        (0, 60000, "f2"),
    ],
)
def test_two_equal_halves_are_minus_and_plus_one(low, high, dtype):
    np.testing.assert_array_equal(scores(halves(low, high, dtype)), halves(-1, 1, "f4"))


def test_a_single_odd_voxel():
    data = np.zeros((2, 2, 2), np.int16)
    data[1, 0, 1] = 8
    # mean 1, variance (7 x 1 + 49) / 8 = 7: -1 / sqrt 7 and 7 / sqrt 7
    expected = np.full((2, 2, 2), -0.3779644730092272, np.float32)
    expected[1, 0, 1] = 2.6457513110645907
    np.testing.assert_allclose(scores(data), expected, rtol=1.2e-7)


def test_background_counts():
    """The mean and deviation are those of all voxels, zeros included, and of the population."""
    data = np.zeros((1, 2, 2))
    data[0, 0] = (2, 6)
    # mean 2, variance (4 + 4 + 0 + 16) / 4 = 6
    np.testing.assert_allclose(
        scores(data).ravel(), np.array([0, 4, -2, -2]) / 2.449489742783178, rtol=1.2e-7
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 12)] * 3).filter(lambda shape: np.prod(shape) > 1),
    dtype=st.sampled_from(["i2", "u2", "f4", "f8"]),
    spread=st.sampled_from([1.0, 30.0, 3000.0]),
    centre=st.sampled_from([0.0, 500.0, 20000.0]),
)
@settings(max_examples=80, derandomize=True, deadline=None, database=None)
def test_is_the_formula_in_double_precision(seed, shape, dtype, spread, centre):
    rng = np.random.default_rng(seed)
    values = np.clip(rng.normal(centre, spread, shape), 0, 32000)
    values.flat[0] = 32001  # never constant
    data = values.astype(dtype)
    wide = data.astype(np.float64)
    expected = ((wide - np.mean(wide)) / np.std(wide)).astype(np.float32)
    found = scores(data)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1.2e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", ["i2", "f8"])
def test_memory_layout_does_not_matter(dtype):
    data = np.random.default_rng(3).normal(700, 300, (21, 17, 19)).astype(dtype)
    expected = scores(data)
    strided = np.zeros((42, 17, 38), dtype)[::2, :, ::-2]
    strided[...] = data
    for other in (np.asfortranarray(data), strided):
        found = scores(other)
        np.testing.assert_array_equal(found, expected)
        assert found.flags.c_contiguous


def test_result_is_float32_in_c_order_and_the_scan_untouched():
    data = np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    before = data.copy()
    scan = Scan(data, GEOMETRY, ("a warning",))
    result = z_score(scan)
    assert result.data.dtype == np.float32
    assert result.data.flags.c_contiguous
    assert result.geometry is GEOMETRY
    assert result.warnings == ("a warning",)
    assert scan.data is data
    np.testing.assert_array_equal(data, before)


def test_read_only_data():
    data = halves(0, 2, "i2")
    data.flags.writeable = False
    np.testing.assert_array_equal(scores(data), halves(-1, 1, "f4"))


@pytest.mark.parametrize("value", [0, 7, -32768])
@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
def test_a_constant_image_is_refused(value, dtype):
    with pytest.raises(InputError, match=f"constant image .every voxel is {value}"):
        scores(np.full((4, 5, 6), value, dtype))


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 7.7, 1428571428.5714285, 1e-200, 1e200])
@pytest.mark.parametrize("side", [1, 3, 7, 10])
def test_a_constant_image_is_refused_whatever_its_sum_rounds_to(value, side):
    with pytest.raises(InputError, match="constant image"):
        scores(np.full((side, side, side), value))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1)])
def test_constant_images_of_few_voxels_are_refused(shape):
    with pytest.raises(InputError, match="constant image"):
        scores(np.full(shape, 3, np.int16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_voxel_that_is_not_finite_is_refused(value, dtype):
    data = halves(0, 2, dtype)
    data[3, 4, 5] = value
    with pytest.raises(InputError, match="not finite"):
        scores(data)


def test_both_infinities_are_refused():
    data = halves(0, 2, "f4")
    data[0, 0, 0], data[3, 4, 5] = np.inf, -np.inf
    with pytest.raises(InputError, match="not finite"):
        scores(data)


@pytest.mark.parametrize(("low", "high"), [(-1e300, 1e300), (0, 1.7e308)])
def test_values_too_large_to_square_are_refused(low, high):
    with pytest.raises(InputError, match="too large to average"):
        scores(halves(low, high, "f8"))
