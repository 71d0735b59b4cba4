from __future__ import annotations

import re
import shutil
import stat
import struct
from pathlib import Path

import pytest

from trtseg.cuda import compile as module
from trtseg.cuda.compile import (
    ARCHITECTURES,
    FATBIN,
    PTX,
    compile_kernels,
    cubin_file,
    find_compiler,
    loadable,
)
from trtseg.cuda.launches import VOXEL_TYPES
from trtseg.errors import EngineError, MissingExtraError

ENTRIES = {
    "reduce",
    "finish_mean",
    "finish_deviation",
    "gather",
    "scatter",
    "gate",
    "count_labels",
    "roi_planes",
    "roi_boxes",
    *(f"{kind}_{name}" for kind in ("sum", "squares", "normalise") for name in VOXEL_TYPES),
}

nvcc = pytest.mark.skipif(module.find_nvcc() is None, reason="no nvcc on PATH or in CUDA_HOME")
nvrtc = pytest.mark.skipif(
    module.find_nvrtc() is None, reason="NVRTC is not installed (nvidia-cuda-nvrtc-cu12)"
)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any compiler; the folder is its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CUDA_HOME", "CUDA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_nvrtc_libraries", list)
    return folder


def program(path: Path, script: str) -> None:
    """An executable that runs a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def check_ptx(ptx: bytes) -> None:
    assert ptx.endswith(b"\0")
    assert ptx.count(b"\0") == 1
    text = ptx[:-1].decode()
    assert ".target sm_75" in text
    assert set(re.findall(r"\.entry (\w+)", text)) == ENTRIES
    assert "fma.rn.f64" not in text  # sums round as they do on the host


def check_cubin(cubin: bytes, architecture: str) -> None:
    """Look into an ELF file by the layout of elf(5); what is CUDA's in it, by what nvcc writes."""
    assert cubin.startswith(b"\x7fELF\x02\x01")
    machine, flags = struct.unpack_from("<18xH28xI", cubin)
    assert machine == 190  # EM_CUDA
    number = flags >> 8 if cubin[7] == 0x41 else flags  # two layouts, told apart by the OS/ABI
    assert f"sm_{number & 0xFF}" == architecture
    assert entries(cubin) == ENTRIES


def entries(cubin: bytes) -> set[str]:
    """Names of the global functions in an ELF file's table of symbols."""
    (begin,) = struct.unpack_from("<40xQ", cubin)
    size, count = struct.unpack_from("<58xHH", cubin)
    # Type, offset, size and link of each section.
    sections = [
        struct.unpack_from("<4xI16xQQI", cubin, begin + number * size) for number in range(count)
    ]
    [(_, offset, length, link)] = [one for one in sections if one[0] == 2]  # SHT_SYMTAB
    names = sections[link][1]
    found = set()
    for symbol in range(offset, offset + length, 24):
        name, kind = struct.unpack_from("<IB", cubin, symbol)
        if kind == 0x12:  # STB_GLOBAL, STT_FUNC
            found.add(cubin[names + name : cubin.index(b"\0", names + name)].decode())
    return found


@nvcc
@pytest.mark.slow
def test_nvcc() -> None:
    compiler = module.find_nvcc()
    files = compile_kernels(compiler)
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", compiler.name)
    assert sorted(files) == [FATBIN, PTX]
    check_ptx(files[PTX])
    assert files[FATBIN].startswith(bytes.fromhex("50ed55ba"))  # a fatbin's magic number
    assert b"trtseg-" not in b"".join(files.values())  # the folder it was compiled in


@nvrtc
def test_nvrtc() -> None:
    compiler = module.find_nvrtc()
    files = compile_kernels(compiler)
    assert re.fullmatch(r"NVRTC \d+\.\d+", compiler.name)
    check_ptx(files.pop(PTX))
    assert {"kernels.sm_75.cubin", "kernels.sm_90.cubin"} <= set(files)
    for architecture in ARCHITECTURES:
        if cubin_file(architecture) in files:
            check_cubin(files.pop(cubin_file(architecture)), architecture)
    assert not files


