"""The kernels, compiled for the host, against the code they restate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.cuda.host_device import HostDevice, view
from tests.specs import shapes, small, specs
from trtseg import tiling
from trtseg.architecture import PUBLISHED
from trtseg.backends.base import logistic
from trtseg.cuda import launches
from trtseg.normalise import z_score
from trtseg.scan import Geometry, Scan

FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)
TYPES = launches.VOXEL_TYPES
INTEGERS = [name for name in TYPES if "int" in name]


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


seeds = st.integers(0, 99)


def volume_of(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def voxels_of(dtype: str, shape: tuple[int, ...], seed: int) -> NDArray:
    """Voxels over the whole range of an integer type, or normally distributed."""
    rng = np.random.default_rng(seed)
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return (1000 * rng.standard_normal(shape) + 300).astype(dtype)


def summarised(device: HostDevice, voxels: NDArray) -> tuple[int, dict[str, float]]:
    """The device's statistics: where they lie, and what they are."""
    summary = device.put(np.zeros(len(launches.SUMMARY)))
    device.run(
        *launches.statistics(
            voxels=device.put(voxels),
            dtype=voxels.dtype.name,
            count=voxels.size,
            partials=device.put(np.empty(launches.PARTIALS_BYTES, np.uint8)),
            summary=summary,
        )
    )
    found = device.get(summary, np.float64, len(launches.SUMMARY))
    return summary, dict(zip(launches.SUMMARY, found.tolist(), strict=True))


def padded_by_device(
    device: HostDevice, voxels: NDArray, plan: tiling.TilePlan, summary: int | None
) -> NDArray[np.float32]:
    padded = device.put(np.empty(plan.padded_shape, np.float32))
    device.run(
        launches.normalise(
            voxels=device.put(voxels),
            dtype=voxels.dtype.name,
            strides=[stride // voxels.itemsize for stride in voxels.strides],
            padded=padded,
            plan=plan,
            summary=summary,
        )
    )
    return device.get(padded, np.float32, plan.padded_shape)


# Statistics


@pytest.mark.parametrize("dtype", TYPES)
def test_mean_and_deviation(device, dtype):
    voxels = voxels_of(dtype, (61, 53, 47), 3)  # more voxels than threads
    _, found = summarised(device, voxels)
    exact = voxels.astype(np.float64)
    assert found["mean"] == pytest.approx(exact.mean(), rel=1e-10)
    assert found["deviation"] == pytest.approx(exact.std(), rel=1e-10)
    assert found["varied"] > 0


def test_statistics_of_a_hand_computed_scan(device):
    _, found = summarised(device, np.array([[[2, 4, 4, 4, 5, 5, 7, 9]]], np.int16))
    assert found == {
        "mean": 5,
        "deviation": 2,
        "varied": found["varied"],
        "not_finite": 0,
        "brain": 0,
        "cortex": 0,
    }


def test_a_large_offset_costs_no_precision(device):
    """Two passes: squares of the raw values would lose all digits of the deviation."""
    voxels = np.full((40, 40, 40), 10**9, np.int32)
    voxels[::2] += 1
    _, found = summarised(device, voxels)
    assert found["mean"] == 10**9 + 0.5
    assert found["deviation"] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_constant_scan_is_seen(device, dtype):
    voxels = np.full((5, 6, 7), 113, dtype)
    assert summarised(device, voxels)[1]["varied"] == 0
    voxels[4, 5, 6] = 112
    assert summarised(device, voxels)[1]["varied"] > 0


def test_neighbours_that_a_double_cannot_tell_apart_are_not_constant(device):
    voxels = np.array([[[2**62, 2**62 + 1]]], np.int64)
    assert summarised(device, voxels)[1]["varied"] > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_voxel_that_is_not_finite_spoils_the_mean(device, dtype, value):
    voxels = voxels_of(dtype, (9, 8, 7), 1)
    voxels[4, 4, 4] = value
    assert not np.isfinite(summarised(device, voxels)[1]["mean"])


def test_statistics_are_the_same_bits_every_time(device):
    voxels = voxels_of("float64", (70, 41, 33), 5)
    first, second = summarised(device, voxels)[1], summarised(device, voxels)[1]
    assert first == second


def test_one_voxel(device):
    _, found = summarised(device, np.array([[[7.5]]], np.float32))
    assert (found["mean"], found["deviation"], found["varied"]) == (7.5, 0, 0)


# z-score and padding


@given(
    spec=specs(),
    shape=shapes.filter(lambda shape: np.prod(shape) > 1),
    dtype=st.sampled_from(TYPES),
    order=st.sampled_from("CF"),
    seed=seeds,
)
@FEW
def test_z_scores_are_the_cpus(spec, shape, dtype, order, seed):
    device = HostDevice()
    voxels = np.asarray(voxels_of(dtype, shape, seed), order=order)
    plan = tiling.plan_tiles(shape, spec)
    if voxels.min() == voxels.max():
        return
    expected = tiling.pad(z_score(Scan(voxels, Geometry(np.eye(4), {}))).data, plan)
    summary, _ = summarised(device, voxels)
    found = padded_by_device(device, voxels, plan, summary)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@given(spec=specs(), shape=shapes, order=st.sampled_from("CF"), seed=seeds)
@FEW
def test_padding_alone_changes_no_bit(spec, shape, order, seed):
    scores = np.asarray(volume_of(shape, seed), order=order)
    plan = tiling.plan_tiles(shape, spec)
    found = padded_by_device(HostDevice(), scores, plan, None)
    np.testing.assert_array_equal(found, tiling.pad(scores, plan))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 29), (3, 9, 30), (17, 46, 5)])
