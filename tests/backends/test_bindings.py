"""What trtseg asks of TensorRT 10 and 11, held against NVIDIA's own Python bindings of them.

The bindings are small packages of their own, installable anywhere; the libraries they link to are
not, so stubs stand for those: see bindings_stub.c. How a GPU behaves is not tested.
``scripts/gpu-layers`` fetches the packages, and what runs beneath them, and runs this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: A folder for each bindings' wheel; beside it, or not, the libraries of a TensorRT-RTX.
FOLDER = os.environ.get("TRTSEG_BINDINGS")
WHEELS = sorted(Path(FOLDER).glob("*/tensorrt_*_bindings-*.whl")) if FOLDER else []
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


@pytest.mark.skipif(not WHEELS, reason="no bindings: run scripts/gpu-layers")
@pytest.mark.parametrize("wheel", WHEELS, ids=[wheel.parent.name for wheel in WHEELS])
@pytest.mark.parametrize("beneath", [False, True], ids=["nothing", "TensorRT-RTX"])
def test_bindings(wheel: Path, beneath: bool, tmp_path: Path) -> None:
    [libraries] = wheel.parent.glob("tensorrt_rtx_libs")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    package = tmp_path / "tensorrt"  # as NVIDIA's package of that name has it
    package.mkdir()
    (package / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n", "utf-8"
    )
    compiler = shutil.which("gcc")
    assert compiler is not None
    major = wheel.parent.name.partition(".")[0]
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        made = ["-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", tmp_path / file]
        subprocess.run([compiler, *made, HERE / "bindings_stub.c", "-ldl"], check=True)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}",
        "PYTHONPATH": str(tmp_path),
        "TRTSEG_BENEATH": str(libraries),
    }
    if not beneath:
        del environment["TRTSEG_BENEATH"]
    options = ["-q", "-p", "no:cacheprovider", "-k", "builder" if beneath else "not builder"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/backends/on_bindings.py"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
