"""The chain of steps on the host double of a device, against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.cuda.executors import (
    OTHER,
    SPEC,
    Function,
    FunctionExecutor,
    assert_labels,
    mixed,
    on_cpu,
    scan_of,
    scores_of,
    threshold,
)
from tests.cuda.host_device import HostDevice
from tests.golden import golden_scan, read_golden
from trtseg import tiling
from trtseg.architecture import NetworkSpec
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.cuda.chain import DEPTH, STAGES, Chain
from trtseg.cuda.device import OutOfDeviceMemory
from trtseg.engine import load_engine
from trtseg.errors import DeviceError, EngineError, InputError
from trtseg.nifti import read_scan

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice()
    with device.active():
        yield device
    device.close()


def networks(
    device: HostDevice,
    *,
    bdn: Function | None = None,
    cgm: Function | None = None,
    specs: tuple[NetworkSpec, NetworkSpec] = (SPEC, SPEC),
    batch: int = 4,
) -> tuple[FunctionExecutor, FunctionExecutor]:
    functions = (bdn or mixed(specs[0]), cgm or mixed(specs[1], 0.3))
    return tuple(
        FunctionExecutor(device, net, spec, batch, function)
        for net, spec, function in zip(("bdn", "cgm"), specs, functions, strict=True)
    )


# The whole chain


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", "float64", "uint64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_chain_is_the_cpus(device, dtype, order):
    raw = scan_of((14, 6, 17), dtype=dtype, order=order)
    bdn, cgm = networks(device)
    output = Chain(device).segment(raw, bdn, cgm, probabilities=True)
    scores = scores_of(raw)
    brain = on_cpu(bdn.function, SPEC, scores)
    roi = output.brain.labels.astype(bool)
    cortex = on_cpu(cgm.function, SPEC, scores, roi)
    assert_labels(output.brain.labels, brain)
    np.testing.assert_allclose(output.brain.probabilities, brain, atol=1e-5)
    assert_labels(output.cortex.labels, cortex)
    np.testing.assert_allclose(output.cortex.probabilities, cortex, atol=1e-5)
    assert 0 < output.cortex_voxels < output.brain_voxels < raw.size
    assert output.brain_voxels == output.brain.labels.sum()
    assert output.cortex_voxels == output.cortex.labels.sum()
    for one in (output.brain, output.cortex):
        assert one.labels.dtype == np.uint8
        assert one.probabilities.dtype == np.float32
        assert one.labels.shape == one.probabilities.shape == raw.shape


@given(
    shape=st.tuples(*[st.integers(1, 17)] * 3).filter(lambda shape: np.prod(shape) > 9),
    batch=st.sampled_from([1, 3, 16]),
    specs=st.sampled_from([(SPEC, SPEC), (SPEC, OTHER), (OTHER, SPEC)]),
    seed=st.integers(0, 99),
)
@FEW
def test_chain_of_any_shape(shape, batch, specs, seed):
    device = HostDevice()
    raw = scan_of(shape, seed=seed)
    bdn, cgm = networks(device, specs=specs, batch=batch, cgm=threshold(specs[1], 0.4))
    with device.active():
        output = Chain(device).segment(raw, bdn, cgm)
    scores = scores_of(raw)
    assert_labels(output.brain.labels, on_cpu(bdn.function, specs[0], scores))
    inside = output.brain.labels.astype(bool)
    np.testing.assert_array_equal(output.cortex.labels, inside & (scores > 0.4))
    assert output.brain.probabilities is None
    assert output.cortex.probabilities is None


def test_golden(device, engines_root):
    """DeepMedic's own maps, with the CPU's networks between the device's kernels."""
    backend = OpenVINOBackend()

    def executor(net):
        network = backend.load(load_engine(engines_root, "random11", net))

        def logits(inputs):
            return network.tile_logits({name: one[None, None] for name, one in inputs.items()})

        return FunctionExecutor(device, net, network.spec, 4, logits)

    raw = read_scan(golden_scan("chain_random11")).data
    output = Chain(device).segment(raw, executor("bdn"), executor("cgm"), probabilities=True)
    for name, one in (("brain_", output.brain), ("cgm_", output.cortex)):
        read_golden("chain_random11", name).compare(one.labels, one.probabilities, name)