def test_published_padding(device, shape):
    scores = volume_of(shape)
    plan = tiling.plan_tiles(shape, PUBLISHED)
    found = padded_by_device(device, scores, plan, None)
    np.testing.assert_array_equal(found, tiling.pad(scores, plan))


# Gathering


def gathered(
    device: HostDevice, padded: NDArray[np.float32], plan: tiling.TilePlan, first: int, batch: int
) -> dict[str, NDArray[np.float32]]:
    source, tiles = device.put(padded), device.put(launches.tile_table(plan))
    inputs = {}
    for pathway in plan.spec.pathways:
        side = plan.spec.input_size(pathway)
        target = device.put(np.empty((batch, 1, side, side, side), np.float32))
        device.run(
            launches.gather(
                padded=source,
                tiles=tiles,
                target=target,
                plan=plan,
                pathway=pathway,
                first=first,
                batch=batch,
            )
        )
        inputs[pathway.name] = device.get(target, np.float32, (batch, 1, side, side, side))
    return inputs


def assert_same_inputs(found, expected):
    assert list(found) == list(expected)
    for name, one in expected.items():
        np.testing.assert_array_equal(found[name], one)


@given(spec=specs(), shape=shapes, seed=seeds, data=st.data())
@FEW
def test_gather_is_the_tilings(spec, shape, seed, data):
    plan = tiling.plan_tiles(shape, spec)
    padded = tiling.pad(volume_of(shape, seed), plan)
    first = data.draw(st.integers(0, len(plan) - 1))
    batch = data.draw(st.integers(1, 3))
    found = gathered(HostDevice(), padded, plan, first, batch)
    rows = np.minimum(np.arange(first, first + batch), len(plan) - 1)
    assert_same_inputs(found, tiling.gather(padded, plan.starts[rows], spec))


@pytest.mark.parametrize("shape", [(1, 12, 29), (30, 45, 60), (61, 30, 88)])
def test_gather_of_the_published_networks(device, shape):
    plan = tiling.plan_tiles(shape, PUBLISHED)
    padded = tiling.pad(volume_of(shape), plan)
    found = gathered(device, padded, plan, len(plan) - 2 if len(plan) > 1 else 0, 2)
    starts = plan.starts[[-2, -1] if len(plan) > 1 else [0, 0]]
    assert_same_inputs(found, tiling.gather(padded, starts, PUBLISHED))


def test_what_lies_beyond_the_padding_is_the_corners_mean(device):
    shape = (12, 20, 35)
    i, j, k = np.ogrid[:12, :20, :35]
    plan = tiling.plan_tiles(shape, PUBLISHED)
    padded = tiling.pad((10000 * i + 100 * j + k).astype(np.float32), plan)
    assert gathered(device, padded, plan, 0, 1)["sub5"][0, 0, 0, 0, 0] == 80517


@pytest.mark.parametrize("side", [528, 1320])
def test_indices_of_large_scans(device, tmp_path, side):
    """528: a padded scan of 512. 1320: more voxels than 31 bits count."""
    plan = tiling.plan_tiles((side - 16,) * 3, PUBLISHED)
    assert plan.padded_shape == (side,) * 3
    # A file of holes: what is never written takes neither memory nor disk.
    padded = np.memmap(tmp_path / "padded", np.float32, "w+", shape=plan.padded_shape)
    padded[side - 1, side - 45, side - 3] = 5
    padded[-1, -1, -1] = 8
    tiles = device.put(launches.tile_table(plan))
    for pathway, slot, value in (
        (PUBLISHED.pathways[0], (44, 0, 42), 5),
        (PUBLISHED.pathways[2], (21, 21, 21), 1),  # beyond the padding
    ):
        width = PUBLISHED.input_size(pathway)
        target = device.put(np.empty((1, 1, width, width, width), np.float32))
        device.run(
            launches.gather(
                padded=padded.ctypes.data,
                tiles=tiles,
                target=target,
                plan=plan,
                pathway=pathway,
                first=len(plan) - 1,
                batch=1,
            )
        )
        assert device.get(target, np.float32, (width, width, width))[slot] == value


