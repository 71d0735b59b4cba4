from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.test_chains import compiled
from trtseg import info, packages
from trtseg.cuda import device
from trtseg.errors import DeviceError


class FakeDriver:
    """The part of libcuda that is called; one GPU unless told otherwise."""

    def __init__(self, gpus: int = 1, started: int = 0) -> None:
        self.gpus, self.started = gpus, started

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = 13010
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.started

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"RTX 6000"
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> int:  # noqa: N802
        out._obj.value = {75: 12, 76: 0}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: Any) -> int:  # noqa: N802
        out._obj.value = 48 << 30
        return 0


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """The same answers on machines with and without a GPU."""

    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(info, "_open_driver", missing)


def missing(found: dict[str, Any], purpose: str) -> list[str]:
    return [f"{one['what']}: {one['command']}" for one in found["missing"] if one["for"] == purpose]


def test_what_is_here(engines_root):
    found = info.gather(engines_root)
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["trtseg"]
    assert {"numpy", "nibabel", "openvino"} <= {k for k, v in found["libraries"].items() if v}
    assert found["folders"]["engines"] == str(engines_root)
    assert found["devices"]["cpu"]["usable"] is True
    assert found["devices"]["cpu"]["cores"] >= 1
    assert isinstance(found["devices"]["cpu"]["bf16"], bool)
    assert [one["name"] for one in found["models"]] == ["demo"]
    assert [(one["name"], one["state"]) for one in found["engines"]] == [
        ("demo", "intact, loads on the CPU"),
        ("random11", "intact, loads on the CPU"),
    ]
    assert missing(found, "cpu") == missing(found, "engines") == []
    assert missing(found, "models") == [
        "the published weights: trtseg models pull (offline: trtseg models import DIR)"
    ]


def test_nothing_built(tmp_path):
    found = info.gather(tmp_path / "none")
    assert found["engines"] == []
    assert missing(found, "engines") == [
        "built networks of demo: trtseg engines build --models demo"
    ]
    assert not (tmp_path / "none").exists()


def test_a_damaged_build(engines_root, tmp_path):
    shutil.copytree(engines_root / "demo", tmp_path / "demo")
    (tmp_path / "demo" / "cgm" / "fc.onnx").write_bytes(b"")
    found = info.gather(tmp_path)
    [one] = found["engines"]
    assert "fc.onnx" in one["state"]
    assert missing(found, "engines") == [
        "sound networks of demo: build again: trtseg engines build --models demo"
    ]


def test_no_cuda(tmp_path):
    found = info.gather(tmp_path)
    assert found["devices"]["cuda"] == {"usable": False, "driver": None, "gpus": []}
    assert any("libcuda.so.1 is not found" in line for line in missing(found, "cuda"))


@pytest.mark.parametrize("driver", [FakeDriver(gpus=0), FakeDriver(started=100)])
def test_a_driver_without_a_gpu(tmp_path, monkeypatch, driver):
    monkeypatch.setattr(info, "_open_driver", lambda: driver)
    found = info.gather(tmp_path)
    assert found["devices"]["cuda"]["gpus"] == []
    assert found["devices"]["cuda"]["driver"] == "13.1"
    assert "an NVIDIA GPU that the driver sees: nvidia-smi says why" in missing(found, "cuda")


def test_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "_open_driver", lambda: FakeDriver(gpus=2))
    monkeypatch.setitem(packages.PACKAGES, "pycuda", ("numpy",))
    monkeypatch.setattr(device, "list_gpus", list)
    found = info.gather(tmp_path)
    assert found["devices"]["cuda"]["gpus"] == [
        {
            "device": f"cuda:{n}",
            "name": "RTX 6000",
            "compute_capability": "12.0",
            "memory_bytes": 51539607552,
        }
        for n in (0, 1)
    ]
    assert not any("PyCUDA" in line or "GPU" in line for line in missing(found, "cuda"))