def test_slices_of_a_larger_array(device):
    raw = scan_of((20, 14, 30))[2:14:2, ::-1, 5:25]
    bdn, cgm = networks(device, bdn=threshold(SPEC, -0.5), cgm=threshold(SPEC, 0.5))
    output = Chain(device).segment(raw, bdn, cgm)
    np.testing.assert_array_equal(output.brain.labels, scores_of(raw) > -0.5)
    np.testing.assert_array_equal(output.cortex.labels, scores_of(raw) > 0.5)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_mask_takes_the_brain_networks_place(device, order):
    raw = scan_of((14, 9, 12))
    mask = np.zeros(raw.shape, bool, order=order)
    mask[3:9, 2:4, 7:] = True
    bdn, cgm = networks(device, cgm=threshold(SPEC))
    output = Chain(device).segment(raw, bdn, cgm, mask=mask, probabilities=True)
    np.testing.assert_array_equal(output.brain.labels, mask)
    np.testing.assert_array_equal(output.cortex.labels, mask & (scores_of(raw) > 0))
    assert output.brain.probabilities is None
    assert (output.cortex.probabilities[mask] > 0).all()
    assert not output.cortex.probabilities[~mask].any()
    assert bdn.runs == 0
    assert output.brain_voxels == mask.sum()


def test_no_brain_runs_no_cortex(device):
    raw = scan_of((12, 12, 12))
    bdn, cgm = networks(device, bdn=threshold(SPEC, 1e6))
    told = []
    output = Chain(device).segment(
        raw, bdn, cgm, probabilities=True, progress=lambda *what: told.append(what)
    )
    assert not output.brain.labels.any()
    assert not output.cortex.labels.any()
    assert not output.cortex.probabilities.any()
    assert cgm.runs == 0
    assert told[-1] == ("cgm", 0, 0)


def test_cortex_tiles_are_those_of_the_brain(device):
    raw = scan_of((25, 5, 5))  # 5 tiles in a row
    mask = np.zeros(raw.shape, bool)
    mask[11:13] = True  # in the third
    bdn, cgm = networks(device, batch=1)
    Chain(device).segment(raw, bdn, cgm, mask=mask)
    assert cgm.runs == 1


def test_a_chain_forgets_the_scan_before(device):
    """Smaller and larger scans, with and without mask and probabilities, by one chain."""
    chain = Chain(device)
    bdn, cgm = networks(device, bdn=threshold(SPEC, -1), cgm=threshold(SPEC, 1))
    for number, shape in enumerate([(9, 9, 9), (20, 6, 8), (5, 4, 3), (20, 6, 8)]):
        raw = scan_of(shape, seed=number)
        mask = np.arange(raw.size).reshape(shape) % 3 == 0 if number % 2 else None
        output = chain.segment(raw, bdn, cgm, mask=mask, probabilities=number > 1)
        scores = scores_of(raw)
        brain = scores > -1 if mask is None else mask
        np.testing.assert_array_equal(output.brain.labels, brain)
        np.testing.assert_array_equal(output.cortex.labels, brain & (scores > 1))


def test_results_are_the_callers(device):
    chain, raw = Chain(device), scan_of((9, 9, 9))
    bdn, cgm = networks(device)
    first = chain.segment(raw, bdn, cgm, probabilities=True)
    kept = first.cortex.labels.copy(), first.cortex.probabilities.copy()
    chain.segment(scan_of((9, 9, 9), seed=5), bdn, cgm, probabilities=True)
    chain.release()
    np.testing.assert_array_equal(first.cortex.labels, kept[0])
    np.testing.assert_array_equal(first.cortex.probabilities, kept[1])


def test_the_same_scan_gives_the_same_bits(device):
    chain, raw = Chain(device), scan_of((14, 9, 12))
    bdn, cgm = networks(device)
    outputs = [chain.segment(raw, bdn, cgm, probabilities=True) for _ in range(3)]
    for other in outputs[1:]:
        np.testing.assert_array_equal(other.cortex.probabilities, outputs[0].cortex.probabilities)


