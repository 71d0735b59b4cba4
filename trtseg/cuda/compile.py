"""The CUDA kernels, compiled from their one source: by nvcc where there is one, else by NVRTC.

Neither needs a GPU or a driver. Both give machine code for the GPUs of `ARCHITECTURES`, nvcc in one
fatbin and NVRTC in a file for each, and PTX, which the driver compiles for any other GPU. A driver
takes machine code of every compiler of its own major version of CUDA and of older ones, but only
PTX that is no newer than itself (NVIDIA's "CUDA Compatibility", minor version compatibility).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trtseg.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Collection

#: File name of the kernels as PTX, and as fatbin.
PTX = "kernels.ptx"
FATBIN = "kernels.fatbin"

#: The oldest GPUs the kernels are compiled for (Turing): the oldest that CUDA 13 and TensorRT-RTX
#: know.
VIRTUAL = "compute_75"

#: GPUs that machine code is made for, where the compiler knows them. Code for one runs on later
#: ones of the same major number, and PTX covers the rest.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# Fused multiply-adds would round differently from the host build that the tests compare with, and
# these kernels wait for memory, not for arithmetic.
_NO_FMA = "-fmad=false"

_SOURCE = Path(__file__).with_name("kernels.cu")


class Compiler(Protocol):
    """Something that compiles the kernels."""

    @property
    def name(self) -> str:
        """Which compiler, in which version: what a manifest says."""

    def compile(self, source: str) -> dict[str, bytes]:
        """Compile CUDA C++; file name to content.

        Raises
        ------
        EngineError
            The compiler refuses the source.
        """


def kernel_source() -> str:
    """The kernels' source text."""
    return _SOURCE.read_text(encoding="utf-8")


def compile_kernels(compiler: Compiler | None = None) -> dict[str, bytes]:
    """Compile the kernels.

    Parameters
    ----------
    compiler : Compiler, optional
        Default `find_compiler()`.

    Returns
    -------
    dict of str to bytes
        File name to content: ``kernels.ptx``, which ends in a zero byte as the driver wants it, and
        machine code: with nvcc ``kernels.fatbin``, with NVRTC one ``kernels.sm_XX.cubin`` for each
        of `ARCHITECTURES` that it knows.

    Raises
    ------
    MissingExtraError
        There is no compiler.
    EngineError
        It fails.
    """
    return (find_compiler() if compiler is None else compiler).compile(kernel_source())


def cubin_file(architecture: str) -> str:
    """File name of the machine code for one GPU, such as ``sm_90``."""
    return f"kernels.{architecture}.cubin"


def loadable(names: Collection[str], capability: tuple[int, int]) -> list[str]:
    """Those of the kernels' files that a GPU may be able to run, in the order to try them.

    Machine code comes before PTX. Of the cubins that is the one for the GPU itself, or else for the
    nearest earlier one of its major number; which GPUs a fatbin is for, the driver finds out.

    Parameters
    ----------
    names : collection of str
        File names of `compile_kernels`.
    capability : tuple of int
        The GPU's compute capability, major and minor.
    """
    major, minor = capability
    cubins = [cubin_file(f"sm_{major}{one}") for one in range(minor, -1, -1)]
    nearest = [name for name in cubins if name in names][:1]
    return [name for name in (FATBIN, *nearest, PTX) if name in names]


def find_compiler() -> Compiler:
    """The best compiler of this machine: nvcc, else NVRTC.

    Raises
    ------
    MissingExtraError
        There is none.
    """
    nvcc = find_nvcc()
    if nvcc is not None:
        return nvcc
    nvrtc = find_nvrtc()
    if nvrtc is not None:
        return nvrtc
    raise MissingExtraError(
        "no compiler for the CUDA kernels",
        expected="nvcc of the CUDA toolkit, on PATH or below CUDA_HOME, or NVIDIA's NVRTC package",
        action="pip install nvidia-cuda-nvrtc-cu12",
    )


def find_nvcc() -> Nvcc | None:
    """Nvcc on PATH or below ``$CUDA_HOME`` or ``$CUDA_ROOT``, if it runs."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_ROOT") if os.environ.get(name)]
    for folder in (None, *(str(Path(home) / "bin") for home in homes)):
        found = shutil.which("nvcc", path=folder)
        if found is not None:
            version = _output([found, "--version"])
            release = re.search(r"release [\d.]+, V([\d.]+)", version or "")
            if release is not None:
                return Nvcc(found, release[1])
    return None


def find_nvrtc() -> Nvrtc | None:
    """NVRTC of one of NVIDIA's Python packages, if it loads."""
    for path in _nvrtc_libraries():
        try:
            for part in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(part))  # which it opens by name; not all versions look beside them
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return Nvrtc(library, f"{major.value}.{minor.value}")
    return None


