"""`trtseg.backends.tensorrt` on doubles of the library and of a GPU; nothing here needs either."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.fake_tensorrt import (
    Diagnostics,
    FakeTensorRT,
    Graphs,
    Validity,
    engine_bytes,
    product_bytes,
)
from tests.cuda.executors import (
    SPEC,
    assert_labels,
    mixed,
    on_cpu,
    scan_of,
    scores_of,
    threshold,
)
from tests.cuda.host_device import HostDevice
from trtseg import tiling
from trtseg.backends import tensorrt as module
from trtseg.backends.tensorrt import TensorRTBackend, expected_tensors
from trtseg.cuda.device import OutOfDeviceMemory
from trtseg.errors import DeviceError, EngineError
from trtseg.gpu_engine import GpuEngine, write_gpu_engine

BATCHES = (1, 4, 16)
FUNCTIONS = {
    "bdn": mixed(SPEC),
    "cgm": mixed(SPEC, 0.3),
    "high": threshold(SPEC, 0.5),
    "low": threshold(SPEC, -0.5),
}

Writer = Callable[..., GpuEngine]


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture(params=["rtx", "11", "10.3"])
def fake(request: pytest.FixtureRequest, device: HostDevice) -> FakeTensorRT:
    return FakeTensorRT(device, SPEC, dict(FUNCTIONS), kind=request.param)


@pytest.fixture
def rtx(device: HostDevice) -> FakeTensorRT:
    return FakeTensorRT(device, SPEC, dict(FUNCTIONS))


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes an intact compiled network around "engines" of a function."""

    def engine(
        net: str,
        function: str | None = None,
        *,
        library: str = "tensorrt_rtx",
        batches: tuple[int, ...] = BATCHES,
        answer: str | None = None,
        **tensors: Any,
    ) -> GpuEngine:
        function = function or net
        files = {
            f"b{batch}.engine": engine_bytes(SPEC, batch, function, scratch=1000 * batch, **tensors)
            for batch in batches
        }
        return write_gpu_engine(
            tmp_path / "engines of µ",
            "tiny",
            net,
            spec=SPEC,
            files={
                **files,
                "ceiling.engine": product_bytes(),
                "selftest.npz": selftest(answer or function),
                "kernels.ptx": b"ptx",
                "kernels.fatbin": b"code",
            },
            facts={
                "recipe": {"frozen_sha256": "0"},
                "checkpoint": {},
                "cost": {"multiply_adds": 10, "bytes": 20},
                "versions": {"trtseg": "1"},
                "library": {"name": library, "version": "9.8.7"},
                "compute_capabilities": ["8.6"],
                "batches": batches,
                "form": "published",
                "precision": "f16",
                "selftest": {"labels_equal": 0.999, "largest_difference": 0.01},
                "notice": "",
            },
        )

    return engine


def selftest(function: str) -> bytes:
    rng = np.random.default_rng(3)
    inputs = {
        name: rng.standard_normal((1, 1, side, side, side)).astype(np.float32)
        for name, side in SPEC.input_sizes().items()
    }
    answer = FUNCTIONS[function]({name: one[0, 0] for name, one in inputs.items()})
    stream = io.BytesIO()
    np.savez(stream, logit=answer, **inputs)
    return stream.getvalue()


@pytest.fixture
def backend(fake: FakeTensorRT, write: Writer) -> Iterator[TensorRTBackend]:
    """Both networks, loaded."""
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    for net in ("bdn", "cgm"):
        backend.load(write(net, library=fake.library.name))
    yield backend
    backend.close()


def limited(device: HostDevice, spare: int) -> None:
    """Leave a device `spare` bytes besides what is in use."""
    device.capacity = device.in_use + spare


# What it computes


