from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_forms
import numpy as np
import pytest

from tests.backends.fake_tensorrt import FakeTensorRT, engine_bytes
from tests.build.networks import TINY, random_variables
from tests.cuda.executors import SPEC, mixed
from tests.cuda.host_device import HostDevice
from trtseg.architecture import PUBLISHED
from trtseg.backends.tensorrt_library import installed_libraries, open_library
from trtseg.build.forms import FORMS
from trtseg.build.freeze import freeze
from trtseg.engine import Engine
from trtseg.errors import DeviceError


@dataclass(frozen=True)
class Frozen(Engine):
    """A network's weights without a folder."""

    def read(self, name: str) -> bytes:
        return freeze(random_variables(TINY, 1), TINY).to_bytes()


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    def make(spec: Any = TINY, batch: int = 2, capability: str = "8.6") -> Any:
        engine = Frozen(tmp_path, "tiny", "bdn", spec, {})
        return SimpleNamespace(
            capability=capability,
            batch=batch,
            folder=tmp_path,
            frozen=lambda: {"bdn": engine},
            opened_library=lambda: open_library("tensorrt_rtx"),
        )

    return make


@pytest.mark.skipif(
    "tensorrt_rtx" not in installed_libraries(), reason="TensorRT-RTX is not installed"
)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_compiled_and_kept(setting: Callable[..., Any], form: str) -> None:
    ours = setting()
    found = gpu_forms.compiling(ours, form)
    assert found["bdn"]["compile_seconds"] > 0
    content = gpu_forms.kept(ours, form, ours.frozen()["bdn"]).read("b2.engine")
    assert len(content) == found["bdn"]["engine_bytes"] > 10_000


@pytest.mark.skipif(
    "tensorrt_rtx" not in installed_libraries(), reason="TensorRT-RTX is not installed"
)
def test_turing_is_asked_for(setting: Callable[..., Any]) -> None:
    sizes = {
        capability: gpu_forms.compiling(setting(capability=capability), "plain")["bdn"]
        for capability in ("7.5", "8.9")
    }
    assert sizes["7.5"]["engine_bytes"] != sizes["8.9"]["engine_bytes"]


def one_tile() -> tuple[dict[str, Any], Any]:
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.standard_normal((1, 1, side, side, side)).astype(np.float32)
        for name, side in SPEC.input_sizes().items()
    }
    return inputs, mixed(SPEC)({name: one[0, 0] for name, one in inputs.items()})


def test_an_engine_is_run_and_timed(setting: Callable[..., Any]) -> None:
    ours = setting(SPEC, 3)
    device = HostDevice()
    fake = FakeTensorRT(device, SPEC, {"bdn": mixed(SPEC)})
    folder = ours.folder / "plain" / "bdn"
    folder.mkdir(0o700, parents=True)
    path = folder / "b3.engine"
    path.write_bytes(engine_bytes(SPEC, 3, "bdn", scratch=4096))
    path.chmod(0o600)
    engine = gpu_forms.kept(ours, "plain", ours.frozen()["bdn"])
    inputs, answer = one_tile()
    with device.active():
        found = gpu_forms.measured(device, fake.library, engine, 3, inputs, answer)
        other = gpu_forms.measured(device, fake.library, engine, 3, inputs, -answer - 1)
    assert found["seconds_a_batch"] > 0
    assert (found["batch"], found["scratch_bytes"], found["not_finite"]) == (3, 4096, 0)
    assert (found["labels_equal"], found["largest_difference"]) == (1.0, 0.0)
    assert other["labels_equal"] < 1
    assert other["largest_difference"] > 0
    assert device.in_use == 0


def test_a_library_that_does_not_start(setting: Callable[..., Any]) -> None:
    device = HostDevice()
    fake = FakeTensorRT(device, SPEC, {})
    fake.failures = {"runtime"}
    with device.active(), pytest.raises(DeviceError, match=r"tensorrt_rtx does not start \(a rea"):
        gpu_forms.measured(device, fake.library, None, 1, {}, np.zeros(1))


def test_the_tile_at_the_centre_of_the_phantom() -> None:
    inputs = gpu_forms.tile_inputs(PUBLISHED)
    assert {name: one.shape for name, one in inputs.items()} == {
        "normal": (1, 1, 45, 45, 45),
        "sub3": (1, 1, 26, 26, 26),
        "sub5": (1, 1, 22, 22, 22),
    }
    assert all(one.dtype == np.float32 and one.std() > 0.1 for one in inputs.values())


def test_rows_are_timed_and_the_first_is_not_counted() -> None:
    ticks = iter([9.0, 0.5, 0.3, 0.2, 0.4, 0.6])
    calls: list[int] = []
    device = SimpleNamespace(
        event=object,
        record=lambda event: None,
        synchronize=lambda: None,
        seconds=lambda begun, ended: next(ticks),
    )
    assert gpu_forms.row_seconds(device, lambda: calls.append(1)) == pytest.approx(0.02)
    assert len(calls) == 60


def test_how_near_logits_are() -> None:
    answer = np.array([1.0, -2.0], np.float32)
    assert gpu_forms.likeness(np.array([[1.5, -2.0], [-1.0, -2.0]], np.float32), answer) == {
        "not_finite": 0,
        "labels_equal": 0.75,
        "largest_difference": 2.0,
    }
    assert gpu_forms.likeness(np.array([[np.nan, -2.0]], np.float32), answer) == {
        "not_finite": 1,
        "labels_equal": 0.5,
        "largest_difference": None,
    }


def test_what_is_kept_of_a_layer() -> None:
    stored = [{"Name": "y", "Format/Datatype": "Half NDHWC"}]
    layer = {
        "Name": "conv_1",
        "TacticName": "a_kernel",
        "Groups": 1,
        "Inputs": [{"Name": "x"}],
        "Outputs": stored,
        "Weights": {"Type": "Half", "Count": 27},
    }
    assert gpu_forms.layer_facts(layer) == {
        "Name": "conv_1",
        "TacticName": "a_kernel",
        "Groups": 1,
        "Outputs": stored,
    }
    assert gpu_forms.layer_facts("conv_1") == "conv_1"


def test_layers_are_inspected(setting: Callable[..., Any], monkeypatch) -> None:
    told: dict[str, Any] = {"Layers": [{"Name": "a", "Inputs": []}]}
    monkeypatch.setattr(gpu_forms, "inspect_engine", lambda library, content: told)
    ours = setting()
    ours.opened_library = lambda: None
    path = ours.folder / "plain" / "bdn" / "b2.engine"
    path.parent.mkdir(0o700, parents=True)
    path.write_bytes(b"engine")
    path.chmod(0o600)
    assert gpu_forms.inspecting(ours, "plain") == {"bdn": [{"Name": "a"}]}
    told = {"layers of": "another make"}
    assert gpu_forms.inspecting(ours, "plain") == {"bdn": told}


def test_the_fastest_form() -> None:
    timed = {
        "plain": {
            "bdn": {"batch": 16, "seconds_a_batch": 0.02},
            "cgm": {"batch": 16, "seconds_a_batch": 0.01},
        },
        "transposed8": {
            "bdn": {"batch": 4, "seconds_a_batch": 0.004},
            "cgm": {"batch": 16, "seconds_a_batch": 0.03},
        },
    }
    found = gpu_forms.fastest(timed, {"bdn": 17, "cgm": 16})
    assert found["bdn"]["form"] == "transposed8"
    assert found["bdn"]["seconds"] == pytest.approx({"plain": 0.04, "transposed8": 0.02})
    assert found["cgm"] == {"form": "plain", "seconds": {"plain": 0.01, "transposed8": 0.03}}