def _nvrtc_libraries() -> list[Path]:
    """Libraries of the installed packages, the oldest first: drivers refuse what is too new."""
    # Not by importing `nvidia`: some of the packages make that a package of their own, which hides
    # those in other folders.
    found = [
        path
        for folder in sys.path
        for path in Path(folder, "nvidia").glob("*/lib/libnvrtc.so.*")
        if path.suffix[1:].isdigit()  # beside them lie variants such as libnvrtc.alt.so.12
        and path.name.startswith("libnvrtc.so.")
    ]
    return sorted(found, key=lambda path: int(path.suffix[1:]))


@dataclass(frozen=True)
class Nvcc:
    """The CUDA toolkit's compiler; it needs a C++ compiler beside it.

    Attributes
    ----------
    path, version : str
    """

    path: str
    version: str

    @property
    def name(self) -> str:
        """``nvcc`` and its version."""
        return f"nvcc {self.version}"

    def compile(self, source: str) -> dict[str, bytes]:
        """Compile to PTX and a fatbin; see `Compiler`."""
        known = (_output([self.path, "--list-gpu-code"]) or "").split()
        real = [
            f"-gencode=arch={name.replace('sm', 'compute')},code={name}"
            for name in ARCHITECTURES
            if name in known
        ]
        virtual = f"-gencode=arch={VIRTUAL},code={VIRTUAL}"
        with tempfile.TemporaryDirectory(prefix="trtseg-") as name:
            folder = Path(name)
            (folder / _SOURCE.name).write_text(source, encoding="utf-8")
            ptx = self._run(folder, ["-ptx", f"-arch={VIRTUAL}"], PTX)
            # Compressed, the machine code of all GPUs takes a tenth.
            options = ["-fatbin", "-Xfatbin=-compress-all", "--threads=0", *real, virtual]
            fatbin = self._run(folder, options, FATBIN)
        return {PTX: _terminated(ptx), FATBIN: fatbin}

    def _run(self, folder: Path, options: list[str], target: str) -> bytes:
        # Names without folders: what goes into the build says nothing of this machine.
        command = [self.path, *options, _NO_FMA, "-o", target, _SOURCE.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise _refused(self.name, done.stderr + done.stdout)
        return (folder / target).read_bytes()


class Nvrtc:
    """NVIDIA's compiler as a library; it needs no C++ compiler.

    Parameters
    ----------
    library : ctypes.CDLL
    version : str
    """

    def __init__(self, library: ctypes.CDLL, version: str) -> None:
        self._library = library
        self.version = version

    @property
    def name(self) -> str:
        """``NVRTC`` and its version."""
        return f"NVRTC {self.version}"

    def compile(self, source: str) -> dict[str, bytes]:
        """Compile to PTX and a cubin for each GPU; see `Compiler`."""
        cubins = {
            cubin_file(name): self._compiled(source, name, "CUBIN")
            for name in self._architectures()
        }
        return {PTX: _terminated(self._compiled(source, VIRTUAL, "PTX")), **cubins}

    def _architectures(self) -> list[str]:
        """Those of `ARCHITECTURES` that this version knows."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        names = {f"sm_{number}" for number in known}
        return [name for name in ARCHITECTURES if name in names]

    def _compiled(self, source: str, architecture: str, kind: str) -> bytes:
        """Compile for one architecture; `kind` is what NVRTC calls the result."""
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            _SOURCE.name.encode(),
            ctypes.c_int(0),
            None,
            None,
        )
        try:
            options = [f"--gpu-architecture={architecture}".encode(), f"-{_NO_FMA}".encode()]
            compiled = self._library.nvrtcCompileProgram(
                program, ctypes.c_int(len(options)), (ctypes.c_char_p * len(options))(*options)
            )
            if compiled != 0:
                log = self._content(program, "ProgramLog").rstrip(b"\0")
                raise _refused(self.name, log.decode("utf-8", "replace"))
            return self._content(program, kind)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _content(self, program: ctypes.c_void_p, kind: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, content)
        return content.raw

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise _refused(self.name, f"{function} returned {code}")


def _terminated(text: bytes) -> bytes:
    """PTX with the zero byte at its end that the driver looks for."""
    return text.rstrip(b"\0") + b"\0"


def _output(command: list[str]) -> str | None:
    """What a command prints; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _refused(compiler: str, log: str) -> EngineError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line or "fatal" in line]
    said = (errors or lines or ["it says nothing"])[0]
    return EngineError(
        f"{compiler} cannot compile the CUDA kernels ({said})",
        expected="a compiler that knows CUDA C++ and, for nvcc, a C++ compiler on PATH",
        action="repair it, or take it off PATH and pip install nvidia-cuda-nvrtc-cu12",
    )
