"""Who may import whom: arrows point down, heavy packages have one importer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trtseg"

#: Module to floor; a module imports lower floors, and its own floor only where listed in SAME.
FLOORS = {
    "errors": 0,
    "scan": 0,
    "affine": 0,
    "architecture": 0,
    "files": 0,
    "home": 0,
    "locks": 0,
    "logs": 0,
    "packages": 0,
    "volumefile": 0,
    "nifti": 1,
    "masks": 1,
    "normalise": 1,
    "orientation": 1,
    "tiling": 1,
    "engine": 1,
    "sealed": 1,
    "gpu_engine": 1,
    "phases": 1,
    "models": 1,
    "modelconfig": 1,
    "modelinstall": 1,
    "qc": 1,
    "sidecar": 1,
    "backends": 2,
    "backends.base": 2,
    "backends.cpu_ceilings": 2,
    "backends.fake": 2,
    "backends.openvino": 2,
    "backends.openvino_library": 2,
    "backends.tensorrt_library": 2,
    "backends.tensorrt": 2,
    "backends.work": 2,
    "cuda": 2,
    "cuda.ceilings": 2,
    "cuda.chain": 2,
    "cuda.compile": 2,
    "cuda.device": 2,
    "cuda.launches": 2,
    "cuda.memory": 2,
    "build": 3,
    "build.variables": 3,
    "build.checkpoint": 3,
    "build.reference": 3,
    "build.freeze": 3,
    "build.graph": 3,
    "build.parts": 3,
    "build.builder": 3,
    "build.transposed": 3,
    "build.forms": 3,
    "build.half": 3,
    "build.tensorrt": 3,
    "chains": 3,
    "pipeline": 3,
    "output": 3,
    "report": 3,
    "batch": 4,
    "bench": 4,
    "bids": 4,
    "options": 4,
    "screen": 4,
    "info": 4,
    "steps": 4,
    "cli_bids": 5,
    "cli_engines": 5,
    "cli_models": 5,
    "cli": 5,
}

#: Floor 3 holds two families that never meet, the build and the runtime; within the runtime, who
#: may import whom.
SAME = {("output", "pipeline"), ("pipeline", "chains")}

#: Package to the one module that may import it.
SOLE_IMPORTERS = {
    "nibabel": "nifti",
    "pooch": "modelinstall",
    "openvino": "backends.openvino_library",
    "tensorflow": "build.checkpoint",
    "onnx": "build.graph",
    "tensorrt": "backends.tensorrt_library",
    "tensorrt_rtx": "backends.tensorrt_library",
    "pycuda": "cuda.device",
    "scipy": "qc",
    "PIL": "report",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set(FLOORS)


@pytest.mark.parametrize(("name", "path"), modules().items())
def test_arrows_point_down(name: str, path: Path) -> None:
    ours = {n.removeprefix("trtseg.") for n in imports(path) if n.startswith("trtseg.")}
    for other in ours & set(FLOORS):
        same_family = other.split(".")[0] == name.split(".")[0]
        assert FLOORS[other] <= FLOORS[name], f"{name} imports {other}, which is above it"
        if FLOORS[other] == FLOORS[name] == 3 and not same_family:
            assert (name, other) in SAME, f"{name} imports its sibling {other}"


@pytest.mark.parametrize(("package", "owner"), SOLE_IMPORTERS.items())
def test_a_heavy_package_has_one_importer(package: str, owner: str) -> None:
    importers = {
        name
        for name, path in modules().items()
        if any(n == package or n.startswith(f"{package}.") for n in imports(path))
    }
    assert importers == {owner}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = run_python(
        "import sys, trtseg, trtseg.cli\n"
        "print(*(m for m in ('numpy', 'scipy', 'nibabel', 'openvino', 'tensorflow', 'onnx',"
        " 'pooch', 'requests', 'rich.console') if m in sys.modules))"
    )
    assert loaded.split() == []


def test_every_module_imports_without_the_optional_packages() -> None:
    blocked = ["tensorflow", "onnx", "tensorrt", "tensorrt_rtx", "pycuda", "cuda"]
    run_python(
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {sorted(modules())!r}: importlib.import_module('trtseg.' + name)"
    )


def test_the_runtime_never_imports_tensorflow(engines_root: Path) -> None:
    run_python(
        "import sys, numpy as np\n"
        "sys.modules.update(dict.fromkeys(['tensorflow', 'onnx']))\n"
        "import trtseg\n"
        "scan = np.random.default_rng(0).normal(size=(12, 13, 14))\n"
        f"result = trtseg.segment(scan, np.eye(4), models='demo', engines={str(engines_root)!r})\n"
        "assert result.cortex.shape == (12, 13, 14)"
    )