def test_progress_counts_finished_tiles(device):
    raw = scan_of((14, 14, 9))  # 3 x 3 x 2 tiles
    bdn, cgm = networks(device, bdn=threshold(SPEC, -99))
    told, finished = [], []

    def progress(*what):
        told.append(what)
        finished.append((bdn.runs + cgm.runs) * 4)

    Chain(device).segment(raw, bdn, cgm, progress=progress)
    counts = [0, 4, 8, 12, 16, 18]
    assert told == [(net, done, 18) for net in ("bdn", "cgm") for done in counts]
    for done, (net, claimed, _) in zip(finished, told, strict=True):
        assert done - (20 if net == "cgm" else 0) >= claimed


def test_batches_in_flight_are_few(device):
    bdn, cgm = networks(device, batch=1)
    waiting = []
    submit = bdn.enqueue
    started = 0

    def enqueue():
        nonlocal started
        submit()
        started += 1
        waiting.append(started - bdn.runs)

    bdn.enqueue = enqueue
    Chain(device).segment(scan_of((30, 14, 9)), bdn, cgm)
    assert max(waiting) == DEPTH + 1


def test_times_of_the_stages(device):
    bdn, cgm = networks(device)
    output = Chain(device).segment(scan_of((14, 9, 12)), bdn, cgm)
    assert tuple(output.times) == STAGES
    assert all(seconds > 0 for seconds in output.times.values())


# Memory


def test_a_scan_like_the_last_allocates_nothing(device):
    chain = Chain(device)
    bdn, cgm = networks(device)
    chain.segment(scan_of((14, 9, 12)), bdn, cgm, probabilities=True)
    made, held = device.allocations, device.buffers
    for seed in range(3):
        chain.segment(scan_of((14, 9, 12), seed=seed), bdn, cgm, probabilities=True)
        chain.segment(scan_of((6, 9, 12), seed=seed), bdn, cgm)
    assert device.allocations == made
    assert device.buffers == held


def test_released_memory_is_all_of_it(device):
    chain = Chain(device)
    chain.segment(scan_of((14, 9, 12)), *networks(device), probabilities=True)
    chain.release()
    assert device.buffers == 0


def test_too_little_memory_names_the_scan():
    device = HostDevice(capacity=2 << 20)
    with device.active(), pytest.raises(OutOfDeviceMemory) as caught:
        Chain(device).segment(scan_of((100, 100, 100)), *networks(device))
    assert "100 x 100 x 100 voxels in batches of 4 tiles" in str(caught.value)
    assert caught.value.needed > caught.value.free == 2 << 20


def test_dropped_executors_are_reserved_again(device):
    chain, raw = Chain(device), scan_of((9, 9, 9))
    bdn, cgm = networks(device)
    first = chain.segment(raw, bdn, cgm)
    held = device.in_use
    chain.drop_executors()
    assert device.in_use < held
    again = chain.segment(raw, bdn, cgm)
    np.testing.assert_array_equal(first.cortex.labels, again.cortex.labels)
    assert device.in_use == held


# The scan that follows, uploaded beside the networks


@pytest.fixture(params=[False, True], ids=["late", "hasty"])
def either(request) -> Iterator[HostDevice]:
    """A device that copies aside as late as it may, or as early."""
    device = HostDevice(hasty=request.param)
    with device.active():
        yield device
    device.close()


class Following:
    """Gives a scan from the call after `late` others on; notes how often it was asked."""

    def __init__(self, raw: NDArray | None, late: int = 0) -> None:
        self.raw, self.late, self.asked = raw, late, 0

    def __call__(self) -> NDArray | None:
        self.asked += 1
        return self.raw if self.asked > self.late else None


def assert_same(found, expected):
    for one, other in ((found.brain, expected.brain), (found.cortex, expected.cortex)):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert found.cortex_voxels == expected.cortex_voxels


def alone(raw: NDArray, **options):
    """What a chain of its own makes of a scan."""
    device = HostDevice()
    with device.active():
        return Chain(device).segment(raw, *networks(device), probabilities=True, **options)


SCANS = st.builds(
    scan_of,
    st.tuples(*[st.integers(3, 15)] * 3),
    dtype=st.sampled_from(["uint8", "int16", "float16", "float32", "float64", "uint64"]),
    order=st.sampled_from("CF"),
    seed=st.integers(0, 99),
)


