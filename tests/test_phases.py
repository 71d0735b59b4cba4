from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtseg.phases import axis_variants, box_indices, cell_range, collapse, reach


def test_variants_are_literal_tables():
    # (variants: the cell of each tap, relative to the voxel's own), variant of each phase
    assert axis_variants(2, 3) == (((-1, 0, 0), (0, 0, 1)), (0, 1))
    assert axis_variants(3, 3) == (((-1, 0, 0), (0, 0, 0), (0, 0, 1)), (0, 1, 2))
    assert axis_variants(5, 3) == (((-1, 0, 0), (0, 0, 0), (0, 0, 1)), (0, 1, 1, 1, 2))
    assert axis_variants(3, 1) == (((0,),), (0, 0, 0))
    assert axis_variants(2, 5) == (((-1, -1, 0, 0, 1), (-1, 0, 0, 1, 1)), (0, 1))


def test_reach():
    assert [reach(f, 3) for f in (2, 3, 5)] == [1, 1, 1]
    assert reach(3, 1) == 0
    assert reach(2, 5) == 1
    assert reach(2, 7) == 2


def test_collapse_sums_the_taps_of_a_cell():
    weight = np.array([1, 20, 300], np.float32)
    assert collapse(weight, (-1, 0, 0), 0).tolist() == [1, 320]
    assert collapse(weight, (0, 0, 0), 0).tolist() == [321]
    assert collapse(weight, (0, 0, 1), 0).tolist() == [21, 300]
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert collapse(matrix, (-1, 0, 0), 0).tolist() == [[0, 1], [6, 8]]


def test_cell_range():
    assert cell_range(0, 29, 3) == (0, 10)
    assert cell_range(0, 29, 5) == (0, 6)
    assert cell_range(4, 5, 5) == (0, 1)
    assert cell_range(5, 6, 5) == (1, 2)


def test_indices_of_a_small_box_are_literal():
    # Voxels 2, 3 along the first axis: phases 2 and 0 of cells 0 and 1; one voxel of phase 1 along
    # the others, in cell 0. Variants in C order: (2, 1, 1) is 2 * 9 + 4, (0, 1, 1) is 4.
    box = np.array([[2, 4], [1, 2], [1, 2]])
    variant, cell = box_indices(box, 3, 3)
    assert variant.tolist() == [22 * 2 + 0, 4 * 2 + 1]
    # With one cell of edge the cells are 4 x 3 x 3; cell 0 is (1, 1, 1) there.
    assert cell.tolist() == [13, 22]
    assert variant.dtype == cell.dtype == np.int32


def convolve(volume: np.ndarray, weight: np.ndarray) -> np.ndarray:
    sides = [n - weight.shape[0] + 1 for n in volume.shape]
    result = np.zeros(sides)
    for offset in itertools.product(range(weight.shape[0]), repeat=3):
        window = tuple(slice(o, o + n) for o, n in zip(offset, sides, strict=True))
        result += weight[offset] * volume[window]
    return result


@settings(max_examples=60, deadline=None)
@given(
    factor=st.integers(2, 6),
    kernel=st.sampled_from([1, 3, 5]),
    out=st.integers(1, 14),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_box_equals_repeating_padding_and_convolving(factor, kernel, out, seed, data):
    rng = np.random.default_rng(seed)
    cells = rng.integers(-9, 9, (-(-out // factor),) * 3).astype(np.float64)
    weight = rng.integers(-9, 9, (kernel,) * 3).astype(np.float32)
    repeated = cells
    for axis in range(3):
        repeated = np.repeat(repeated, factor, axis=axis).take(np.arange(out), axis=axis)
    expected = convolve(np.pad(repeated, kernel // 2, "edge"), weight)

    box = np.array([sorted(data.draw(st.permutations(range(out + 1)))[:2]) for _ in range(3)])
    edge = reach(factor, kernel)
    padded = np.pad(cells, edge, "edge")
    ranges = [cell_range(low, high, factor) for low, high in box.tolist()]
    variants, _ = axis_variants(factor, kernel)
    rows = []
    for chosen in itertools.product(variants, repeat=3):
        summed = weight
        for axis, one in enumerate(chosen):
            summed = collapse(summed, one, axis)
        for place in itertools.product(*(range(*bounds) for bounds in ranges)):
            window = tuple(
                slice(p + edge + min(one), p + edge + max(one) + 1)
                for p, one in zip(place, chosen, strict=True)
            )
            rows.append((summed * padded[window]).sum())
    variant, cell = box_indices(box, factor, kernel)
    where = tuple(slice(low, high) for low, high in box)
    np.testing.assert_array_equal(np.array(rows)[variant], expected[where].ravel())

    cut = padded[tuple(slice(a, b + 2 * edge) for a, b in ranges)]
    np.testing.assert_array_equal(cut.ravel()[cell], repeated[where].ravel())


@pytest.mark.parametrize("factor", [3, 5])
def test_multiply_adds_per_voxel_are_the_published_rewrite_or_fewer(factor):
    # The reference counts 4.63 taps a voxel for factor 3 and 2.74 for factor 5, per phase; sharing
    # variants between the phases of factor 5 leaves 125 taps a cell: 1 a voxel.
    variants, _ = axis_variants(factor, 3)
    taps = sum(
        np.prod([max(one) - min(one) + 1 for one in chosen])
        for chosen in itertools.product(variants, repeat=3)
    )
    assert taps == 125
