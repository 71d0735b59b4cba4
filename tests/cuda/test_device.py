"""`trtseg.cuda.device` on a double of pycuda: no GPU is needed, and none is used."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.fake_pycuda import FakePycuda
from trtseg.cuda.device import CudaDevice, GpuInfo, OutOfDeviceMemory, list_gpus, megabytes
from trtseg.cuda.launches import Launch
from trtseg.errors import DeviceError, EngineError


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's library that can be loaded: this process itself."""
    monkeypatch.setattr("trtseg.cuda.device.DRIVER", None)


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePycuda:
    return FakePycuda(monkeypatch)


@pytest.fixture
def device(pycuda: FakePycuda) -> CudaDevice:
    device = CudaDevice(1)
    pycuda.calls.clear()
    return device


# What is missing


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    """A pycuda whose driver module is this text."""
    (folder / "pycuda").mkdir()
    (folder / "pycuda" / "__init__.py").touch()
    (folder / "pycuda" / "driver.py").write_text(driver, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)


NOT_OPENED = "cannot open shared object file: No such file or directory"


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, said: str) -> None:
    """A pycuda that cannot be imported."""
    package(folder, monkeypatch, f"raise ImportError({said!r})")


def test_no_driver_comes_before_no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setattr("trtseg.cuda.device.DRIVER", "libnone.so.1")
    with pytest.raises(DeviceError, match=r"driver is missing \(libnone\.so\.1 cannot be loaded"):
        CudaDevice()


def test_no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(DeviceError, match=r"pycuda is not installed .* pip install pycuda"):
        CudaDevice()


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse(monkeypatch, tmp_path, f"libcuda.so.1: {NOT_OPENED}")
    with pytest.raises(DeviceError, match=r"driver is missing \(libcuda\.so\.1: cannot open .*\)"):
        list_gpus()
    sys.modules.pop("pycuda")


def test_a_library_of_the_toolkit_is_not_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse(monkeypatch, tmp_path, f"libcurand.so.10: {NOT_OPENED}")
    with pytest.raises(DeviceError) as caught:
        list_gpus()
    assert str(caught.value) == (
        "pycuda cannot load libcurand.so.10; expected the libraries of the CUDA toolkit that "
        "pycuda was built with, where the system looks for libraries; put the folder lib64 of "
        "that toolkit into LD_LIBRARY_PATH, or into a file in /etc/ld.so.conf.d and run ldconfig; "
        "or run with --device cpu"
    )
    sys.modules.pop("pycuda")


@pytest.mark.parametrize(
    "said",
    [
        "_driver.so: undefined symbol: curandCreateGenerator_v3",
        "libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by _driver.so)",
        "numpy.core.multiarray failed to import",
    ],
)
def test_a_pycuda_built_for_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    refuse(monkeypatch, tmp_path, said)
    with pytest.raises(DeviceError) as caught:
        list_gpus()
    assert caught.value.found == f"pycuda cannot be imported ({said})"
    assert "pip install --force-reinstall" in caught.value.action
    sys.modules.pop("pycuda")


def test_a_driver_older_than_pycudas_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package(
        tmp_path,
        monkeypatch,
        "from warnings import warn\nwarn('mismatch')\n"
        "raise ImportError('_driver.so: undefined symbol: cuEventElapsedTime_v2')",
    )
    with pytest.raises(DeviceError, match=r"driver is older than .*cuEventElapsedTime_v2"):
        CudaDevice()
    sys.modules.pop("pycuda")


def test_no_gpu_by_the_drivers_word(pycuda: FakePycuda) -> None:
    pycuda.failures["init"] = pycuda.driver.RuntimeError("cuInit failed: no CUDA-capable device")
    with pytest.raises(DeviceError, match=r"finds no GPU .*cuInit failed.*nvidia-smi"):
        CudaDevice()


def test_no_gpu_by_count(pycuda: FakePycuda) -> None:
    pycuda.gpus = 0
    with pytest.raises(DeviceError, match="lists no GPU"):
        CudaDevice()