@given(scans=st.lists(SCANS, min_size=2, max_size=5), hasty=st.booleans(), data=st.data())
@FEW
def test_scans_that_follow_give_the_same_bits(scans, hasty, data):
    device = HostDevice(hasty=hasty)
    bdn, cgm = networks(device)
    with device.active():
        chain = Chain(device)
        for raw, other in zip(scans, [*scans[1:], None], strict=True):
            following = Following(other, data.draw(st.integers(0, 2)))
            found = chain.segment(raw, bdn, cgm, probabilities=True, following=following)
            assert_same(found, alone(raw))
    device.close()


def voxel_uploads(device: HostDevice, raw: NDArray) -> int:
    return device.uploads.count(raw.nbytes)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "int16", "float64"])
def test_what_follows_is_uploaded_once_and_aside(either, dtype, order):
    scans = [scan_of((14, 9, 12), dtype=dtype, order=order, seed=seed) for seed in range(4)]
    size = scans[0].size * max(4 if dtype == "float16" else 0, scans[0].itemsize)
    chain = Chain(either)
    bdn, cgm = networks(either)
    for raw, other in zip(scans, [*scans[1:], None], strict=True):
        found = chain.segment(raw, bdn, cgm, probabilities=True, following=Following(other))
        assert_same(found, alone(raw))
        assert tuple(found.times) == STAGES
    assert either.asides == [size] * 3
    assert either.uploads.count(size) == 1


def test_it_goes_up_while_batches_are_in_flight(device):
    bdn, cgm = networks(device)
    begun, waiting = [], []
    submit, aside = bdn.enqueue, device.upload_aside

    def enqueue():
        begun.append(None)
        submit()

    def upload_aside(*what):
        waiting.append(len(begun) - bdn.runs)
        aside(*what)

    bdn.enqueue, device.upload_aside = enqueue, upload_aside
    raw, other = scan_of((14, 14, 9)), scan_of((14, 14, 9), seed=1)  # 18 tiles, 5 batches
    Chain(device).segment(raw, bdn, cgm, following=Following(other))
    assert waiting == [DEPTH + 1]


def test_the_copy_may_outlast_the_scan_beside_it(device):
    """Its wait is the next scan's, whose results show that it is waited for."""
    chain = Chain(device)
    bdn, cgm = networks(device)
    raw, other = scan_of((6, 6, 6)), scan_of((6, 6, 6), seed=1)
    mask = np.ones(raw.shape, bool)
    following = Following(other, late=1)  # 8 tiles, 2 batches
    chain.segment(raw, bdn, cgm, mask=mask, following=following)
    assert following.asked == 2
    assert device.in_flight == 1
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))
    assert device.in_flight == 0


def test_a_join_that_is_forgotten_shows(device, monkeypatch):
    chain = Chain(device)
    bdn, cgm = networks(device)
    raw, other = scan_of((9, 9, 9)), scan_of((9, 9, 9), seed=1)
    chain.segment(raw, bdn, cgm, following=Following(other))
    with monkeypatch.context() as patch:
        patch.setattr(device, "join", lambda: None)
        with pytest.raises(DeviceError, match="the GPU finds mean"):
            chain.segment(other, bdn, cgm)
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))


def test_it_is_asked_for_once_a_batch_until_it_is_there(device):
    raw, other = scan_of((14, 14, 9)), scan_of((6, 6, 6))
    bdn, cgm = networks(device, bdn=threshold(SPEC, -99))
    for late, asked, staged in [(0, 1, 1), (7, 8, 1), (9, 10, 1), (10, 10, 0), (99, 10, 0)]:
        device.asides.clear()
        following = Following(other, late)  # 2 networks of 5 batches
        Chain(device).segment(raw, bdn, cgm, following=following)
        assert (following.asked, len(device.asides)) == (asked, staged)


def test_a_scan_that_never_comes_is_not_asked_for_by_others(device):
    raw, following = scan_of((9, 9, 9)), Following(None)
    chain = Chain(device)
    bdn, cgm = networks(device)
    chain.segment(raw, bdn, cgm, following=following)
    asked = following.asked
    assert asked > 0
    scores = scores_of(raw)
    chain.run(scores, tiling.plan_tiles(scores.shape, SPEC), bdn)
    chain.segment(raw, bdn, cgm)
    assert following.asked == asked
    assert device.asides == []


