from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import shapes, small, specs
from trtseg import tiling
from trtseg.architecture import PUBLISHED, NetworkSpec
from trtseg.backends.fake import FakeNetwork

FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)
FILL = -1


def random_volume(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Where the tiles lie


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (1, [0]),
        (12, [0]),
        (28, [0]),
        (29, [0]),
        (30, [0, 1]),
        (45, [0, 16]),
        (57, [0, 28]),
        (58, [0, 29]),
        (59, [0, 29, 30]),
        (87, [0, 29, 58]),
        (105, [0, 29, 58, 76]),
        (121, [0, 29, 58, 87, 92]),
        (145, [0, 29, 58, 87, 116]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_published_starts_along_an_axis(length, starts, axis):
    shape = [20, 20, 20]
    shape[axis] = length
    plan = tiling.plan_tiles(tuple(shape), PUBLISHED)
    assert plan.starts[:, axis].tolist() == starts
    assert len(plan) == len(starts)


def test_the_first_axis_varies_fastest_and_the_third_slowest():
    plan = tiling.plan_tiles((30, 31, 59), PUBLISHED)
    assert plan.starts.tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 2, 0],
        [1, 2, 0],
        [0, 0, 29],
        [1, 0, 29],
        [0, 2, 29],
        [1, 2, 29],
        [0, 0, 30],
        [1, 0, 30],
        [0, 2, 30],
        [1, 2, 30],
    ]
    assert plan.starts.dtype == np.int32


def test_batches_keep_the_order_and_the_last_is_smaller():
    plan = tiling.plan_tiles((30, 31, 59), PUBLISHED)
    batches = list(plan.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate(batches), plan.starts)


# Padding


@pytest.mark.parametrize(
    ("length", "padding", "padded"),
    [
        (1, (8, 36), 45),
        (12, (8, 25), 45),
        (20, (8, 17), 45),
        (28, (8, 9), 45),
        (29, (8, 8), 45),
        (30, (8, 8), 46),
        (105, (8, 8), 121),
    ],
)
def test_published_padding(length, padding, padded):
    plan = tiling.plan_tiles((40, length, 50), PUBLISHED)
    assert plan.padding == ((8, 8), padding, (8, 8))
    assert plan.padded_shape == (56, padded, 66)


def test_padding_reflects_without_repeating_the_border():
    volume = np.arange(12, dtype=np.float32)[None, :, None]
    plan = tiling.plan_tiles(volume.shape, PUBLISHED)
    padded = tiling.pad(volume, plan)
    assert padded.shape == (45, 45, 45)
    assert padded.dtype == np.float32
    assert padded.flags.c_contiguous
    # fmt: off
    line = [
        8, 7, 6, 5, 4, 3, 2, 1,
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
        10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 10, 9, 8,
    ]
    # fmt: on
    for i, k in itertools.product((0, 8, 44), repeat=2):
        assert padded[i, :, k].tolist() == line


def test_padding_of_an_axis_much_shorter_than_the_margin():
    volume = np.arange(3, dtype=np.float32)[None, None, :]
    padded = tiling.pad(volume, tiling.plan_tiles(volume.shape, PUBLISHED))
    assert padded[0, 0].tolist() == [0, 1, 2, 1] * 11 + [0]


def reflected(position: int, length: int) -> int:
    """Scan index that padding shows at a position counted from the scan's first voxel."""
    if length == 1:
        return 0
    position %= 2 * (length - 1)
    return position if position < length else 2 * (length - 1) - position


@given(spec=specs(), shape=shapes)
@FEW
def test_padding_is_a_mirror_at_any_size(spec, shape):
    volume = random_volume(shape, 0)
    plan = tiling.plan_tiles(shape, spec)
    indices = [
        [reflected(p - spec.margin, n) for p in range(max(n + 2 * spec.margin, spec.tile))]
        for n in shape
    ]
    np.testing.assert_array_equal(tiling.pad(volume, plan), volume[np.ix_(*indices)])


