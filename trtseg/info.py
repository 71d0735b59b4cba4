"""What is here and what is missing: versions, devices, model sets, built networks, folders."""

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING, Any

from trtseg import __version__
from trtseg.engine import build_command, built_models
from trtseg.errors import DeviceError, TrtsegError
from trtseg.gpu_engine import gpu_build_command
from trtseg.home import checkpoints_root, engines_root, home
from trtseg.packages import PACKAGES, package_version

if TYPE_CHECKING:
    from pathlib import Path

    from trtseg.backends.base import Backend
    from trtseg.engine import Engine

#: Packages that are listed.
LIBRARIES = tuple(name for name in PACKAGES if name != "pillow")

_DRIVER = "libcuda.so.1"
# CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h.
_CAPABILITY = (75, 76)


def gather(engines: Path | None = None) -> dict[str, Any]:
    """Look at everything a run would use; nothing is changed and no device is claimed.

    Parameters
    ----------
    engines : Path, optional
        Folder of built networks; default see `trtseg.home.engines_root`.

    Returns
    -------
    dict
        Plain data for JSON. `versions`; `libraries`, version or None each; `folders`; `devices`,
        with ``cpu`` and ``cuda``; `models`; `engines`; and `missing`, a list of what is not here:
        `for` what, `what` it is, and the `command` that mends it.

    Raises
    ------
    UsageError
        ``$TRTSEG_HOME`` names no folder.
    """
    root = engines_root(engines)
    libraries = {name: package_version(name) for name in LIBRARIES}
    missing: list[dict[str, str]] = []
    cpu = _cpu(missing)
    cuda = _cuda(libraries, missing)
    models = _models(libraries, missing)
    built = _engines(root, [one["name"] for one in models], cpu["usable"], missing)
    if cuda["usable"]:
        _lack_compiled(built, missing)
    return {
        "versions": {
            "trtseg": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "libraries": libraries,
        "folders": {
            "home": str(home()),
            "checkpoints": str(checkpoints_root()),
            "engines": str(root),
        },
        "devices": {"cpu": cpu, "cuda": cuda},
        "models": models,
        "engines": built,
        "missing": missing,
    }


def _lacks(missing: list[dict[str, str]], purpose: str, what: str, command: str) -> None:
    missing.append({"for": purpose, "what": what, "command": command})


# Devices


def _cpu(missing: list[dict[str, str]]) -> dict[str, Any]:
    from trtseg.backends.openvino_library import available_threads

    usable = True
    bf16 = False
    try:
        _open_cpu("f32").close()
    except (TrtsegError, ImportError) as error:
        usable = False
        _lacks(
            missing,
            "cpu",
            f"OpenVINO does not start ({error})",
            "pip install --force-reinstall openvino",
        )
    else:
        bf16 = _has_bf16()
    return {"usable": usable, "cores": available_threads(), "bf16": bf16}


def _open_cpu(precision: str) -> Backend:
    from trtseg.backends import open_cpu

    return open_cpu(precision=precision)


def _has_bf16() -> bool:
    try:
        _open_cpu("bf16").close()
    except TrtsegError:
        return False
    return True


def _cuda(libraries: dict[str, str | None], missing: list[dict[str, str]]) -> dict[str, Any]:
    from trtseg.backends.tensorrt_library import LIBRARIES as TENSORRT
    from trtseg.cuda.device import INSTALL_PYCUDA

    driver, gpus = _driver(missing)
    before = len(missing)
    if libraries["tensorrt"] is None and libraries["tensorrt_rtx"] is None:
        commands = " or ".join(TENSORRT.values())
        _lacks(missing, "cuda", "TensorRT-RTX, or TensorRT for GPUs of a data centre", commands)
    if libraries["pycuda"] is None:
        _lacks(missing, "cuda", "PyCUDA", INSTALL_PYCUDA)
    elif gpus:
        _lack_pycuda(missing)
    return {"usable": bool(gpus) and len(missing) == before, "driver": driver, "gpus": gpus}


def _lack_pycuda(missing: list[dict[str, str]]) -> None:
    """Look whether PyCUDA, which is installed, works with the driver; no context is made."""
    from trtseg.cuda.device import list_gpus

    try:
        list_gpus()
    except DeviceError as error:
        _lacks(missing, "cuda", f"a PyCUDA that works: {error.found}", error.action)


def _driver(missing: list[dict[str, str]]) -> tuple[str | None, list[dict[str, Any]]]:
    driver, gpus = find_gpus()
    if driver is None:
        _lacks(
            missing,
            "cuda",
            f"NVIDIA's driver ({_DRIVER} is not found)",
            "install the driver of your GPU; on Ubuntu: sudo ubuntu-drivers install",
        )
    elif not gpus:
        _lacks(missing, "cuda", "an NVIDIA GPU that the driver sees", "nvidia-smi says why")
    return driver, gpus


def find_gpus() -> tuple[str | None, list[dict[str, Any]]]:
    """Ask the driver's own library for the GPUs it sees.

    PyCUDA is not asked: it cannot be imported without a driver, and may be what is missing.

    Returns
    -------
    driver : str or None
        The newest CUDA version that it supports, such as ``13.0``; None where there is no driver.
    gpus : list of dict
        Of each its ``device`` (``cuda:N``), ``name``, ``compute_capability`` (such as ``8.9``) and
        ``memory_bytes``.
    """
    try:
        library = _open_driver()
    except OSError:
        return None, []
    version = ctypes.c_int()
    count = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    started = library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0
    return (
        f"{version.value // 1000}.{version.value % 1000 // 10}",
        [_gpu(library, index) for index in range(count.value)] if started else [],
    )


def _open_driver() -> Any:
    return ctypes.CDLL(_DRIVER)


def _gpu(library: Any, index: int) -> dict[str, Any]:
    device = ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), device)
    numbers = []
    for attribute in _CAPABILITY:
        number = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(str(number.value))
    memory = ctypes.c_size_t()
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return {
        "device": f"cuda:{index}",
        "name": name.value.decode("utf-8", "replace"),
        "compute_capability": ".".join(numbers),
        "memory_bytes": memory.value,
    }


