"""Run by test_pycuda.py, in a process whose CUDA driver is host_driver.c: PyCUDA itself is real."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.fake_tensorrt import FakeTensorRT, product_bytes
from tests.cuda.executors import SPEC, assert_labels, mixed, on_cpu, scan_of, scores_of
from tests.test_chains import write
from trtseg.backends import tensorrt
from trtseg.backends.tensorrt import TensorRTBackend
from trtseg.cuda.device import CudaDevice, OutOfDeviceMemory, list_gpus
from trtseg.engine import Engine
from trtseg.errors import DeviceError, EngineError
from trtseg.gpu_engine import load_gpu_engine

FUNCTIONS = {"bdn": mixed(SPEC), "cgm": mixed(SPEC, 0.3)}


class Gpu(CudaDevice):
    """With what the double of TensorRT asks besides."""

    _active = True

    def submit(self, work: Callable[[], Any]) -> None:
        work()


def left() -> list[int]:
    """Memory, streams, events and contexts not given back, and how many contexts are current."""
    counts = (ctypes.c_int * 5)()
    ctypes.CDLL(None).host_driver_left(counts)
    return list(counts)


@pytest.fixture
def backend(tmp_path: Path) -> TensorRTBackend:
    gpu = Gpu()
    fake = FakeTensorRT(gpu, SPEC, FUNCTIONS)
    backend = TensorRTBackend(library=fake.library, device=gpu)
    for net, function in FUNCTIONS.items():
        manifest = {"files": {"weights.npz": "0"}, "checkpoint": {}}
        engine = Engine(tmp_path / "tiny" / net, "tiny", net, SPEC, manifest)
        write(tmp_path, engine, function, (1, 4))
        backend.load(load_gpu_engine(tmp_path, "tiny", net, frozen_sha256="0"))
    return backend


def test_the_gpu() -> None:
    gpu, _ = list_gpus()
    assert (gpu.name, gpu.compute_capability, gpu.memory) == ("host driver", (8, 6), 4 << 30)
    with pytest.raises(DeviceError, match="no GPU cuda:2; this machine has 2"):
        CudaDevice(2)
    assert left() == [0] * 5


def current() -> int | None:
    """The context that is current in this thread, by the driver's word."""
    context = ctypes.c_void_p()
    ctypes.CDLL(None).cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def in_thread(action: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


def used_gpu(index: int = 0) -> CudaDevice:
    """A GPU with memory of both kinds and kernels, none of it given back."""
    gpu = CudaDevice(index)
    with gpu.active():
        gpu.load_kernels({"kernels.ptx": b"text"})
        gpu.allocate(100)
        gpu.pinned(100)
    return gpu


def test_a_gpu_is_closed_by_any_thread() -> None:
    def close() -> int | None:
        gpu.close()
        return current()

    gpu = used_gpu()
    assert in_thread(close) is None
    assert left() == [0] * 5
    gpu = in_thread(used_gpu)
    gpu.close()
    assert left() == [0] * 5


@pytest.mark.parametrize("opened_here", [True, False])
def test_contexts_of_others_stay_current(opened_here: bool) -> None:
    driver, others = ctypes.CDLL(None), ctypes.c_void_p(0x0CC)
    gpu = used_gpu() if opened_here else in_thread(used_gpu)
    driver.cuCtxPushCurrent_v2(others)
    gpu.close()
    assert current() == others.value
    driver.cuCtxPopCurrent_v2(ctypes.byref(others))
    assert left() == [0] * 5


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("opened_here", [True, False])
def test_another_gpu_of_pycudas_stays_current(index: int, opened_here: bool) -> None:
    gpu = used_gpu() if opened_here else in_thread(used_gpu)
    with CudaDevice(index) as other, other.active():
        before = current()
        gpu.close()
        assert current() == before
        assert left()[3:] == [1, 1]  # one context, current once
        other.allocate(100)
    assert left() == [0] * 5


def test_kernels_that_the_driver_refuses() -> None:
    with CudaDevice() as gpu, gpu.active():
        gpu.load_kernels({"kernels.sm_86.cubin": b"bad", "kernels.ptx": b"text"})
        with pytest.raises(EngineError) as caught:
            gpu.load_kernels({"kernels.sm_80.cubin": b"bad", "kernels.ptx": b"bad"})
    refused = "cuModuleLoadDataEx failed: error 200"
    assert f"(kernels.sm_80.cubin: {refused}; kernels.ptx: {refused})" in str(caught.value)
    assert "CUDA 13.0, which is the driver's, or earlier" in str(caught.value)
    assert "pip install 'nvidia-cuda-nvrtc<13.1'" in str(caught.value)
    assert left() == [0] * 5


@pytest.mark.parametrize("order", ["C", "F"])
def test_scans_through_pycuda(backend: TensorRTBackend, order: str) -> None:
    scans = [scan_of((17, 20, 14), order=order, seed=seed) for seed in range(3)]
    for raw, following in zip(scans, [*scans[1:], None], strict=True):
        found = backend.segment_chain(raw, probabilities=True, following=lambda one=following: one)
        brain = on_cpu(FUNCTIONS["bdn"], SPEC, scores_of(raw))
        assert_labels(found.brain.labels, brain)
        roi = found.brain.labels.astype(bool)
        cortex = on_cpu(FUNCTIONS["cgm"], SPEC, scores_of(raw), roi)
        assert_labels(found.cortex.labels, cortex)
        np.testing.assert_allclose(found.cortex.probabilities, cortex, rtol=0, atol=1e-5)
        assert found.cortex_voxels == found.cortex.labels.sum()
        assert all(seconds >= 0 for seconds in found.times.values())
    backend.close()
    assert left() == [0] * 5


def test_what_is_given_up_half_way_is_given_back(backend: TensorRTBackend) -> None:
    def interrupt(net: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    raw = scan_of((17, 20, 14))
    with pytest.raises(KeyboardInterrupt):
        backend.segment_chain(raw, progress=interrupt, following=raw.copy)
    backend.segment_chain(raw)
    backend.close()
    assert left() == [0] * 5


def test_out_of_memory() -> None:
    with CudaDevice() as gpu, gpu.active():
        with pytest.raises(OutOfDeviceMemory) as caught:
            gpu.allocate(5 << 30)
        assert (caught.value.needed, caught.value.free) == (5 << 30, 4 << 30)
    assert left() == [0] * 5


def test_ceilings(backend: TensorRTBackend, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt, "SIDE", 32)
    monkeypatch.setattr(tensorrt, "COPY_BYTES", 1 << 16)
    engine = backend._networks["bdn"].engine
    monkeypatch.setattr(type(engine), "read", lambda self, name: product_bytes())
    found = backend.ceilings()
    assert found.operations_per_second > 0
    assert found.bytes_per_second > 0
    monkeypatch.undo()
    backend.close()
    assert left() == [0] * 5