# What lies outside the padded scan


def test_fill_is_the_mean_of_the_padded_corners():
    # Voxel (i, j, k) holds 10000 i + 100 j + k. The corners of the padded scan show i = 8 and 8,
    # j = 8 and 2, k = 8 and 26: means 8, 5 and 17.
    i, j, k = np.ogrid[:12, :20, :35]
    volume = (10000 * i + 100 * j + k).astype(np.float32)
    padded = tiling.pad(volume, tiling.plan_tiles(volume.shape, PUBLISHED))
    assert tiling.fill_value(padded) == 80517


def test_fill_uses_the_corners_only_and_double_precision():
    padded = np.full((3, 4, 5), np.nan, np.float32)
    padded[::2, ::3, ::4] = 1
    padded[2, 0, 4] = 2**24
    assert tiling.fill_value(padded) == (2**24 + 7) / 8


# What a pathway sees along one axis


def steps(first: int, last: int, step: int) -> list[int]:
    """From `first` to `last`, both included."""
    assert (last - first) % step == 0
    return list(range(first, last + 1, step))


# Start, padded length, indices. Low is start - 16 (factor 3) and start - 32 (factor 5).
FACTOR_3 = [
    (0, 45, [FILL] * 5 + steps(0, 42, 3) + [FILL] * 6),  # low -16, high 62
    (0, 46, [FILL] * 5 + steps(0, 45, 3) + [FILL] * 5),
    (0, 121, [FILL] * 5 + steps(0, 60, 3)),
    (1, 46, [FILL] * 5 + steps(0, 45, 3) + [FILL] * 5),  # low -15, high 63
    (2, 61, [FILL] * 4 + steps(0, 60, 3) + [FILL]),  # low -14, high 64
    (3, 121, [FILL] * 4 + steps(0, 63, 3)),  # low -13, high 65
    (15, 121, steps(0, 75, 3)),  # low -1, high 77: restarts at 0, no slot is fill
    (16, 121, steps(0, 75, 3)),  # low 0, high 78
    (29, 74, steps(13, 73, 3) + [FILL] * 5),  # low 13, high 91
    (29, 121, steps(13, 88, 3)),
    (58, 121, steps(42, 117, 3)),  # low 42, high 120
    (76, 121, steps(60, 120, 3) + [FILL] * 5),  # low 60, high 138
]
FACTOR_5 = [
    (0, 45, [FILL] * 6 + steps(0, 40, 5) + [FILL] * 7),  # low -32, high 78
    (0, 46, [FILL] * 6 + steps(0, 45, 5) + [FILL] * 6),
    (0, 121, [FILL] * 6 + steps(0, 75, 5)),
    (1, 46, [FILL] * 6 + steps(0, 45, 5) + [FILL] * 6),  # low -31, high 79
    (2, 61, [FILL] * 6 + steps(0, 60, 5) + [FILL] * 3),  # low -30, high 80
    (3, 121, [FILL] * 5 + steps(0, 80, 5)),  # low -29, high 81
    (27, 121, [FILL, *steps(0, 100, 5)]),  # low -5, high 105
    (29, 74, steps(0, 70, 5) + [FILL] * 7),  # low -3, high 107: restarts at 0
    (29, 121, steps(0, 105, 5)),
    (58, 121, steps(26, 116, 5) + [FILL] * 3),  # low 26, high 136
    (76, 121, steps(44, 119, 5) + [FILL] * 6),  # low 44, high 154
]


@pytest.mark.parametrize(
    ("factor", "slots", "start", "size", "indices"),
    [(3, 26, *case) for case in FACTOR_3] + [(5, 22, *case) for case in FACTOR_5],
)
def test_published_samples_along_an_axis(factor, slots, start, size, indices):
    found = tiling.axis_samples(start, size, factor, PUBLISHED)
    assert len(indices) == slots
    assert found.tolist() == indices