def test_no_such_gpu(pycuda: FakePycuda) -> None:
    with pytest.raises(DeviceError, match="no GPU cuda:2; this machine has 2; expected cuda:0, cu"):
        CudaDevice(2)


def test_gpus(pycuda: FakePycuda) -> None:
    assert list_gpus() == [GpuInfo(0, "GPU 0", (8, 9), 8000), GpuInfo(1, "GPU 1", (8, 9), 8000)]


# What it is, and what it gives back


def test_a_device_says_what_it_is(device: CudaDevice) -> None:
    assert (device.name, device.compute_capability, device.stream) == ("GPU 1", (8, 9), 4242)
    with device.active():
        assert device.memory() == (5000, 8000)


def test_the_context_is_current_only_inside(pycuda: FakePycuda, device: CudaDevice) -> None:
    with device.active(), device.active():
        assert len(pycuda.stack) == 2
    assert not pycuda.stack
    with pytest.raises(KeyError), device.active():
        raise KeyError
    assert not pycuda.stack


def test_a_context_that_cannot_be_put_away(pycuda: FakePycuda, device: CudaDevice) -> None:
    with pytest.raises(DeviceError, match="cuCtxPopCurrent failed"), device.active():
        pycuda.failures["pop"] = pycuda.driver.LogicError("cuCtxPopCurrent failed: destroyed")


def test_a_device_that_fails_to_open_is_let_go(pycuda: FakePycuda) -> None:
    pycuda.failures["stream"] = pycuda.driver.LogicError("cuStreamCreate failed")
    with pytest.raises(DeviceError, match=r"the GPU failed \(cuStreamCreate failed\)"):
        CudaDevice()
    assert not pycuda.stack
    assert pycuda.names()[-1] == "detach"


def test_close_frees_what_is_left_before_the_context(
    pycuda: FakePycuda, device: CudaDevice
) -> None:
    with device.active():
        device.allocate(100)
        device.pinned(100)
    pycuda.calls.clear()
    device.close()
    device.close()
    assert pycuda.names() == [
        "push",
        "synchronize",
        "synchronize aside",
        "free",
        "free",
        "pop current",
        "detach",
    ]
    assert not pycuda.held


def test_close_without_a_context(pycuda: FakePycuda, device: CudaDevice) -> None:
    pycuda.failures["push"] = pycuda.driver.LogicError("cuCtxPushCurrent failed: destroyed")
    pycuda.failures["detach"] = pycuda.driver.LogicError("cuCtxPushCurrent failed: destroyed")
    device.close()
    device.close()
    assert pycuda.names() == ["push", "detach"]


def test_close_of_a_device_that_failed(pycuda: FakePycuda) -> None:
    with CudaDevice() as device, device.active():
        device.allocate(100)
        device.pinned(100)
        for name in ("synchronize", "synchronize aside", "free"):
            pycuda.failures[name] = pycuda.driver.LogicError("an illegal memory access")
    assert pycuda.names()[-3:] == ["free", "pop current", "detach"]


def test_memory_given_back_is_freed_once(pycuda: FakePycuda, device: CudaDevice) -> None:
    with device.active():
        address, memory = device.allocate(100), device.pinned(60)
        assert address == 0x1000
        assert (len(memory), memory.dtype) == (60, np.uint8)
        device.free(address)
        device.free_pinned(memory)
    device.close()
    assert pycuda.names().count("free") == 2


def test_out_of_device_memory(pycuda: FakePycuda, device: CudaDevice) -> None:
    pycuda.failures["mem_alloc"] = pycuda.driver.MemoryError("cuMemAlloc failed: out of memory")
    with device.active(), pytest.raises(OutOfDeviceMemory) as caught:
        device.allocate(9 << 20)
    assert (caught.value.needed, caught.value.free) == (9 << 20, 5000)
    assert str(caught.value).startswith(
        "the GPU has 1 MiB of free memory; expected 9 MiB for one buffer; "
    )