# Scattering


def scattered(
    device: HostDevice,
    plan: tiling.TilePlan,
    logits: NDArray[np.float32],
    *,
    batch: int,
    probabilities: bool = True,
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, bool]:
    """Labels, probabilities, and whether something was not finite; 9 where nothing is written."""
    labels = device.put(np.full(plan.shape, 9, np.uint8))
    maps = device.put(np.full(plan.shape, 9, np.float32)) if probabilities else None
    summary = device.put(np.zeros(len(launches.SUMMARY)))
    tiles = device.put(launches.tile_table(plan))
    # What a batch computes beyond the plan is rubbish that must go nowhere.
    rubbish = np.full((batch, *logits.shape[1:]), np.nan, np.float32)
    source = device.put(np.concatenate([logits, rubbish]))
    device.run(
        *(
            launches.scatter(
                logit=source + first * logits[:1].nbytes,
                tiles=tiles,
                labels=labels,
                probabilities=maps,
                summary=summary,
                plan=plan,
                first=first,
                batch=batch,
            )
            for first in range(0, len(plan), batch)
        )
    )
    found = device.get(labels, np.uint8, plan.shape)
    written = None if maps is None else device.get(maps, np.float32, plan.shape)
    numbers = device.get(summary, np.float64, len(launches.SUMMARY))
    return found, written, bool(numbers[launches.SUMMARY.index("not_finite")])


@given(spec=specs(), shape=shapes, seed=seeds, batch=st.integers(1, 4))
@FEW
def test_scatter_leaves_what_stitching_in_order_leaves(spec, shape, seed, batch):
    plan = tiling.plan_tiles(shape, spec)
    logits = 5 * volume_of((len(plan), *[spec.out] * 3), seed)
    labels = np.full(shape, 9, np.uint8)
    maps = np.full(shape, 9, np.float32)
    for start, one in zip(plan.starts, logits, strict=True):
        tiling.stitch(labels, start, one > 0)
        tiling.stitch(maps, start, logistic(one))
    found, written, spoiled = scattered(HostDevice(), plan, logits, batch=batch)
    np.testing.assert_array_equal(found, labels)
    np.testing.assert_allclose(written, maps, rtol=0, atol=1e-6)
    assert not spoiled