def test_chain_is_the_cpus(backend):
    raw = scan_of((14, 6, 17))
    output = backend.segment_chain(raw, probabilities=True)
    scores = scores_of(raw)
    brain = on_cpu(FUNCTIONS["bdn"], SPEC, scores)
    cortex = on_cpu(FUNCTIONS["cgm"], SPEC, scores, output.brain.labels.astype(bool))
    assert_labels(output.brain.labels, brain)
    assert_labels(output.cortex.labels, cortex)
    np.testing.assert_allclose(output.cortex.probabilities, cortex, atol=1e-5)


def test_a_mask_and_progress(backend):
    raw = scan_of((14, 9, 12))
    mask = np.zeros(raw.shape, bool)
    mask[2:5] = True
    told = []
    output = backend.segment_chain(raw, mask=mask, progress=lambda *what: told.append(what))
    np.testing.assert_array_equal(output.brain.labels, mask)
    assert told[0] == ("cgm", 0, told[0][2])
    assert told[-1] == ("cgm", told[0][2], told[0][2])


def test_one_network_is_the_cpus(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    network = backend.load(write("bdn", library=fake.library.name))
    scores = scores_of(scan_of((14, 6, 17)))
    plan = tiling.plan_tiles(scores.shape, network.spec)
    done = []
    output = network.run(scores, plan, probabilities=True, progress=done.append)
    np.testing.assert_allclose(
        output.probabilities, on_cpu(FUNCTIONS["bdn"], SPEC, scores), atol=1e-5
    )
    assert sum(done) == len(plan)
    assert network.run(scores, plan).probabilities is None


def test_a_scan_like_the_last_allocates_and_binds_nothing(backend, fake):
    raw = scan_of((14, 9, 12))
    backend.segment_chain(raw)
    made, bindings = fake.device.allocations, [one.bindings for one in fake.contexts]
    for seed in range(3):
        backend.segment_chain(scan_of((14, 9, 12), seed=seed))
    assert fake.device.allocations == made
    assert [one.bindings for one in fake.contexts] == bindings


def test_scans_that_follow_go_up_beside_the_networks(backend, fake):
    scans = [scan_of((14, 9, 12), seed=seed) for seed in range(4)]
    expected = [backend.segment_chain(raw) for raw in scans]
    fake.device.uploads.clear()
    bindings = None
    for raw, other, told in zip(scans, [*scans[1:], None], expected, strict=True):
        output = backend.segment_chain(raw, following=lambda other=other: other)
        np.testing.assert_array_equal(output.brain.labels, told.brain.labels)
        np.testing.assert_array_equal(output.cortex.labels, told.cortex.labels)
        # The library is bound to tensors and not to voxels: it need not capture graphs anew.
        bindings = bindings or [one.bindings for one in fake.contexts]
        assert [one.bindings for one in fake.contexts] == bindings
    assert fake.device.asides == [scans[0].nbytes] * 3
    assert fake.device.uploads.count(scans[0].nbytes) == 1


def test_a_backend_that_is_closed_under_a_copy(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    for net in ("bdn", "cgm"):
        backend.load(write(net, library=fake.library.name))
    other = scan_of((9, 9, 9), seed=1)
    backend.segment_chain(scan_of((9, 9, 9)), following=lambda: other)
    assert fake.device.in_flight == 1
    backend.close()
    assert fake.device.buffers == fake.device.in_flight == 0


def test_what_the_library_logs_is_not_kept(backend, fake):
    for _ in range(3):
        fake.log()
        backend.segment_chain(scan_of((9, 9, 9)))
    assert backend._messages.lines == []


# How it is opened and closed


def test_the_largest_batch_is_taken(backend, fake):
    assert fake.opened == [16, 16]
    assert backend.description == (f"host double, {fake.library.name} 9.8.7, bdn b16, cgm b16")
    assert (backend.device, backend.precision) == ("cuda:0", "f16")


def test_kernels_are_loaded_once_from_the_engine(backend, fake):
    assert fake.device.loaded == {"kernels.ptx": b"ptx", "kernels.fatbin": b"code"}


def test_the_librarys_own_graphs_are_used(rtx, write):
    TensorRTBackend(library=rtx.library, device=rtx.device).load(write("bdn"))
    assert rtx.contexts[0].config.cuda_graph_strategy is Graphs.WHOLE_GRAPH_CAPTURE


def test_close_frees_everything(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    network = backend.load(write("bdn", library=fake.library.name))
    backend.load(write("cgm", library=fake.library.name))
    backend.segment_chain(scan_of((9, 9, 9)), probabilities=True)
    backend.close()
    backend.close()
    assert fake.device.closed
    assert fake.device.buffers == 0
    with pytest.raises(DeviceError, match="BDN is not loaded on the GPU any more"):
        _ = network.session


def test_loading_again_frees_the_first(backend, fake, write):
    held = fake.device.in_use
    backend.load(write("bdn", library=fake.library.name))
    assert fake.device.in_use == held


def test_a_gpu_that_fails_to_close_is_closed(backend, fake, monkeypatch):
    def fail(address: int) -> None:
        raise DeviceError("the GPU failed")

    monkeypatch.setattr(backend._chain, "release", lambda: fail(0))
    backend.close()
    assert fake.device.closed


def test_a_gpu_that_cannot_be_made_active_is_closed(backend, fake, monkeypatch):
    def fail() -> None:
        monkeypatch.undo()
        raise DeviceError("the GPU failed")

    monkeypatch.setattr(fake.device, "active", fail)
    with pytest.raises(DeviceError):
        backend.close()
    assert fake.device.closed


def test_a_library_that_cannot_start(fake):
    fake.failures = {"runtime"}
    fake.reason = "CUDA driver version is insufficient"
    with pytest.raises(DeviceError, match=r"cannot start on host double \(CUDA driver version is"):
        TensorRTBackend(library=fake.library, device=fake.device)
    assert fake.device.closed


# Memory


def test_a_batch_that_does_not_fit_gives_way_to_a_smaller_one(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    tensors = sum(4 * side**3 for side in [*SPEC.input_sizes().values(), SPEC.out])
    limited(fake.device, fake.weights_bytes + 4 * (tensors + 1000))
    network = backend.load(write("bdn", library=fake.library.name))
    assert fake.opened == [16, 4]
    assert network.batch == 4


def test_no_batch_fits(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    limited(fake.device, fake.weights_bytes + 500)
    with pytest.raises(OutOfDeviceMemory, match="for batches of 1 tiles; close other") as caught:
        backend.load(write("bdn", library=fake.library.name))
    assert fake.opened == [16, 4, 1]
    assert caught.value.needed > caught.value.free == 500
    assert fake.device.in_use == 0


def test_a_scan_that_does_not_fit_makes_both_networks_smaller(backend, fake):
    raw = scan_of((30, 30, 30))
    expected = backend.segment_chain(raw)
    fake.device.capacity = fake.device.in_use - 10_000
    with fake.device.active():
        backend._chain.release()
    fake.opened.clear()
    output = backend.segment_chain(raw)
    assert fake.opened == [4, 4]
    np.testing.assert_array_equal(output.cortex.labels, expected.cortex.labels)
    assert output.cortex_voxels == expected.cortex_voxels


@pytest.mark.parametrize("staged", [True, False])
def test_a_scan_that_follows_and_does_not_fit_makes_both_networks_smaller(backend, fake, staged):
    """Whatever was brought up beside the scan before, the second attempt begins anew."""
    first, raw, last = scan_of((6, 6, 6)), scan_of((30, 30, 30)), scan_of((30, 30, 30), seed=1)
    expected = [backend.segment_chain(one) for one in (raw, last)]
    fake.device.capacity = fake.device.in_use - 10_000
    with fake.device.active():
        backend._chain.release()
    fake.opened.clear()
    fake.device.asides.clear()
    asked = []

    def following():
        asked.append(None)
        return last

    backend.segment_chain(first, following=lambda: raw if staged else None)
    assert fake.device.asides == [raw.nbytes] * staged
    outputs = [backend.segment_chain(raw, following=following), backend.segment_chain(last)]
    assert fake.opened == [4, 4]
    assert asked
    for output, told in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output.cortex.labels, told.cortex.labels)
        assert output.cortex_voxels == told.cortex_voxels


def test_a_scan_that_never_fits_says_what_is_missing(backend, fake):
    limited(fake.device, 2_000_000)
    with pytest.raises(OutOfDeviceMemory) as caught:
        backend.segment_chain(scan_of((60, 60, 60)))
    assert "60 x 60 x 60 voxels in batches of 1 tiles" in str(caught.value)
    assert fake.opened == [16, 16, 4, 4, 1, 1]
    output = backend.segment_chain(scan_of((6, 6, 6)))
    assert output.brain.labels.shape == (6, 6, 6)


def test_weights_are_freed_before_others_are_loaded(backend, fake):
    """At no time are two engines of one network in memory."""
    fake.weights_bytes = 10**6
    limited(fake.device, 2 * 10**6)
    with pytest.raises(OutOfDeviceMemory):
        backend.segment_chain(scan_of((80, 80, 80)))
    assert fake.opened[-2:] == [1, 1]


@pytest.mark.parametrize("what", ["deserialize", "context"])
def test_memory_that_the_library_misses(fake, write, what):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    fake.failures = {what}
    fake.reason = "Requested amount of GPU memory could not be allocated"
    with pytest.raises(OutOfDeviceMemory, match=r"b1\.engine \(Requested amount of GPU memory"):
        backend.load(write("bdn", library=fake.library.name))


def test_an_illegal_access_is_no_want_of_memory(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    fake.failures = {"context"}
    fake.reason = "an illegal memory access was encountered"
    with pytest.raises(EngineError, match="an illegal memory access"):
        backend.load(write("bdn", library=fake.library.name))
    assert fake.opened == [16]


@pytest.mark.parametrize("what", ["enqueue 16", "enqueue"])
def test_memory_that_the_library_misses_at_the_first_run(fake, write, what):
    """Kernels may be loaded, and memory for them taken, when they are first enqueued."""
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    fake.failures = {what}
    fake.reason = "Error Code 1: Cuda Runtime (out of memory)"
    engine = write("bdn", library=fake.library.name)
    if what == "enqueue 16":
        assert backend.load(engine).batch == 4
        assert fake.opened == [16, 4]
    else:
        with pytest.raises(OutOfDeviceMemory, match=r"more for .*b1\.engine \(Error Code 1: Cuda"):
            backend.load(engine)
        assert fake.opened == [16, 4, 1]
        assert fake.device.in_use == 0


def test_memory_that_the_library_misses_within_a_scan(backend, fake):
    raw = scan_of((14, 9, 12))
    expected = backend.segment_chain(raw)
    fake.failures = {"enqueue 16"}
    fake.reason = "CUDA_ERROR_OUT_OF_MEMORY"
    fake.opened.clear()
    output = backend.segment_chain(raw)
    assert fake.opened == [4, 4]
    np.testing.assert_array_equal(output.brain.labels, expected.brain.labels)
    np.testing.assert_array_equal(output.cortex.labels, expected.cortex.labels)


# What is refused


@pytest.mark.parametrize(("what", "verb"), [("deserialize", "load"), ("context", "run")])
def test_an_engine_that_the_library_refuses(fake, write, what, verb):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    fake.failures = {what}
    fake.reason = "Serialization assertion failed"
    with pytest.raises(EngineError) as caught:
        backend.load(write("bdn", library=fake.library.name))
    assert f"{fake.library.name} 9.8.7 cannot {verb} it (Serialization assertion" in str(
        caught.value
    )
    assert "trtseg engines build --models tiny" in str(caught.value)


def test_an_engine_that_the_library_says_is_invalid_here(rtx, write):
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    engine = write("bdn")
    rtx.validity = (Validity.INVALID, Diagnostics.UNSUPPORTED_CC)
    with pytest.raises(EngineError, match=r"run it here \(UNSUPPORTED_CC\)"):
        backend.load(engine)
    rtx.validity = (Validity.INVALID, Diagnostics.INSUFFICIENT_GPU_MEMORY)
    with pytest.raises(OutOfDeviceMemory):
        backend.load(engine)
    rtx.validity = (Validity.SUBOPTIMAL, 0)
    assert backend.load(engine).batch == 16


@pytest.mark.parametrize(
    ("diagnostics", "said"),
    [
        (Diagnostics.OLD_CUDA_DRIVER, "OLD_CUDA_DRIVER"),
        (Diagnostics.UNSUPPORTED_CC | Diagnostics.OLD_CUDA_DRIVER, "OLD_CUDA_DRIVER; UNSUPPORTED"),
        (0, "cudaError 35"),  # what 1.7 says of a driver that is too old
    ],
)
def test_a_driver_that_is_too_old_is_not_the_engines_fault(rtx, write, diagnostics, said):
    def judge(runtime: Any, content: bytes) -> tuple[Validity, int]:
        rtx.reason = "cudaError 35"
        rtx.log()
        return Validity.INVALID, diagnostics

    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    engine = write("bdn")
    type(backend._runtime).get_engine_validity = judge
    with pytest.raises(
        DeviceError, match=rf"cannot start on host double \({said}.*update the driver"
    ):
        backend.load(engine)


def test_the_library_is_the_one_that_compiled(fake, write, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "open_library", lambda name: asked.append(name) or fake.library)
    backend = TensorRTBackend(device=fake.device)
    for net in ("bdn", "cgm"):
        backend.load(write(net, library=fake.library.name))
    assert asked == [fake.library.name]
    backend.close()
    assert fake.device.closed


def test_an_engine_of_another_library(rtx, write):
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    with pytest.raises(EngineError, match=r"compiled by tensorrt 9\.8\.7; expected tensorrt_rtx"):
        backend.load(write("bdn", library="tensorrt"))


def test_an_engine_for_another_gpu(fake, write):
    fake.device.compute_capability = (7, 5)
    fake.validity = (Validity.INVALID, Diagnostics.UNSUPPORTED_CC)
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    with pytest.raises(EngineError, match=r"expected 7\.5, that of host double"):
        backend.load(write("bdn", library=fake.library.name))


def test_a_library_that_can_say_what_runs_where_has_the_word(rtx, write):
    rtx.device.compute_capability = (9, 0)
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    assert backend.load(write("bdn")).batch == 16


@pytest.mark.parametrize(
    ("tensors", "received"),
    [
        ({"normal": ["INPUT", "HALF", [16, 1, 9, 9, 9]]}, "normal input HALF 16x1x9x9x9"),
        ({"sub3": ["INPUT", "FLOAT", [16, 1, 7, 6, 6]]}, "sub3 input FLOAT 16x1x7x6x6"),
        ({"logit": ["INPUT", "FLOAT", [16, 5, 5, 5]]}, "logit input FLOAT 16x5x5x5"),
        ({"sub3": None}, "logit output FLOAT 16x5x5x5, normal input FLOAT 16x1x9x9x9;"),
        ({"extra": ["OUTPUT", "FLOAT", [1]]}, "extra output FLOAT 1, logit"),
    ],
)
def test_other_tensors_than_the_networks(rtx, write, tensors, received):
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    with pytest.raises(EngineError) as caught:
        backend.load(write("bdn", **tensors))
    assert received in str(caught.value)
    assert (
        "expected logit output FLOAT 16x5x5x5, normal input FLOAT 16x1x9x9x9, "
        "sub3 input FLOAT 16x1x6x6x6" in str(caught.value)
    )


def test_tensors_of_the_published_networks():
    from trtseg.architecture import PUBLISHED

    assert expected_tensors(PUBLISHED, 4) == {
        "normal": ("INPUT", "FLOAT", (4, 1, 45, 45, 45)),
        "sub3": ("INPUT", "FLOAT", (4, 1, 26, 26, 26)),
        "sub5": ("INPUT", "FLOAT", (4, 1, 22, 22, 22)),
        "logit": ("OUTPUT", "FLOAT", (4, 29, 29, 29)),
    }


def test_a_failed_self_test(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    with pytest.raises(EngineError, match=r"in the self-test .* of the labels agree with float32"):
        backend.load(write("bdn", "high", answer="low", library=fake.library.name))


def test_every_place_of_a_batch_is_tested(rtx, write):
    calls = iter(range(100))
    rtx.functions["high"] = lambda inputs: FUNCTIONS["high"](inputs) + (next(calls) == 15)
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    with pytest.raises(EngineError, match="in the self-test"):
        backend.load(write("bdn", "high"))


def test_what_is_tested_is_the_third_run(rtx, write):
    """Where the library captures a graph, that is the first that scans will be like."""
    calls = iter(range(100))
    rtx.functions["high"] = lambda inputs: FUNCTIONS["high"](inputs) + (next(calls) == 2)
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    with pytest.raises(EngineError, match="in the self-test"):
        backend.load(write("bdn", "high", batches=(1,)))


def test_a_failed_self_test_leaves_nothing_behind(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    with pytest.raises(EngineError):
        backend.load(write("bdn", "high", answer="low", library=fake.library.name))
    backend.close()
    assert fake.device.buffers == 0


def test_a_tensor_that_takes_no_address(fake, write):
    backend = TensorRTBackend(library=fake.library, device=fake.device)
    fake.failures = {"address"}
    with pytest.raises(DeviceError, match=r"b16\.engine: .* takes no address for tensor normal"):
        backend.load(write("bdn", library=fake.library.name))


@pytest.mark.parametrize("at", ["deserialize", "context", "enqueue"])
def test_an_interrupt_while_the_library_logs(fake, write, monkeypatch, at):
    class Severity:
        @property
        def name(self) -> str:
            raise KeyboardInterrupt

    backend = TensorRTBackend(library=fake.library, device=fake.device)
    engine = write("bdn", library=fake.library.name)
    with monkeypatch.context() as patch:
        patch.setattr(fake, "log", lambda: fake.logger.log(Severity(), "noise"))
        patch.setattr(fake, "failures", {at})
        with pytest.raises(KeyboardInterrupt):
            backend.load(engine)
    assert backend.load(engine).batch == 16
    backend.close()
    assert fake.device.buffers == 0


def test_a_batch_that_cannot_be_enqueued(backend, fake):
    fake.failures = {"enqueue"}
    with pytest.raises(DeviceError, match=r"b16\.engine: .*cannot run a batch.*\(a reason\)"):
        backend.segment_chain(scan_of((9, 9, 9)))
    fake.reason = "an illegal memory access was encountered"
    with pytest.raises(DeviceError) as caught:
        backend.segment_chain(scan_of((9, 9, 9)))
    assert not isinstance(caught.value, OutOfDeviceMemory)
    fake.failures = set()
    assert backend.segment_chain(scan_of((9, 9, 9))).brain.labels.any()


# The cache of compiled kernels


def cache_of(engine: GpuEngine) -> Path:
    return engine.folder / "b16.sm_86.host_double.cache"


def test_compiled_kernels_are_kept_for_the_next_start(rtx, write):
    engine = write("bdn")
    TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
    assert rtx.caches == [None]
    assert cache_of(engine).read_bytes() == b"compiled kernels"
    assert cache_of(engine).stat().st_mode & 0o022 == 0
    written = cache_of(engine).stat().st_mtime_ns
    TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
    assert rtx.caches == [None, b"compiled kernels"]
    assert cache_of(engine).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("NVIDIA GeForce RTX 4090", "b16.sm_86.NVIDIA_GeForce_RTX_4090.cache"),
        ("NVIDIA A100 MIG 1g.5gb / µ..", "b16.sm_86.NVIDIA_A100_MIG_1g_5gb_.cache"),
    ],
)
def test_each_model_of_gpu_has_its_own_cache(rtx, write, model, file):
    engine = write("bdn")
    TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
    rtx.device.name = model
    for found in (None, b"compiled kernels"):
        TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
        assert rtx.caches[-1] == found
    assert sorted(path.name for path in engine.folder.glob("*.cache")) == sorted(
        [file, cache_of(engine).name]
    )


def test_a_library_that_gives_no_cache_is_no_error(rtx, write):
    engine = write("bdn")
    rtx.failures = {"serialize"}
    rtx.reason = "Failed to capture the device fingerprint"
    backend = TensorRTBackend(library=rtx.library, device=rtx.device)
    assert backend.load(engine).batch == 16
    assert not list(engine.folder.glob("*.cache"))
    rtx.failures = set()
    backend.load(engine)
    assert cache_of(engine).read_bytes() == b"compiled kernels"


def test_a_cache_that_others_could_write_is_not_read(rtx, write):
    engine = write("bdn")
    cache_of(engine).write_bytes(b"compiled kernels")
    cache_of(engine).chmod(0o666)
    TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
    assert rtx.caches == [None]
    assert cache_of(engine).stat().st_mode & 0o022 == 0


def test_a_cache_of_another_driver_is_replaced(rtx, write):
    engine = write("bdn")
    cache_of(engine).write_bytes(b"older")
    cache_of(engine).chmod(0o644)
    TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
    assert cache_of(engine).read_bytes() == b"compiled kernels"


def test_a_folder_that_cannot_be_written_is_no_error(rtx, write, monkeypatch):
    engine = write("bdn")
    monkeypatch.setattr(module, "atomic_write", lambda path: (_ for _ in ()).throw(OSError("full")))
    TensorRTBackend(library=rtx.library, device=rtx.device).load(engine)
    assert not cache_of(engine).exists()


@pytest.mark.parametrize("kind", ["11", "10.3"])
def test_a_library_without_a_cache_writes_none(device, write, kind):
    fake = FakeTensorRT(device, SPEC, dict(FUNCTIONS), kind=kind)
    engine = write("bdn", library="tensorrt")
    TensorRTBackend(library=fake.library, device=device).load(engine)
    assert not cache_of(engine).exists()


# What the device can do


@pytest.fixture
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIDE", 32)
    monkeypatch.setattr(module, "COPY_BYTES", 4096)


@pytest.mark.usefixtures("_small_ceilings")
def test_ceilings(backend, fake, device):
    before = device.buffers
    found = backend.ceilings()
    # 3 products to warm up and 20 that count; the double's clock ticks 1e-6 s for each piece of
    # work: each product and each copy is one, and the mark at the end another.
    assert fake.products == 23
    assert found.operations_per_second == pytest.approx(2 * 32**3 / (21e-6 / 20))
    assert found.bytes_per_second == pytest.approx(2 * 4096 / (21e-6 / 20))
    assert device.buffers == before


@pytest.mark.usefixtures("_small_ceilings")
def test_no_room_for_ceilings(backend, device, monkeypatch):
    before = device.buffers
    monkeypatch.setattr(module, "COPY_BYTES", device.capacity)
    with pytest.raises(OutOfDeviceMemory, match="the measurement of the GPU's ceilings"):
        backend.ceilings()
    assert device.buffers == before


def test_memory_taken_on_the_device(backend, device):
    taken = backend.device_bytes
    with device.active():
        address = device.allocate(1000)
        assert backend.device_bytes == taken + 1000
        device.free(address)