def test_out_of_memory_elsewhere(pycuda: FakePycuda, device: CudaDevice) -> None:
    pycuda.failures["event"] = pycuda.driver.MemoryError("cuEventCreate failed: out of memory")
    with device.active(), pytest.raises(OutOfDeviceMemory, match="expected more for") as caught:
        device.event()
    assert caught.value.needed is None


def test_no_memory_for_a_context(pycuda: FakePycuda) -> None:
    pycuda.failures["retain"] = pycuda.driver.MemoryError("cuDevicePrimaryCtxRetain failed")
    pycuda.failures["mem_get_info"] = pycuda.driver.LogicError("invalid device context")
    pycuda.stack.append("that mem_get_info may be asked")
    with pytest.raises(OutOfDeviceMemory, match="has 0 MiB of free memory"):
        CudaDevice()


def test_out_of_page_locked_memory(pycuda: FakePycuda, device: CudaDevice) -> None:
    pycuda.failures["pagelocked_empty"] = pycuda.driver.MemoryError("cuMemHostAlloc failed")
    with device.active(), pytest.raises(DeviceError, match="no 9 MiB of page-locked") as caught:
        device.pinned(9 << 20)
    assert not isinstance(caught.value, OutOfDeviceMemory)  # smaller batches would not help


# What it does


def test_copies_and_markers(pycuda: FakePycuda, device: CudaDevice) -> None:
    with device.active():
        host = device.pinned(60)
        event = device.event()
        pycuda.calls.clear()
        device.upload(0x2000, host[:30])
        device.zero(0x3000, 7)
        device.download(host[:20], 0x4000)
        device.record(event)
        device.wait(event)
        assert device.seconds(event, event) == 2.5e-3
        device.synchronize()
    assert pycuda.calls[:-1] == [
        ("htod", 0x2000, 30),
        ("memset", 0x3000, 0, 7),
        ("dtoh", 20, 0x4000),
        ("record",),
        ("wait",),
        ("time",),
        ("synchronize",),
    ]


def test_the_stream_waits_for_what_went_aside(pycuda: FakePycuda, device: CudaDevice) -> None:
    with device.active():
        host = device.pinned(60)
        pycuda.calls.clear()
        device.upload_aside(0x2000, host[:30])
        device.join()
        device.synchronize()
    # The marker lies behind the copy in its stream; nothing is created for it.
    assert pycuda.calls[:-1] == [
        ("htod aside", 0x2000, 30),
        ("record aside",),
        ("join",),
        ("synchronize",),
    ]


def test_machine_code_comes_before_ptx(pycuda: FakePycuda, device: CudaDevice) -> None:
    with device.active():
        device.load_kernels({"kernels.ptx": b"text", "kernels.fatbin": b"code"})
    assert ("module", b"code") in pycuda.calls
    assert ("module", b"text") not in pycuda.calls


def test_ptx_where_there_is_no_code_for_the_gpu(pycuda: FakePycuda, device: CudaDevice) -> None:
    with device.active():
        device.load_kernels({"kernels.ptx": b"text", "kernels.fatbin": b"bad"})
    assert ("module", b"text") in pycuda.calls


def test_the_cubin_of_the_gpu_is_taken(pycuda: FakePycuda, device: CudaDevice) -> None:
    files = {f"kernels.sm_{one}.cubin": f"for {one}".encode() for one in (86, 89, 90)}
    with device.active():
        device.load_kernels({**files, "kernels.ptx": b"text"})
    assert [one for one in pycuda.calls if one[0] == "module"] == [("module", b"for 89")]


