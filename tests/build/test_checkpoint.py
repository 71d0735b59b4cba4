from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.build.networks import Arrays, save_checkpoint
from trtseg.architecture import NETWORKS, PUBLISHED
from trtseg.build import checkpoint
from trtseg.build.variables import network_variables
from trtseg.errors import MissingExtraError, ModelError
from trtseg.home import demo_folder

INDEX, DATA = ".index", ".data-00000-of-00001"
PIP = "pip install 'trtseg[build]'"


def ramp(*shape: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


TENSORS: Arrays = {
    "net/W": ramp(2, 1, 3, 3, 3),
    "net/W_1": ramp(4, 2, 3, 3, 3) * 2,
    "net/b": ramp(2) * 3,
    "trainer/moment": ramp(50) * 4,
}
REQUIRED = {name: TENSORS[name].shape for name in ("net/W", "net/W_1", "net/b")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Suffix to content of an intact checkpoint of TENSORS."""
    prefix = save_checkpoint(tmp_path_factory.mktemp("saved") / "model.ckpt", TENSORS)
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (INDEX, DATA)}


@pytest.fixture
def prefix(files: dict[str, bytes], tmp_path: Path) -> Path:
    """A copy of that checkpoint to damage."""
    for suffix, content in files.items():
        (tmp_path / f"model.ckpt{suffix}").write_bytes(content)
    return tmp_path / "model.ckpt"


def overwrite(prefix: Path, suffix: str, content: bytes) -> None:
    Path(f"{prefix}{suffix}").write_bytes(content)


def flipped(content: bytes, offset: int, mask: int = 0xFF) -> bytes:
    damaged = bytearray(content)
    damaged[offset] ^= mask
    return bytes(damaged)


def read_after(tmp_path: Path, name: str, values: np.ndarray) -> Arrays:
    """Read a checkpoint in which one of TENSORS has other values."""
    changed = save_checkpoint(tmp_path / "other.ckpt", {**TENSORS, name: values})
    return checkpoint.read_variables(changed, REQUIRED)


def test_reads_what_is_required_and_nothing_else(prefix: Path) -> None:
    variables = checkpoint.read_variables(prefix, REQUIRED)
    assert sorted(variables) == ["net/W", "net/W_1", "net/b"]
    for name, values in variables.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, TENSORS[name])


def test_schema_lists_every_tensor_without_the_data(prefix: Path) -> None:
    Path(f"{prefix}{DATA}").unlink()
    assert checkpoint.read_schema(prefix) == {
        "net/W": (2, 1, 3, 3, 3),
        "net/W_1": (4, 2, 3, 3, 3),
        "net/b": (2,),
        "trainer/moment": (50,),
    }


@pytest.mark.parametrize("net", NETWORKS)
def test_reads_the_demo_checkpoints(net: str) -> None:
    required = network_variables(PUBLISHED).required(PUBLISHED)
    variables = checkpoint.read_variables(demo_folder() / f"{net}.model.ckpt", required)
    assert {name: values.shape for name, values in variables.items()} == required
    assert all(values.dtype == np.float32 for values in variables.values())
    assert float(np.abs(variables["net/W_24"]).max()) > 0


def test_missing_tensor_is_named_with_its_shape(prefix: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor net/W_2 is missing; expected shape \(4, 4\)"):
        checkpoint.read_variables(prefix, {**REQUIRED, "net/W_2": (4, 4)})


@pytest.mark.parametrize("shape", [(2,), (1, 2, 3, 3, 3), (54,), ()])
def test_wrong_shape_is_named_with_both_shapes(prefix: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        checkpoint.read_variables(prefix, {"net/W": shape})
    assert "tensor net/W has shape (2, 1, 3, 3, 3)" in caught.value.found
    assert caught.value.expected == str(shape)
    assert "architecture" in caught.value.action


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool", "str"])
def test_wrong_dtype_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ModelError, match=r"tensor net/b is .*; expected float32"):
        read_after(tmp_path, "net/b", np.ones(2).astype(dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    damaged = TENSORS["net/W_1"].copy()
    damaged[3, 1, 2, 2, 2] = value
    with pytest.raises(ModelError, match="tensor net/W_1 holds values that are not finite"):
        read_after(tmp_path, "net/W_1", damaged)


def test_an_unused_tensor_may_hold_anything(tmp_path: Path) -> None:
    variables = read_after(tmp_path, "trainer/moment", np.full(50, np.nan, np.float32))
    np.testing.assert_array_equal(variables["net/W"], TENSORS["net/W"])


@pytest.mark.parametrize("suffix", [INDEX, DATA])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(ModelError) as caught:
        checkpoint.read_variables(prefix, REQUIRED)
    assert caught.value.found == f"{prefix}{suffix}: no such file"
    assert "trtseg models import" in caught.value.action


def test_schema_of_a_missing_index(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.ckpt\.index: no such file"):
        checkpoint.read_schema(tmp_path / "none.ckpt")


@pytest.mark.parametrize("name", ["net/W", "net/W_1", "net/b"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_in_a_required_tensor_is_named(
    prefix: Path, files: dict[str, bytes], name: str, place: str
) -> None:
    stored = TENSORS[name].tobytes()
    start = files[DATA].index(stored)
    offset = {"first": 0, "middle": len(stored) // 2, "last": len(stored) - 1}[place]
    overwrite(prefix, DATA, flipped(files[DATA], start + offset, 0x01))
    reason = rf"tensor {name} cannot be read \(.*[Cc]hecksum"
    with pytest.raises(ModelError, match=reason) as caught:
        checkpoint.read_variables(prefix, REQUIRED)
    assert "fetch or import it again" in caught.value.action


def test_a_flipped_byte_in_an_unused_tensor_does_not_matter(
    prefix: Path, files: dict[str, bytes]
) -> None:
    stored = TENSORS["trainer/moment"].tobytes()
    offset = files[DATA].index(stored) + len(stored) // 2
    overwrite(prefix, DATA, flipped(files[DATA], offset))
    variables = checkpoint.read_variables(prefix, REQUIRED)
    for name in REQUIRED:
        np.testing.assert_array_equal(variables[name], TENSORS[name])


@pytest.mark.parametrize("kept", [0, 1, 100, 215, 216, 217, 1080])
def test_truncated_data_is_refused(prefix: Path, files: dict[str, bytes], kept: int) -> None:
    # net/W takes the first 216 bytes, net/W_1 864 more, net/b the next 8.
    assert len(files[DATA]) == 216 + 864 + 8 + 200
    overwrite(prefix, DATA, files[DATA][:kept])
    name = "net/W" if kept < 216 else "net/W_1" if kept < 1080 else "net/b"
    with pytest.raises(ModelError, match=rf"tensor {name} cannot be read"):
        checkpoint.read_variables(prefix, REQUIRED)


def test_truncated_index_is_refused(prefix: Path, files: dict[str, bytes]) -> None:
    for kept in range(0, len(files[INDEX]), 7):
        overwrite(prefix, INDEX, files[INDEX][:kept])
        with pytest.raises(ModelError, match="not a readable checkpoint index"):
            checkpoint.read_variables(prefix, REQUIRED)
        with pytest.raises(ModelError, match="not a readable checkpoint index"):
            checkpoint.read_schema(prefix)


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_flipped_byte_anywhere_in_the_index_is_refused_or_harmless(
    prefix: Path, files: dict[str, bytes], mask: int
) -> None:
    # Some bytes of the format carry no meaning; damage there may pass, but only unchanged.
    refused = 0
    for offset in range(len(files[INDEX])):
        overwrite(prefix, INDEX, flipped(files[INDEX], offset, mask))
        try:
            variables = checkpoint.read_variables(prefix, REQUIRED)
        except ModelError:
            refused += 1
            continue
        for name in REQUIRED:
            np.testing.assert_array_equal(variables[name], TENSORS[name])
    assert refused > 0.75 * len(files[INDEX])


def test_files_that_are_no_checkpoint(prefix: Path) -> None:
    overwrite(prefix, INDEX, b"<html>404: Not Found</html>" * 20)
    with pytest.raises(ModelError, match="not a readable checkpoint index"):
        checkpoint.read_variables(prefix, REQUIRED)


def test_without_tensorflow_the_pip_command_is_given(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert not checkpoint.is_available()
    for attempt in (
        lambda: checkpoint.read_variables(prefix, REQUIRED),
        lambda: checkpoint.read_schema(prefix),
        checkpoint.tensorflow_version,
    ):
        with pytest.raises(MissingExtraError) as caught:
            attempt()
        assert caught.value.action == PIP
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_missing_files_are_told_before_a_missing_tensorflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ModelError, match="no such file") as caught:
        checkpoint.read_variables(tmp_path / "model.ckpt", REQUIRED)
    assert not isinstance(caught.value, MissingExtraError)


class StandIn:
    """Imports as tensorflow, and notes which GPUs the process showed while it was imported."""

    def __init__(self) -> None:
        self.visible: str | None = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        return importlib.machinery.ModuleSpec(name, self) if name == "tensorflow" else None

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        module.__version__ = "0.stand-in"


@pytest.mark.parametrize("before", [None, "", "0,1"])
def test_tensorflow_sees_no_gpu_and_the_environment_stays(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    finder = StandIn()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # noted by monkeypatch, then taken out
    monkeypatch.delitem(sys.modules, "tensorflow")
    assert checkpoint.tensorflow_version() == "0.stand-in"
    assert finder.visible == "-1"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_tensorflow_is_available_here() -> None:
    assert checkpoint.is_available()
    assert int(checkpoint.tensorflow_version().split(".")[0]) == 2