def test_another_scan_than_the_one_that_was_to_follow(either):
    """Also one of the same shape and type: what counts is that it is the very array."""
    chain = Chain(either)
    bdn, cgm = networks(either)
    raw, other, third = (scan_of((14, 9, 12), seed=seed) for seed in range(3))
    chain.segment(raw, bdn, cgm, following=Following(other))
    found = chain.segment(third, bdn, cgm, probabilities=True, following=Following(raw))
    assert_same(found, alone(third))
    assert voxel_uploads(either, raw) == 2
    # What was to follow first is not there any more.
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))
    assert voxel_uploads(either, raw) == 3


def test_one_network_between_the_two(either):
    chain = Chain(either)
    bdn, cgm = networks(either)
    raw, other = scan_of((9, 9, 9)), scan_of((9, 9, 9), seed=1)
    chain.segment(raw, bdn, cgm, following=Following(other))
    scores = scores_of(scan_of((14, 6, 17)))
    between = chain.run(scores, tiling.plan_tiles(scores.shape, SPEC), bdn)
    assert_labels(between.labels, on_cpu(bdn.function, SPEC, scores))
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))
    assert voxel_uploads(either, raw) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError("boom")])
@pytest.mark.parametrize("net", ["bdn", "cgm"])
def test_a_failure_after_the_next_scan_went_up(either, net, error):
    def progress(at, done, total):
        if at == net and done:
            raise error

    chain = Chain(either)
    bdn, cgm = networks(either)
    raw, other = scan_of((14, 9, 12)), scan_of((14, 9, 12), seed=1)
    with pytest.raises(type(error) if isinstance(error, DeviceError) else error):
        chain.segment(raw, bdn, cgm, progress=progress, following=Following(other))
    assert either.asides == [raw.nbytes]
    assert either.in_flight == 0
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))
    assert voxel_uploads(either, raw) == 2


def test_a_failure_while_the_next_scan_is_asked_for(either):
    def following():
        raise KeyboardInterrupt

    chain, raw = Chain(either), scan_of((9, 9, 9))
    bdn, cgm = networks(either)
    with pytest.raises(KeyboardInterrupt):
        chain.segment(raw, bdn, cgm, following=following)
    chain.release()
    assert_same(chain.segment(raw, bdn, cgm, probabilities=True), alone(raw))


@pytest.mark.parametrize("allocate", ["allocate", "pinned"])
def test_too_little_memory_for_the_next_scan(either, monkeypatch, allocate):
    """On the device or of the page-locked kind: it goes up in its turn, and nothing is said."""
    chain = Chain(either)
    bdn, cgm = networks(either)
    raw, other = scan_of((14, 9, 12)), scan_of((14, 9, 12), seed=1)
    chain.segment(raw, bdn, cgm, probabilities=True)

    def none(size: int) -> None:
        if allocate == "allocate":
            raise OutOfDeviceMemory(size, 0, "one buffer")
        raise DeviceError("no page-locked memory")

    following = Following(other)
    with monkeypatch.context() as patch:
        patch.setattr(either, allocate, none)
        found = chain.segment(raw, bdn, cgm, probabilities=True, following=following)
    assert_same(found, alone(raw))
    assert following.asked == 1
    assert either.asides == []
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))
    assert voxel_uploads(either, raw) == 3


def test_too_little_host_memory_for_the_next_scan(device):
    raw = scan_of((9, 9, 9))

    class Huge(np.ndarray):
        def astype(self, *what):
            raise MemoryError

    other = scan_of((9, 9, 9), dtype="float16").view(Huge)
    found = Chain(device).segment(
        raw, *networks(device), probabilities=True, following=Following(other)
    )
    assert_same(found, alone(raw))
    assert device.asides == []