@pytest.mark.parametrize(
    ("machine_code", "action"),
    [
        (
            "kernels.fatbin",
            "update the NVIDIA driver; or take nvcc off PATH, CUDA_HOME and CUDA_ROOT, pip install "
            "'nvidia-cuda-nvrtc-cu12<12.3' and compile again: trtseg engines build --device cuda",
        ),
        (
            "kernels.sm_89.cubin",
            "update the NVIDIA driver; or pip install 'nvidia-cuda-nvrtc-cu12<12.3' and compile "
            "again: trtseg engines build --device cuda",
        ),
    ],
)
def test_kernels_that_the_driver_does_not_take(
    pycuda: FakePycuda, device: CudaDevice, machine_code: str, action: str
) -> None:
    with device.active(), pytest.raises(EngineError) as caught:
        device.load_kernels({"kernels.ptx": b"bad", machine_code: b"bad"})
    refused = "cuModuleLoadDataEx failed: no kernel image"
    assert caught.value.found == (
        f"the driver loads no kernels ({machine_code}: {refused}; kernels.ptx: {refused})"
    )
    assert caught.value.expected == (
        "kernels compiled for CUDA 12.2, which is the driver's, or earlier"
    )
    assert caught.value.action == action
    pycuda.cuda = 13000
    with device.active(), pytest.raises(EngineError, match=r"'nvidia-cuda-nvrtc<13\.1'"):
        device.load_kernels({"kernels.ptx": b"bad"})


def test_no_kernels_for_this_gpu(device: CudaDevice) -> None:
    with device.active(), pytest.raises(EngineError, match="there are none for this GPU"):
        device.load_kernels({"kernels.sm_90.cubin": b"code"})
    with device.active(), pytest.raises(EngineError, match="there are none"):
        device.load_kernels({})


@pytest.mark.parametrize(("threads", "blocks"), [(1, 1), (256, 1), (257, 2), (10**10, 39062500)])
def test_launch(pycuda: FakePycuda, device: CudaDevice, threads: int, blocks: int) -> None:
    with device.active():
        device.load_kernels({"kernels.ptx": b"text"})
        pycuda.calls.clear()
        for _ in range(2):
            device.launch(Launch("gate", threads, b"0123456789abcdef"))
    launched = ("launch", "gate", (blocks, 1), (256, 1, 1), b"0123456789abcdef")
    prepared = [("get_function", "gate"), ("prepare", "gate", "16s")]
    assert pycuda.calls[:-1] == [*prepared, launched, launched]


ACTIONS = {
    "dtod": lambda device, host, event: device.copy(0x2000, 0x1000, 10),
    "htod": lambda device, host, event: device.upload(0x2000, host),
    "htod aside": lambda device, host, event: device.upload_aside(0x2000, host),
    "record aside": lambda device, host, event: device.join(),
    "join": lambda device, host, event: device.join(),
    "dtoh": lambda device, host, event: device.download(host, 0x4000),
    "memset": lambda device, host, event: device.zero(0x3000, 7),
    "launch": lambda device, host, event: device.launch(Launch("gate", 1, b"01234567")),
    "record": lambda device, host, event: device.record(event),
    "wait": lambda device, host, event: device.wait(event),
    "time": lambda device, host, event: device.seconds(event, event),
    "synchronize": lambda device, host, event: device.synchronize(),
    "mem_get_info": lambda device, host, event: device.memory(),
    "free": lambda device, host, event: device.free_pinned(host),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_a_failing_call_is_a_device_error(
    pycuda: FakePycuda, device: CudaDevice, name: str
) -> None:
    with device.active():
        host, event = device.pinned(60), device.event()
        device.load_kernels({"kernels.ptx": b"text"})
        pycuda.failures[name] = pycuda.driver.LogicError("cuX failed: illegal address\nmore")
        with pytest.raises(DeviceError, match=r"the GPU failed \(cuX failed: illegal address\)"):
            ACTIONS[name](device, host, event)


def test_a_context_that_cannot_be_made_current(pycuda: FakePycuda, device: CudaDevice) -> None:
    pycuda.failures["push"] = pycuda.driver.LogicError("cuCtxPushCurrent failed: destroyed")
    with pytest.raises(DeviceError, match="cuCtxPushCurrent failed"), device.active():
        pass


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 MiB"), (1 << 20, "1 MiB"), (5 << 30, "5120 MiB")]
)
def test_sizes_as_text(size: int, text: str) -> None:
    assert megabytes(size) == text