def random_roi(shape: tuple[int, ...], seed: int, kept: float) -> NDArray[np.bool_]:
    """Scattered voxels and a box."""
    rng = np.random.default_rng(seed)
    roi = rng.random(shape) < kept
    ends = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
    roi[tuple(slice(low, (low + high) // 2) for low, high in ends)] = True
    return roi


rois = st.tuples(seeds, st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0]))


@given(spec=specs(), shape=shapes, roi=rois, batch=st.integers(1, 4))
@FEW
def test_scatter_writes_the_boxes_and_nothing_else(spec, shape, roi, batch):
    plan = tiling.plan_tiles(shape, spec, random_roi(shape, *roi))
    logits = volume_of((len(plan), *[spec.out] * 3), 1)
    expected = np.full(shape, 9, np.uint8)
    for start, box, one in zip(plan.starts, plan.boxes, logits, strict=True):
        where = tuple(slice(low, high) for low, high in box)
        expected[where] = one[tuple(slice(*(box[axis] - start[axis])) for axis in range(3))] > 0
    found, written, _ = scattered(HostDevice(), plan, logits, batch=batch, probabilities=False)
    np.testing.assert_array_equal(found, expected)
    assert written is None


def test_a_tie_is_class_0_and_extremes_have_probabilities(device):
    plan = tiling.plan_tiles((1, 1, 6), small(tile=8, factors=()))
    logits = np.zeros((1, 6, 6, 6), np.float32)
    logits[0, 0, 0] = [0, 1e-30, -1e-30, 200, -200, 2]
    labels, maps, spoiled = scattered(device, plan, logits, batch=1)
    assert labels[0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(maps[0, 0], [0.5, 0.5, 0.5, 1, 0, 0.8807971], atol=1e-6)
    assert not spoiled


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_told(device, value):
    plan = tiling.plan_tiles((4, 4, 9), small(tile=8, factors=()))
    logits = volume_of((len(plan), 6, 6, 6))
    logits[0, 5, 5, 5] = value  # what this tile's result holds there lies outside the scan
    assert not scattered(device, plan, logits, batch=2)[2]
    logits[1, 2, 3, 4] = value
    assert scattered(device, plan, logits, batch=2)[2]


# Labels


@pytest.mark.parametrize("probabilities", [True, False])
def test_gate(device, probabilities):
    mask = np.array([0, 1, 2, 0, 255], np.uint8)
    labels = device.put(np.array([1, 1, 1, 0, 0], np.uint8))
    maps = device.put(np.array([0.9, 0.8, 0.7, 0.2, 0.1], np.float32))
    device.run(
        launches.gate(
            mask=device.put(mask),
            labels=labels,
            probabilities=maps if probabilities else None,
            count=5,
        )
    )
    assert device.get(labels, np.uint8, 5).tolist() == [0, 1, 1, 0, 0]
    expected = [0, 0.8, 0.7, 0, 0.1] if probabilities else [0.9, 0.8, 0.7, 0.2, 0.1]
    np.testing.assert_array_equal(device.get(maps, np.float32, 5), np.array(expected, np.float32))


@pytest.mark.parametrize("count", [1, 255, 256, 70_001, 300_000])
def test_count(device, count):
    labels = (np.random.default_rng(2).random(count) < 0.3).astype(np.uint8)
    labels[-1] = 1
    result = device.put(np.zeros(1))
    device.run(
        *launches.count_labels(
            labels=device.put(labels),
            count=count,
            partials=device.put(np.empty(launches.PARTIALS_BYTES, np.uint8)),
            result=result,
        )
    )
    assert device.get(result, np.float64, 1)[0] == int(labels.sum())


# Region of interest


def region_of(device: HostDevice, full: tiling.TilePlan, roi: NDArray[np.bool_]) -> NDArray:
    boxes = device.put(np.empty((len(full), 3, 2), np.int32))
    device.run(
        *launches.region(
            mask=device.put(roi.astype(np.uint8)),
            tiles=device.put(launches.tile_table(full)),
            planes=device.put(np.empty(launches.planes_bytes(full), np.uint8)),
            boxes=boxes,
            plan=full,
        )
    )
    return device.get(boxes, np.int32, (len(full), 3, 2))


def assert_same_plan(found: tiling.TilePlan, expected: tiling.TilePlan) -> None:
    assert (found.spec, found.shape, found.padding) == (
        expected.spec,
        expected.shape,
        expected.padding,
    )
    for one, other in ((found.starts, expected.starts), (found.boxes, expected.boxes)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@given(spec=specs(), shape=shapes, roi=rois)
@FEW
def test_a_regions_plan_is_the_tilings(spec, shape, roi):
    inside = random_roi(shape, *roi)
    full = tiling.plan_tiles(shape, spec)
    found = launches.planned(full, region_of(HostDevice(), full, inside))
    assert_same_plan(found, tiling.plan_tiles(shape, spec, inside))


@pytest.mark.parametrize("seed", range(3))
def test_a_regions_plan_for_the_published_networks(device, seed):
    shape = (61, 30, 88)
    inside = random_roi(shape, seed, 1e-4)
    full = tiling.plan_tiles(shape, PUBLISHED)
    found = launches.planned(full, region_of(device, full, inside))
    assert_same_plan(found, tiling.plan_tiles(shape, PUBLISHED, inside))


def test_no_region_has_no_tiles(device):
    full = tiling.plan_tiles((20, 20, 40), PUBLISHED)
    boxes = region_of(device, full, np.zeros(full.shape, bool))
    assert not boxes.any()
    assert len(launches.planned(full, boxes)) == 0


# What is read as it is


@pytest.mark.parametrize("dtype", TYPES)
def test_voxels_are_read_as_they_are(dtype):
    voxels = np.ones((2, 2, 2), dtype)
    assert launches.readable(voxels) is voxels


@pytest.mark.parametrize(("dtype", "wider"), [("float16", "float32"), ("longdouble", "float64")])
def test_other_voxels_are_converted(dtype, wider):
    found = launches.readable(np.array([[[0.5, 3]]], dtype))
    assert found.dtype == wider
    assert found.ravel().tolist() == [0.5, 3]


def test_voxels_of_the_other_byte_order_are_converted():
    voxels = np.array([[[1, 256]]], np.dtype(np.int16).newbyteorder())
    found = launches.readable(voxels)
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, voxels)


def test_sizes_of_the_published_tensors():
    assert launches.input_bytes(PUBLISHED, 2) == {
        "normal": 2 * 364500,
        "sub3": 2 * 70304,
        "sub5": 2 * 42592,
        "logit": 2 * 97556,
    }


def test_memory_seen_through_an_address_is_not_copied():
    array = np.arange(6, dtype=np.int16)
    view(array.ctypes.data, np.int16, (2, 3))[1, 2] = 40
    assert array[5] == 40