@pytest.mark.parametrize("same", [True, False])
def test_a_scan_that_fits_fits_after_another(either, same):
    """The room of the scan that follows is given up before batches become smaller."""
    bdn, cgm = networks(either)
    small, large = scan_of((9, 9, 9)), scan_of((30, 14, 20))
    chain = Chain(either)
    chain.segment(large, bdn, cgm, probabilities=True)
    either.capacity = either.in_use + 600  # not the 729 voxels of two bytes besides
    chain.release()
    chain.segment(small, bdn, cgm, probabilities=True, following=Following(large))
    assert either.asides == [large.nbytes]
    found = chain.segment(large if same else large.copy(), bdn, cgm, probabilities=True)
    assert_same(found, alone(large))
    assert either.in_flight == 0


def test_what_does_not_fit_at_all_after_another(either):
    bdn, cgm = networks(either)
    small, large = scan_of((9, 9, 9)), scan_of((40, 40, 40))
    chain = Chain(either)
    chain.segment(small, bdn, cgm, probabilities=True)
    either.capacity = either.in_use + large.nbytes + 1000
    chain.segment(small, bdn, cgm, probabilities=True, following=Following(large))
    assert either.asides == [large.nbytes]
    with pytest.raises(OutOfDeviceMemory, match="40 x 40 x 40 voxels in batches of 4 tiles"):
        chain.segment(large, bdn, cgm)
    assert either.in_flight == 0
    assert_same(chain.segment(small, bdn, cgm, probabilities=True), alone(small))


def test_scans_that_follow_allocate_nothing_once_warm(either):
    chain = Chain(either)
    bdn, cgm = networks(either)

    def run(seeds: range) -> None:
        scans = [scan_of((6 if seed % 3 else 14, 9, 12), seed=seed) for seed in seeds]
        for raw, other in zip(scans, [*scans[1:], None], strict=True):
            chain.segment(raw, bdn, cgm, probabilities=True, following=Following(other))

    run(range(6))
    made, held = either.allocations, either.buffers
    run(range(6, 18))
    assert either.allocations == made
    assert either.buffers == held
    assert len(either.asides) == 5 + 11


@pytest.mark.parametrize("free", [Chain.release, Chain.drop_executors])
def test_memory_that_is_freed_under_a_copy(either, free):
    chain = Chain(either)
    bdn, cgm = networks(either)
    raw, other = scan_of((9, 9, 9)), scan_of((9, 9, 9), seed=1)
    chain.segment(raw, bdn, cgm, following=Following(other))
    held = either.in_use
    free(chain)
    assert either.in_flight == 0
    assert either.in_use < held
    assert either.buffers == 0 or free is Chain.drop_executors
    assert_same(chain.segment(other, bdn, cgm, probabilities=True), alone(other))
    assert voxel_uploads(either, raw) == 2
    # With nothing that follows, no room is held for it.
    assert either.in_use < held + 8 * raw.size


# What is refused


def refused_by_cpu(raw: NDArray) -> str:
    with pytest.raises(InputError) as caught:
        scores_of(raw)
    return str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        np.full((9, 9, 9), 7, np.int16),
        np.zeros((1, 1, 1), np.float64),
        np.full((5, 5, 5), np.inf, np.float32),
        np.array([[[1.0, np.nan]]]),
        np.array([[[1e308, -1e308, 1e308, 1e308]]]),
        np.array([[[1e16, 1e16 + 2]]]),
    ],
)
def test_a_scan_that_cannot_be_scaled_is_refused_as_on_the_cpu(device, raw):
    bdn, cgm = networks(device)
    with pytest.raises(InputError) as caught:
        Chain(device).segment(raw, bdn, cgm)
    assert str(caught.value) == refused_by_cpu(raw)
    assert bdn.runs == 0


def test_a_scan_of_little_contrast_is_scaled_where_the_cpu_scales_it(device):
    raw = scan_of((9, 9, 9)).astype(np.int64) + 10**9
    bdn, cgm = networks(device, bdn=threshold(SPEC, -9), cgm=threshold(SPEC, 0.5))
    output = Chain(device).segment(raw, bdn, cgm)
    np.testing.assert_array_equal(output.cortex.labels, scores_of(raw) > 0.5)


def test_statistics_that_the_cpu_does_not_share_are_the_devices_fault(device, monkeypatch):
    launch = device.launch
    monkeypatch.setattr(
        device,
        "launch",
        lambda one: None if one.kernel == "finish_deviation" else launch(one),
    )
    with pytest.raises(DeviceError, match=r"the GPU finds mean .* and standard deviation 0 "):
        Chain(device).segment(scan_of((9, 9, 9)), *networks(device))


