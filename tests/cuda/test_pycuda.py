"""`trtseg.cuda.device` through PyCUDA itself, where it is installed, on a driver that is the host.

What PyCUDA makes of our calls (how parameters are packed, when a context must be current, what is
freed and when) is thereby tested without a GPU; how a GPU behaves is not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trtseg.backends.tensorrt_library import installed_libraries
from trtseg.cuda.compile import kernel_source

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS = ["tests/cuda/on_host_driver.py", "tests/gpu/test_gpu.py"]
#: Of the GPU's own tests those that need no network.
KERNELS = "not test_gpu or test_z_scores_and_padding or test_tiles_in_and_decisions_out"


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is None, reason="pycuda is not installed")
@pytest.mark.skipif(not installed_libraries(), reason="no TensorRT to name")
@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "g++", "nm"))), reason="no gcc, g++ or nm")
def test_pycuda_on_the_host(tmp_path: Path) -> None:
    driver, kernels = tmp_path / "libcuda.so.1", tmp_path / "kernels.so"
    own = (HERE / "host_driver.c").read_text("utf-8")
    rest = "\n".join(f"int {name}(void) {{ return 801; }}" for name in sorted(wanted() - made(own)))
    options = ["-shared", "-fPIC", "-O1", "-o"]
    build(["gcc", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", *options, str(driver)], own + rest)
    host = ["-std=c++17", "-ffp-contract=off", "-DTRTSEG_HOST", "-x", "c++", "-"]
    build(["g++", *host, *options, str(kernels)], kernel_source())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", KERNELS, *TESTS],
        env={**os.environ, "LD_PRELOAD": str(driver), "TRTSEG_HOST_KERNELS": str(kernels)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def wanted() -> set[str]:
    """Functions of the driver that PyCUDA links to."""
    spec = importlib.util.find_spec("pycuda")
    assert spec is not None
    assert spec.origin is not None
    [library] = Path(spec.origin).parent.glob("_driver*.so")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    return set(re.findall(r" (cu[A-Z]\w*)", listed.stdout))


def made(source: str) -> set[str]:
    """Functions that the host's driver has."""
    return set(re.findall(r"^Result (cu\w+)\(", source, re.MULTILINE))


def build(command: list[str], source: str) -> None:
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