# Networks


def _models(
    libraries: dict[str, str | None], missing: list[dict[str, str]]
) -> list[dict[str, str]]:
    from trtseg.models import PUBLISHED, list_models

    if libraries["tensorflow"] is None or libraries["onnx"] is None:
        _lacks(
            missing,
            "building networks",
            "TensorFlow and ONNX, which read and write them",
            "pip install 'trtseg[build]'",
        )
    try:
        found = list_models()
    except TrtsegError as error:
        _lacks(missing, "models", error.found, error.action)
        return []
    if PUBLISHED not in [one.name for one in found]:
        _lacks(
            missing,
            "models",
            "the published weights",
            "trtseg models pull (offline: trtseg models import DIR)",
        )
    return [{"name": one.name, "folder": str(one.folder), "notice": one.notice} for one in found]


def _engines(
    root: Path, models: list[str], loadable: bool, missing: list[dict[str, str]]
) -> list[dict[str, Any]]:
    built = built_models(root)
    for name in models:
        if name not in built:
            _lacks(missing, "engines", f"built networks of {name}", build_command(name))
    return [_engine(root, name, loadable, missing) for name in built]


def _lack_compiled(built: list[dict[str, Any]], missing: list[dict[str, str]]) -> None:
    for one in built:
        if not one["cuda"]:
            name = one["name"]
            _lacks(missing, "cuda", f"compiled networks of {name}", gpu_build_command(name))


def _engine(root: Path, name: str, loadable: bool, missing: list[dict[str, str]]) -> dict[str, Any]:
    from trtseg.chains import HostChain

    state = "intact"
    compiled: dict[str, str] = {}
    try:
        engines, compiled = intact(root, name)
        if loadable:
            HostChain(_open_cpu("f32"), engines).close()
            state = "intact, loads on the CPU"
    except TrtsegError as error:
        state = f"{error.found}; expected {error.expected}" if error.expected else error.found
        _lacks(missing, "engines", f"sound networks of {name}", error.action)
    return {"name": name, "folder": str(root / name), "state": state, "cuda": compiled}


def intact(root: Path, name: str) -> tuple[dict[str, Engine], dict[str, str]]:
    """Verify what is built of a model set, and what is compiled of it for GPUs.

    Parameters
    ----------
    root : Path
        The engines folder.
    name : str

    Returns
    -------
    engines : dict of str to Engine
        By network.
    compiled : dict of str to str
        By network, what is compiled, or what is wrong with it; empty where nothing is.

    Raises
    ------
    ModelError, EngineError
        As `trtseg.chains.load_engines`.
    """
    from trtseg.chains import load_engines, load_gpu_engines
    from trtseg.gpu_engine import gpu_built

    engines = load_engines(name, root)
    compiled: dict[str, str] = {}
    if gpu_built(root, name):
        for net, one in engines.items():
            try:
                compiled[net] = load_gpu_engines({net: one}, root)[net].summary
            except TrtsegError as error:
                compiled[net] = str(error)
    return engines, compiled


# For people


def lines(found: dict[str, Any]) -> list[str]:
    """What `gather` found, for people, line by line."""
    cpu, cuda = found["devices"]["cpu"], found["devices"]["cuda"]
    bf16 = "with bfloat16" if cpu["bf16"] else "without bfloat16"
    gpus = [f"{one['device']} {one['name']} ({one['compute_capability']})" for one in cuda["gpus"]]
    sections = {
        "versions": _pairs(found["versions"]),
        "libraries": _pairs({name: one or "-" for name, one in found["libraries"].items()}),
        "folders": _pairs(found["folders"]),
        "devices": _pairs(
            {
                "cpu": f"{_usable(cpu)}, {cpu['cores']} cores, {bf16}",
                "cuda": ", ".join([_usable(cuda), *gpus]),
            }
        ),
        "models": _pairs({one["name"]: one["notice"] or "-" for one in found["models"]}),
        "engines": [line for one in found["engines"] for line in _engine_lines(one)],
        "missing": [f"for {one['for']}: {one['what']}" + _mend(one) for one in found["missing"]],
    }
    shown = []
    for title, rows in sections.items():
        shown += [title, *(f"  {row}" for row in rows or ["nothing"])]
    return shown


def _engine_lines(one: dict[str, Any]) -> list[str]:
    compiled = [f"  {net.upper()} for GPUs: {state}" for net, state in one["cuda"].items()]
    return [f"{one['name']}  {one['state']}", *compiled]


def _pairs(values: dict[str, str]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"{name:<{width}}  {value}" for name, value in values.items()]


def _usable(device: dict[str, Any]) -> str:
    return "usable" if device["usable"] else "not usable"


def _mend(one: dict[str, str]) -> str:
    return f"; {one['command']}" if one["command"] else ""