def spoiling(spec: NetworkSpec) -> Function:
    return lambda inputs: np.full([spec.out] * 3, np.nan, np.float32)


@pytest.mark.parametrize("net", ["bdn", "cgm"])
def test_an_answer_that_is_not_finite_is_refused(device, net):
    bdn, cgm = networks(device, **{"bdn": threshold(SPEC, -9), net: spoiling(SPEC)})
    chain = Chain(device)
    with pytest.raises(EngineError, match=f"^{net.upper()} gave values that are not finite"):
        chain.segment(scan_of((9, 9, 9)), bdn, cgm)
    fine = networks(device, cgm=threshold(SPEC))
    chain.segment(scan_of((9, 9, 9)), *fine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError("boom")])
def test_an_interrupted_chain_leaves_nothing_under_way(device, error):
    def progress(net, done, total):
        if done:
            raise error

    chain, raw = Chain(device), scan_of((14, 14, 14))
    bdn, cgm = networks(device, bdn=threshold(SPEC), cgm=threshold(SPEC, 0.5), batch=1)
    with pytest.raises(type(error) if isinstance(error, DeviceError) else error):
        chain.segment(raw, bdn, cgm, progress=progress)
    chain.release()  # refuses while the stream may still use it
    output = chain.segment(raw, bdn, cgm)
    np.testing.assert_array_equal(output.cortex.labels, scores_of(raw) > 0.5)


# One network


@pytest.mark.parametrize("probabilities", [True, False])
def test_one_network(device, probabilities):
    scores = scores_of(scan_of((14, 6, 17)))
    bdn, _ = networks(device)
    plan = tiling.plan_tiles(scores.shape, SPEC)
    done = []
    output = Chain(device).run(scores, plan, bdn, probabilities=probabilities, progress=done.append)
    expected = on_cpu(bdn.function, SPEC, scores)
    assert_labels(output.labels, expected)
    assert sum(done) == len(plan)
    if probabilities:
        np.testing.assert_allclose(output.probabilities, expected, atol=1e-6)
    else:
        assert output.probabilities is None


def test_one_network_inside_a_region(device):
    scores = scores_of(scan_of((14, 6, 17)))
    roi = np.zeros(scores.shape, bool)
    roi[5:7, :3, 9] = True
    _, cgm = networks(device, cgm=threshold(SPEC))
    plan = tiling.plan_tiles(scores.shape, SPEC, roi)
    output = Chain(device).run(scores, plan, cgm, probabilities=True)
    np.testing.assert_array_equal(output.labels[roi], scores[roi] > 0)
    decided = np.zeros(scores.shape, bool)
    for box in plan.boxes:
        decided[tuple(slice(low, high) for low, high in box)] = True
    assert (output.probabilities[decided] > 0).all()
    assert not output.probabilities[~decided].any()
    assert not output.labels[~decided].any()


def test_one_network_over_no_tiles(device):
    scores = scores_of(scan_of((5, 6, 7)))
    bdn, _ = networks(device)
    plan = tiling.plan_tiles(scores.shape, SPEC, np.zeros(scores.shape, bool))
    assert not Chain(device).run(scores, plan, bdn).labels.any()


def test_one_network_that_is_not_finite(device):
    bdn, _ = networks(device, bdn=spoiling(SPEC))
    scores = scores_of(scan_of((5, 6, 7)))
    with pytest.raises(EngineError, match="BDN gave values that are not finite"):
        Chain(device).run(scores, tiling.plan_tiles(scores.shape, SPEC), bdn)


def test_one_tile_in_every_place_of_a_batch(device):
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.standard_normal((1, 1, side, side, side)).astype(np.float32)
        for name, side in SPEC.input_sizes().items()
    }
    bdn, _ = networks(device, batch=3)
    logits = Chain(device).evaluate(bdn, inputs)
    expected = bdn.function({name: one[0, 0] for name, one in inputs.items()})
    assert logits.shape == (3, 5, 5, 5)
    for one in logits:
        np.testing.assert_array_equal(one, expected)