@pytest.mark.parametrize("start", [0, 1, 29, 76])
def test_the_normal_pathway_sees_the_tile(start):
    assert tiling.axis_samples(start, 121, 1, PUBLISHED).tolist() == steps(start, start + 44, 1)


def test_even_factors():
    spec = small(tile=9, layers=2, factors=(2, 4))  # receptive field 5, 5 voxels of result
    # Factor 2: low is start + 1, 7 slots. Factor 4: low is start + 2 - 5, 6 slots.
    assert tiling.axis_samples(0, 9, 2, spec).tolist() == [1, 3, 5, 7, FILL, FILL, FILL]
    assert tiling.axis_samples(0, 20, 2, spec).tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert tiling.axis_samples(0, 9, 4, spec).tolist() == [0, 4, 8, FILL, FILL, FILL]
    assert tiling.axis_samples(5, 20, 4, spec).tolist() == [2, 6, 10, 14, 18, FILL]


# Gathering


def naive_input(
    padded: np.ndarray, start: np.ndarray, factor: int, field: int, out: int
) -> np.ndarray:
    """One tile's input of one pathway, voxel by voxel, from the description of the method."""
    corners = [float(padded[c]) for c in itertools.product((0, -1), repeat=3)]
    side = field - 1 + (out + factor - 1) // factor
    result = np.full((side,) * 3, sum(corners) / 8, np.float32)
    pairs = []  # per axis: (slot, index in the padded scan)
    for begin, size in zip(start.tolist(), padded.shape, strict=True):
        low = begin + factor // 2 - ((factor - 1) // 2) * field
        high = low + field * factor + ((out + factor - 1) // factor - 1) * factor
        slot = 0 if low >= 0 else abs(low) // factor
        index = max(low, 0)
        line = []
        while index < min(high, size):
            line.append((slot, index))
            slot, index = slot + 1, index + factor
        pairs.append(line)
    for (a, i), (b, j), (c, k) in itertools.product(*pairs):
        result[a, b, c] = padded[i, j, k]
    return result


@given(spec=specs(), shape=shapes, data=st.data())
@FEW
def test_gather_is_the_naive_sampling(spec, shape, data):
    plan = tiling.plan_tiles(shape, spec)
    padded = tiling.pad(random_volume(shape, 1), plan)
    chosen = data.draw(st.lists(st.integers(0, len(plan) - 1), min_size=1, max_size=2))
    starts = plan.starts[chosen]
    inputs = tiling.gather(padded, starts, spec)
    assert list(inputs) == [pathway.name for pathway in spec.pathways]
    for pathway in spec.pathways:
        found = inputs[pathway.name]
        side = spec.input_sizes()[pathway.name]
        assert found.shape == (len(starts), 1, side, side, side)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        for tile, start in enumerate(starts):
            expected = naive_input(padded, start, pathway.factor, spec.receptive_field, spec.out)
            np.testing.assert_array_equal(found[tile, 0], expected)


@pytest.mark.parametrize("shape", [(1, 12, 29), (30, 45, 60)])
def test_gather_is_the_naive_sampling_for_the_published_networks(shape):
    plan = tiling.plan_tiles(shape, PUBLISHED)
    padded = tiling.pad(random_volume(shape, 2), plan)
    starts = plan.starts[[0, -1]]
    inputs = tiling.gather(padded, starts, PUBLISHED)
    for name, factor in (("normal", 1), ("sub3", 3), ("sub5", 5)):
        for tile, start in enumerate(starts):
            expected = naive_input(padded, start, factor, 17, 29)
            np.testing.assert_array_equal(inputs[name][tile, 0], expected)


def test_gather_leaves_the_padded_scan_alone():
    plan = tiling.plan_tiles((30, 12, 5), PUBLISHED)
    padded = tiling.pad(random_volume((30, 12, 5), 3), plan)
    before = padded.copy()
    inputs = tiling.gather(padded, plan.starts, PUBLISHED)
    for batch in inputs.values():
        batch[...] = 0
    np.testing.assert_array_equal(padded, before)


# Stitching


def owners(shape: tuple[int, int, int], spec: NetworkSpec) -> np.ndarray:
    """Which tile's result stands at each voxel."""
    plan = tiling.plan_tiles(shape, spec)
    volume = np.full(shape, -1, np.int32)
    for tile, start in enumerate(plan.starts):
        tiling.stitch(volume, start, np.full((spec.out,) * 3, tile, np.int32))
    return volume


# Receptive field 3, 3 voxels of result: starts 0, 2 on an axis of 5 voxels and 0, 1 on one of 4.
OWNERS = [
    [0, 2, 2, 2],
    [0, 2, 2, 2],
    [1, 3, 3, 3],
    [1, 3, 3, 3],
    [1, 3, 3, 3],
]


def test_later_tiles_overwrite_earlier_ones():
    spec = small(tile=5)
    assert owners((5, 4, 1), spec)[:, :, 0].tolist() == OWNERS
    assert owners((5, 1, 4), spec)[:, 0, :].tolist() == OWNERS
    assert owners((1, 5, 4), spec)[0].tolist() == OWNERS


def test_every_axis_of_several_tiles():
    found = owners((4, 4, 4), small(tile=5))
    first = [[0, 2, 2, 2], [1, 3, 3, 3], [1, 3, 3, 3], [1, 3, 3, 3]]
    assert found[:, :, 0].tolist() == first
    for k in (1, 2, 3):
        assert found[:, :, k].tolist() == [[4 + owner for owner in row] for row in first]


def test_stitch_places_a_result_at_its_start_and_drops_padding():
    volume = np.zeros((5, 2, 4), np.int16)
    result = np.arange(1, 28, dtype=np.int16).reshape(3, 3, 3)
    tiling.stitch(volume, np.array([2, 0, 1], np.int32), result)
    expected = np.zeros((5, 2, 4), np.int16)
    expected[2:5, 0:2, 1:4] = [
        [[1, 2, 3], [4, 5, 6]],
        [[10, 11, 12], [13, 14, 15]],
        [[19, 20, 21], [22, 23, 24]],
    ]
    np.testing.assert_array_equal(volume, expected)


@given(spec=specs(), shape=shapes)
@FEW
def test_every_voxel_has_an_owner(spec, shape):
    assert owners(shape, spec).min() >= 0


# Blocks of tiles


def blocks(plan: tiling.TilePlan, max_voxels: int) -> list[tuple[list[int], list[list[int]]]]:
    found = tiling.group_tiles(plan, np.arange(len(plan)), max_voxels=max_voxels)
    return [(block.tiles.tolist(), block.region.tolist()) for block in found]


@pytest.mark.parametrize(
    ("max_voxels", "expected"),
    [
        (87 * 841, [([0, 1, 2], [0, 87])]),
        (87 * 841 - 1, [([0], [0, 29]), ([1, 2], [29, 87])]),
        (58 * 841, [([0], [0, 29]), ([1, 2], [29, 87])]),
        (58 * 841 - 1, [([0], [0, 29]), ([1], [29, 58]), ([2], [58, 87])]),
        (1, [([0], [0, 29]), ([1], [29, 58]), ([2], [58, 87])]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_block_that_is_too_large_is_halved(max_voxels, expected, axis):
    shape, other = [29, 29, 29], [[0, 29]] * 3
    shape[axis] = 87
    plan = tiling.plan_tiles(tuple(shape), PUBLISHED)
    wanted = [(tiles, [*other[:axis], span, *other[axis + 1 :]]) for tiles, span in expected]
    assert blocks(plan, max_voxels) == wanted


def test_a_block_is_halved_along_its_longest_axis():
    # Tiles start at 0, 29 and 58, and at 0 and 16: what lies beyond 16 is the second one's.
    plan = tiling.plan_tiles((87, 45, 29), PUBLISHED)
    assert blocks(plan, 58 * 45 * 29) == [
        ([0, 3], [[0, 29], [0, 45], [0, 29]]),
        ([1, 2, 4, 5], [[29, 87], [0, 45], [0, 29]]),
    ]
    # One more voxel than a box on each side, for the first FC layer's kernel, within the tile.
    assert blocks(plan, 1)[:2] == [
        ([0], [[0, 29], [0, 17], [0, 29]]),
        ([3], [[0, 29], [16, 45], [0, 29]]),
    ]


def test_a_block_is_no_larger_than_its_boxes_need():
    roi = np.zeros((87, 29, 29), bool)
    roi[40:44, 5, 7:9] = True
    plan = tiling.plan_tiles(roi.shape, PUBLISHED, roi)
    assert blocks(plan, 1) == [([0], [[39, 45], [4, 7], [6, 10]])]
    assert list(tiling.group_tiles(plan, np.arange(0), max_voxels=1)) == []


@given(spec=specs(), shape=shapes, max_voxels=st.integers(1, 5000), seed=st.integers(0, 9))
@FEW
def test_blocks_hold_every_tile_once_and_no_more_voxels_than_asked(spec, shape, max_voxels, seed):
    roi = np.random.default_rng(seed).random(shape) < 0.1
    plan = tiling.plan_tiles(shape, spec, roi)
    found = list(tiling.group_tiles(plan, np.arange(len(plan)), max_voxels=max_voxels))
    tiles = [tile for block in found for tile in block.tiles]
    assert sorted(tiles) == list(range(len(plan)))
    for block in found:
        low, high = block.region.T
        assert len(block.tiles) == 1 or np.prod(high - low) <= max_voxels
        assert (plan.boxes[block.tiles, :, 0] >= low).all()
        assert (plan.boxes[block.tiles, :, 1] <= high).all()


# Round trip: padding, gathering and stitching undo each other


@given(
    spec=specs(), shape=shapes, seed=st.integers(0, 99), threshold=st.sampled_from([-0.5, 0, 0.1])
)
@FEW
def test_round_trip(spec, shape, seed, threshold):
    volume = random_volume(shape, seed)
    output = FakeNetwork(spec, threshold).run(volume, tiling.plan_tiles(shape, spec))
    np.testing.assert_array_equal(output.labels, volume > np.float32(threshold))


@pytest.mark.parametrize("shape", [(1, 12, 29), (30, 45, 58), (70, 20, 31)])
def test_round_trip_of_the_published_tiling(shape):
    volume = random_volume(shape, 4)
    output = FakeNetwork(PUBLISHED).run(volume, tiling.plan_tiles(shape, PUBLISHED))
    np.testing.assert_array_equal(output.labels, volume > 0)


def random_roi(shape: tuple[int, ...], seed: int, kept: float) -> np.ndarray:
    """Scattered voxels and a box."""
    rng = np.random.default_rng(seed)
    roi = rng.random(shape) < kept
    ends = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
    roi[tuple(slice(low, (low + high) // 2) for low, high in ends)] = True
    return roi


rois = st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0]))


@given(spec=specs(), shape=shapes, roi=rois)
@FEW
def test_round_trip_inside_a_roi(spec, shape, roi):
    volume = random_volume(shape, 5)
    inside = random_roi(shape, *roi)
    output = FakeNetwork(spec).run(volume, tiling.plan_tiles(shape, spec, inside))
    np.testing.assert_array_equal(output.labels[inside], volume[inside] > 0)


# Regions of interest


def test_tiles_of_a_roi_are_a_literal_few():
    roi = np.zeros((30, 31, 59), bool)
    roi[0, 0, 58] = True
    assert tiling.plan_tiles(roi.shape, PUBLISHED, roi).starts.tolist() == [[0, 0, 30]]
    roi[29, 30, 0] = True
    assert tiling.plan_tiles(roi.shape, PUBLISHED, roi).starts.tolist() == [[1, 2, 0], [0, 0, 30]]
    roi[5, 5, 40] = True
    roi[7, 2, 41] = True
    plan = tiling.plan_tiles(roi.shape, PUBLISHED, roi)
    assert plan.starts.tolist() == [[1, 2, 0], [0, 0, 30], [1, 2, 30]]
    assert plan.boxes.tolist() == [
        [[29, 30], [30, 31], [0, 1]],
        [[0, 1], [0, 1], [58, 59]],
        [[5, 8], [2, 6], [40, 42]],
    ]


def test_what_each_tile_decides_is_a_literal_table():
    plan = tiling.plan_tiles((30, 12, 105), PUBLISHED)
    assert plan.starts.tolist() == [
        [0, 0, 0], [1, 0, 0], [0, 0, 29], [1, 0, 29],
        [0, 0, 58], [1, 0, 58], [0, 0, 76], [1, 0, 76],
    ]  # fmt: skip
    assert plan.boxes[:, 0].tolist() == [[0, 1], [1, 30]] * 4
    assert plan.boxes[:, 1].tolist() == [[0, 12]] * 8
    assert plan.boxes[::2, 2].tolist() == [[0, 29], [29, 58], [58, 76], [76, 105]]


@given(spec=specs(), shape=shapes, roi=rois)
@FEW
def test_boxes_are_what_stitching_leaves_of_each_tile(spec, shape, roi):
    inside = random_roi(shape, *roi)
    plan = tiling.plan_tiles(shape, spec, inside)
    last = np.full(shape, -1)
    boxed = np.full(shape, -1)
    for tile, (start, box) in enumerate(zip(plan.starts, plan.boxes, strict=True)):
        tiling.stitch(last, start, np.full((spec.out,) * 3, tile))
        where = tuple(slice(low, high) for low, high in box)
        assert (boxed[where] == -1).all()
        boxed[where] = tile
    np.testing.assert_array_equal(boxed[inside], last[inside])


def test_an_empty_roi_plans_nothing():
    plan = tiling.plan_tiles((30, 31, 59), PUBLISHED, np.zeros((30, 31, 59), bool))
    assert len(plan) == 0
    assert plan.starts.shape == (0, 3)
    assert list(plan.batches(5)) == []
    labels = FakeNetwork(PUBLISHED).run(np.ones((30, 31, 59), np.float32), plan).labels
    assert not labels.any()


@given(spec=specs(), shape=shapes, roi=rois)
@FEW
def test_roi_gives_the_masked_result_of_the_published_rule(spec, shape, roi):
    """The published system leaves a tile out if its whole input holds no voxel of the ROI."""
    inside = random_roi(shape, *roi)
    everywhere = tiling.plan_tiles(shape, spec)
    padded = np.pad(inside, everywhere.padding, "reflect")
    published = [
        start
        for start in everywhere.starts.tolist()
        if padded[tuple(slice(s, s + spec.tile) for s in start)].any()
    ]
    ours = tiling.plan_tiles(shape, spec, inside)
    assert ours.padding == everywhere.padding
    planned = ours.starts.tolist()
    assert planned == [start for start in published if start in planned]
    assert masked_owners(planned, inside, spec) == masked_owners(published, inside, spec)


def masked_owners(
    starts: list[list[int]], inside: np.ndarray, spec: NetworkSpec
) -> list[list[int]]:
    """Start of the tile that wrote each voxel of the ROI, in C order."""
    volumes = [np.full(inside.shape, -1) for _ in range(3)]
    for start in starts:
        for volume, coordinate in zip(volumes, start, strict=True):
            tiling.stitch(volume, np.array(start), np.full((spec.out,) * 3, coordinate))
    written = np.stack([volume[inside] for volume in volumes], axis=-1)
    assert (written >= 0).all()
    return written.tolist()