def test_nothing_compiled_for_a_gpu(engines_root, tmp_path, monkeypatch):
    monkeypatch.setattr(info, "_open_driver", FakeDriver)
    for name in ("pycuda", "tensorrt_rtx"):
        monkeypatch.setitem(packages.PACKAGES, name, ("numpy",))
    monkeypatch.setattr(device, "list_gpus", list)
    root = shutil.copytree(engines_root, tmp_path / "engines")
    compiled(root, "demo")
    found = info.gather(root)
    assert found["devices"]["cuda"]["usable"] is True
    assert missing(found, "cuda") == [
        "compiled networks of random11: trtseg engines build --models random11 --device cuda"
    ]
    [demo, random11] = found["engines"]
    assert demo["cuda"]["bdn"].startswith("tensorrt_rtx 9.8.7, plain, batches 1, 4, ")
    assert random11["cuda"] == {}
    assert f"    CGM for GPUs: {demo['cuda']['cgm']}" in info.lines(found)


def test_a_pycuda_that_does_not_work(tmp_path, monkeypatch):
    def broken() -> Any:
        raise DeviceError("libcurand.so.10 is not found", action="run ldconfig")

    monkeypatch.setattr(info, "_open_driver", FakeDriver)
    for name in ("pycuda", "tensorrt_rtx"):
        monkeypatch.setitem(packages.PACKAGES, name, ("numpy",))
    monkeypatch.setattr(device, "list_gpus", broken)
    found = info.gather(tmp_path)
    assert found["devices"]["cuda"]["usable"] is False
    assert missing(found, "cuda") == [
        "a PyCUDA that works: libcurand.so.10 is not found: run ldconfig"
    ]


def test_libraries_that_are_not_installed(tmp_path, monkeypatch):
    for name in info.LIBRARIES:
        monkeypatch.setitem(packages.PACKAGES, name, ("no-such-package-here",))
    found = info.gather(tmp_path)
    assert set(found["libraries"].values()) == {None}
    assert missing(found, "building networks") == [
        "TensorFlow and ONNX, which read and write them: pip install 'trtseg[build]'"
    ]
    assert (
        "TensorRT-RTX, or TensorRT for GPUs of a data centre: pip install 'trtseg[rtx]' or pip "
        "install 'trtseg[tensorrt]'"
    ) in missing(found, "cuda")
    assert "PyCUDA: put nvcc of the CUDA toolkit on PATH, then pip install pycuda" in missing(
        found, "cuda"
    )


@pytest.mark.parametrize("error", [DeviceError("no CPU device"), ImportError("no openvino")])
def test_no_openvino(engines_root, monkeypatch, error):
    def broken(precision: str) -> Any:
        raise error

    monkeypatch.setattr(info, "_open_cpu", broken)
    found = info.gather(engines_root)
    assert found["devices"]["cpu"]["usable"] is False
    assert missing(found, "cpu") == [
        f"OpenVINO does not start ({error}): pip install --force-reinstall openvino"
    ]
    assert [one["state"] for one in found["engines"]] == ["intact", "intact"]


def test_no_bfloat16(tmp_path, monkeypatch):
    class Backend:
        def close(self) -> None: ...

    def only_float32(precision: str) -> Any:
        if precision != "f32":
            raise DeviceError("this processor has no bfloat16 arithmetic")
        return Backend()

    monkeypatch.setattr(info, "_open_cpu", only_float32)
    found = info.gather(tmp_path)
    assert found["devices"]["cpu"]["bf16"] is False
    assert any(line.endswith("without bfloat16") for line in info.lines(found))


def test_lines(engines_root: Path, monkeypatch):
    monkeypatch.setattr(info, "_open_driver", FakeDriver)
    lines = info.lines(info.gather(engines_root))
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == [
        "versions", "libraries", "folders", "devices", "models", "engines", "missing",
    ]  # fmt: skip
    text = "\n".join(lines)
    assert "cuda:0 RTX 6000 (12.0)" in text
    assert "intact, loads on the CPU" in text
    assert "for models: the published weights; trtseg models pull" in text


def test_the_driver_is_asked_by_its_own_name(monkeypatch):
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", asked.append)
    info._open_driver()
    assert asked == ["libcuda.so.1"]