@nvrtc
def test_nvrtc_says_what_it_refuses() -> None:
    with pytest.raises(EngineError, match=r"NVRTC .* cannot compile .*kernels\.cu\(1\): error"):
        module.find_nvrtc().compile("no C++")


ALL = ["kernels.ptx", "kernels.fatbin", *map(cubin_file, ("sm_80", "sm_86", "sm_90", "sm_100"))]


@pytest.mark.parametrize(
    ("capability", "cubins"),
    [
        ((7, 5), []),
        ((8, 0), ["kernels.sm_80.cubin"]),
        ((8, 6), ["kernels.sm_86.cubin"]),
        ((8, 9), ["kernels.sm_86.cubin"]),
        ((9, 0), ["kernels.sm_90.cubin"]),
        ((10, 0), ["kernels.sm_100.cubin"]),
        ((10, 3), ["kernels.sm_100.cubin"]),
        ((12, 0), []),
    ],
)
def test_what_a_gpu_may_run(capability: tuple[int, int], cubins: list[str]) -> None:
    assert loadable(ALL, capability) == ["kernels.fatbin", *cubins, "kernels.ptx"]


def test_what_a_gpu_may_run_of_what_is_there() -> None:
    assert loadable(["kernels.ptx"], (8, 6)) == ["kernels.ptx"]
    assert loadable(["kernels.sm_80.cubin", "others"], (8, 6)) == ["kernels.sm_80.cubin"]
    assert loadable([], (8, 6)) == []


def test_no_compiler(bare: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"nvcc .*; pip install nvidia-cuda-nvrtc-cu12$"):
        compile_kernels()


def test_an_nvcc_that_does_not_run_is_none(bare: Path) -> None:
    program(bare / "nvcc", "exit 3")
    with pytest.raises(MissingExtraError):
        find_compiler()


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_ROOT"])
def test_nvcc_of_a_named_toolkit(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    program(tmp_path / "toolkit" / "bin" / "nvcc", "echo release 12.8, V12.8.93")
    monkeypatch.setenv(variable, str(tmp_path / "toolkit"))
    assert find_compiler().name == "nvcc 12.8.93"


def test_nvcc_says_what_it_refuses(bare: Path) -> None:
    program(
        bare / "nvcc",
        "case $1 in\n--version) echo release 12.8, V12.8.93;;\n--list-gpu-code) echo sm_75;;\n"
        "*) echo gcc: not found >&2; echo nvcc fatal: no host compiler >&2; exit 1;;\nesac",
    )
    with pytest.raises(EngineError, match=r"nvcc 12\.8\.93 .*\(nvcc fatal: no host compiler\)"):
        compile_kernels()


def test_nvcc_is_asked_for_the_gpus_it_knows(bare: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program(
        bare / "nvcc",
        "case $1 in\n--version) echo release 11.8, V11.8.89;;\n"
        "--list-gpu-code) echo sm_70 sm_75 sm_80 sm_90;;\n"
        f'*) echo "$@" >> {log}; while [ "$1" != -o ]; do shift; done; echo x > "$2";;\nesac',
    )
    assert compile_kernels() == {PTX: b"x\n\0", FATBIN: b"x\n"}
    ptx, fatbin = log.read_text(encoding="utf-8").splitlines()
    assert ptx == "-ptx -arch=compute_75 -fmad=false -o kernels.ptx kernels.cu"
    assert re.findall(r",code=(\w+)", fatbin) == ["sm_75", "sm_80", "sm_90", "compute_75"]


def test_the_oldest_nvrtc_is_taken_and_variants_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "cu13/lib/libnvrtc.so.13",
        "cuda_nvrtc/lib/libnvrtc.so.12",
        "cuda_nvrtc/lib/libnvrtc.alt.so.12",
        "cuda_nvrtc/lib/libnvrtc-builtins.so.12.9",
    ):
        path = tmp_path / "nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = [
        path.relative_to(tmp_path).as_posix()
        for path in module._nvrtc_libraries()
        if path.is_relative_to(tmp_path)  # the machine may have the packages too
    ]
    assert found == [
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "nvidia/cu13/lib/libnvrtc.so.13",
    ]
