from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trtseg
from trtseg.backends import check_device, open_backend
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
    with pytest.raises(UsageError):
        open_backend(device)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_cpu(device):
    backend = open_backend(device, threads=1)
    assert backend.device == "cpu"
    assert backend.threads == 1  # type: ignore[attr-defined]
    backend.close()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_cuda(device):
    with pytest.raises(DeviceError, match=f"device '{device}'.*--device cpu"):
        open_backend(device)


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
