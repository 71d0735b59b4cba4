from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trtseg
from trtseg.backends import check_device, open_cpu, open_gpu
from trtseg.errors import DeviceError, UsageError

REFUSED = [
    "",
    "CPU",
    "gpu",
    "cuda:",
    "cuda:x",
    "cuda:-1",
    "cuda:0:1",
    "cuda0",
    "cpu:0",
    "cpu ",
    "cpu\n",
    "auto,cpu",
]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:17"])
def test_devices(device):
    assert check_device(device) == device


@pytest.mark.parametrize("device", REFUSED)
def test_names_that_mean_nothing(device):
    with pytest.raises(UsageError) as caught:
        check_device(device)
    assert str(caught.value) == f"device {device!r}; expected auto, cpu, cuda or cuda:N"


def test_the_cpu():
    backend = open_cpu(threads=1)
    assert backend.device == "cpu"
    assert backend.precision == "f32"
    assert backend.description.startswith("cpu, 1 thread, OpenVINO 20")
    backend.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"precision": "f16"}, "precision 'f16'; expected f32 or bf16"),
        ({"threads": 0}, "0 threads; expected at least 1"),
    ],
)
def test_options_that_mean_nothing(given, said):
    with pytest.raises(UsageError) as caught:
        open_cpu(**given)
    assert str(caught.value) == said


def test_no_gpu(monkeypatch):
    """Whatever this machine has, a driver that cannot be loaded comes first."""
    monkeypatch.setattr("trtseg.cuda.device.DRIVER", "libnone.so.1")
    monkeypatch.setattr("trtseg.backends.tensorrt.open_library", None)  # not even looked for
    with pytest.raises(DeviceError) as caught:
        open_gpu(1)
    assert str(caught.value) == (
        "the NVIDIA driver is missing (libnone.so.1 cannot be loaded); expected libcuda.so.1, "
        "which comes with the driver; install the NVIDIA driver (nvidia-smi must work), or run "
        "with --device cpu"
    )


def test_naming_a_device_imports_no_runtime():
    program = (
        "import sys; from trtseg.backends import check_device; check_device('cpu'); "
        "print('openvino' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(trtseg.__file__).parents[1],
    )
    assert done.stdout == "False\n"
