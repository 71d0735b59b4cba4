from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

from tests.build.networks import TINY, Arrays, random_variables
from trtseg import tiling
from trtseg.backends import open_backend
from trtseg.backends import openvino as module
from trtseg.backends.openvino import OpenVINOBackend, OpenVINONetwork, available_threads, logistic
from trtseg.build import graph
from trtseg.build.freeze import freeze
from trtseg.build.reference import evaluate
from trtseg.engine import Engine, write_engine
from trtseg.errors import DeviceError, EngineError

# Results of 7 per axis: 2 x 1 x 3 tiles, shifted back at the end of the first and third axis.
SHAPE = (12, 7, 17)
TILES = 6


@pytest.fixture(scope="module")
def variables() -> Arrays:
    return random_variables(TINY, seed=6)


@pytest.fixture(scope="module")
def content(variables: Arrays) -> bytes:
    """The tiny network as ONNX."""
    return graph.plain(freeze(variables, TINY))


@pytest.fixture(scope="module")
def volume() -> NDArray[np.float32]:
    return np.random.default_rng(8).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture
def build(tmp_path: Path) -> Callable[[bytes], Engine]:
    """Writes an intact engine around a graph."""

    def engine(onnx: bytes) -> Engine:
        return write_engine(
            tmp_path / "engines of µ",
            "tiny",
            "bdn",
            spec=TINY,
            files={"network.onnx": onnx, "weights.npz": b"unused at run time"},
            checkpoint={},
            notice="",
            proof={},
            versions={},
        )

    return engine


def test_probabilities_are_those_of_the_checkpoint(
    build: Callable[[bytes], Engine],
    content: bytes,
    variables: Arrays,
    volume: NDArray[np.float32],
) -> None:
    network = OpenVINOBackend(threads=1).load(build(content))
    plan = tiling.plan_tiles(SHAPE, TINY)
    found = network.run(volume, plan, probabilities=True)
    assert network.spec == TINY
    assert found.labels.shape == SHAPE
    assert found.labels.dtype == np.uint8
    assert found.probabilities is not None
    assert found.probabilities.shape == SHAPE
    assert found.probabilities.dtype == np.float32
    expected = np.full(SHAPE, np.nan)
    padded = tiling.pad(volume, plan)
    assert len(plan) == TILES
    for start in plan.starts:
        inputs = tiling.gather(padded, start[None], TINY)
        tile = evaluate(variables, TINY, {name: batch[0] for name, batch in inputs.items()})
        i, j, k = start
        expected[i : i + 7, j : j + 7, k : k + 7] = tile
    np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=1e-5)
    decided = np.abs(expected - 0.5) > 1e-5
    np.testing.assert_array_equal(found.labels[decided], (expected > 0.5)[decided])
    assert 0.1 < found.labels.mean() < 0.9


@pytest.mark.parametrize("batch", [2, 4, 9])
def test_the_batch_does_not_change_the_result(
    content: bytes, volume: NDArray[np.float32], batch: int
) -> None:
    roi = np.ones(SHAPE, bool)
    roi[5:, :, 14:] = False
    roi[:5, :, 10:] = False  # leaves out one tile: 5 fill no batch of 2, 4 or 9
    plan = tiling.plan_tiles(SHAPE, TINY, roi)
    assert len(plan) == TILES - 1
    backend = OpenVINOBackend(threads=1)
    single = OpenVINONetwork(TINY, backend.compile(content, batch=1))
    several = OpenVINONetwork(TINY, backend.compile(content, batch=batch))
    expected = single.run(volume, plan, probabilities=True)
    found = several.run(volume, plan, probabilities=True)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=1e-6)
    decided = np.abs(found.probabilities - 0.5) > 1e-6
    np.testing.assert_array_equal(found.labels[decided], expected.labels[decided])


@pytest.mark.parametrize(("batch", "counts"), [(1, [1] * 6), (4, [4, 2]), (7, [6])])
def test_progress_counts_every_tile_once(
    content: bytes, volume: NDArray[np.float32], batch: int, counts: list[int]
) -> None:
    backend = OpenVINOBackend(threads=1)
    network = OpenVINONetwork(TINY, backend.compile(content, batch=batch))
    told: list[int] = []
    network.run(volume, tiling.plan_tiles(SHAPE, TINY), progress=told.append)
    assert told == counts


def test_three_runs_give_the_same_bits(
    build: Callable[[bytes], Engine], content: bytes, volume: NDArray[np.float32]
) -> None:
    network = OpenVINOBackend(threads=2).load(build(content))
    plan = tiling.plan_tiles(SHAPE, TINY)
    first, *others = (network.run(volume, plan, probabilities=True) for _ in range(3))
    for other in others:
        np.testing.assert_array_equal(other.labels, first.labels)
        np.testing.assert_array_equal(other.probabilities, first.probabilities)


def test_results_belong_to_the_caller(content: bytes, volume: NDArray[np.float32]) -> None:
    network = OpenVINONetwork(TINY, OpenVINOBackend(threads=1).compile(content, batch=1))
    plan = tiling.plan_tiles(SHAPE, TINY)
    before = volume.copy()
    first = network.run(volume, plan, probabilities=True)
    np.testing.assert_array_equal(volume, before)
    assert first.probabilities is not None
    labels, probabilities = first.labels.copy(), first.probabilities.copy()
    network.run(-volume, plan, probabilities=True)
    np.testing.assert_array_equal(first.labels, labels)
    np.testing.assert_array_equal(first.probabilities, probabilities)


def test_without_probabilities_only_labels_are_given(
    content: bytes, volume: NDArray[np.float32]
) -> None:
    network = OpenVINONetwork(TINY, OpenVINOBackend(threads=1).compile(content, batch=1))
    plan = tiling.plan_tiles(SHAPE, TINY)
    found = network.run(volume, plan)
    assert found.probabilities is None
    expected = network.run(volume, plan, probabilities=True)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_a_plan_without_tiles_gives_zeros(content: bytes, volume: NDArray[np.float32]) -> None:
    network = OpenVINONetwork(TINY, OpenVINOBackend(threads=1).compile(content, batch=1))
    plan = tiling.plan_tiles(SHAPE, TINY, np.zeros(SHAPE, bool))
    told: list[int] = []
    found = network.run(volume, plan, probabilities=True, progress=told.append)
    assert told == []
    assert found.probabilities is not None
    assert not found.labels.any()
    assert not found.probabilities.any()


def test_a_tie_is_class_0(variables: Arrays, volume: NDArray[np.float32]) -> None:
    tied = variables | {
        "net/W_10": np.zeros_like(variables["net/W_10"]),
        "net/b_2": np.zeros(2, np.float32),
    }
    onnx = graph.plain(freeze(tied, TINY))
    network = OpenVINONetwork(TINY, OpenVINOBackend(threads=1).compile(onnx, batch=1))
    found = network.run(volume, tiling.plan_tiles(SHAPE, TINY), probabilities=True)
    np.testing.assert_array_equal(found.probabilities, 0.5)
    np.testing.assert_array_equal(found.labels, 0)


def test_float32_is_asked_for_and_granted(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # Processors without bfloat16 units grant it unasked, so both are looked at.
    asked: list[dict[str, str]] = []
    compile_model = openvino.Core.compile_model

    def spy(core: openvino.Core, model: object, device: str, config: dict[str, str]) -> object:
        asked.append(config)
        return compile_model(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    compiled = OpenVINOBackend(threads=1).compile(content, batch=1)
    assert [config["INFERENCE_PRECISION_HINT"] for config in asked] == ["f32"]
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    for port in (*compiled.inputs, *compiled.outputs):
        assert port.element_type == openvino.Type.f32


def test_compiled_shapes_are_fixed(content: bytes) -> None:
    compiled = OpenVINOBackend(threads=1).compile(content, batch=3)
    assert {port.any_name: list(port.shape) for port in compiled.inputs} == {
        "normal": [3, 1, 15, 15, 15],
        "sub3": [3, 1, 11, 11, 11],
    }
    assert [list(port.shape) for port in compiled.outputs] == [[3, 7, 7, 7]]


def test_threads_default_to_the_cores_the_process_may_use(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert available_threads() == 3
    assert OpenVINOBackend().threads == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    backend = OpenVINOBackend()
    assert backend.threads == 1
    compiled = backend.compile(content, batch=1)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("NUM_STREAMS") == 1


def test_threads_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_threads() == 1


def test_chosen_threads_are_used(content: bytes) -> None:
    backend = open_backend("cpu", threads=1)
    assert isinstance(backend, OpenVINOBackend)
    compiled = backend.compile(content, batch=1)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize("kept", [0, 20, 1000, -7])
def test_a_broken_graph_is_refused(
    build: Callable[[bytes], Engine], content: bytes, kept: int
) -> None:
    engine = build(content[:kept])
    backend = OpenVINOBackend(threads=1)
    with pytest.raises(EngineError) as caught:
        backend.load(engine)
    assert str(engine.file("network.onnx")) in caught.value.found
    assert "trtseg engines build" in caught.value.action
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="a graph in memory: OpenVINO cannot run it"):
        backend.compile(content[:kept], batch=1)


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.onnx: OpenVINO cannot run it"):
        OpenVINOBackend(threads=1).compile(tmp_path / "none.onnx", batch=1)


def test_no_cpu_device_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino.Core, "available_devices", property(lambda _: ["NPU"]))
    with pytest.raises(DeviceError, match="OpenVINO finds no CPU device"):
        OpenVINOBackend()


def test_a_closed_backend_leaves_its_networks_usable(
    build: Callable[[bytes], Engine], content: bytes, volume: NDArray[np.float32]
) -> None:
    backend = OpenVINOBackend(threads=1)
    network = backend.load(build(content))
    plan = tiling.plan_tiles(SHAPE, TINY)
    before = network.run(volume, plan)
    backend.close()
    np.testing.assert_array_equal(network.run(volume, plan).labels, before.labels)


def test_logistic_is_float32_and_silent_at_both_ends() -> None:
    logits = np.array([0.0, 1.0986123, -1.0986123, 200.0, -200.0], np.float32)
    found = logistic(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:3], [0.5, 0.75, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(found[3:], [1.0, 0.0])


def test_version_is_that_of_the_runtime() -> None:
    assert module.version() == openvino.__version__


RUN = """
import json, sys
import numpy as np
from pathlib import Path
from trtseg import tiling
from trtseg.backends import open_backend
from trtseg.engine import load_engine

engine = load_engine(Path(sys.argv[1]), "tiny", "bdn")
network = open_backend("cpu", threads=1).load(engine)
plan = tiling.plan_tiles((9, 8, 7), engine.spec)
labels = network.run(np.ones((9, 8, 7), np.float32), plan).labels
names = ("openvino", "openvino_telemetry", "tensorflow", "onnx", "nibabel", "pooch")
print(json.dumps([labels.shape, [name for name in names if name in sys.modules]]))
"""


def test_running_imports_neither_telemetry_nor_the_build_step(
    build: Callable[[bytes], Engine], content: bytes
) -> None:
    # Scans are segmented on trusted machines without a network: nothing may phone home.
    engine = build(content)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(engine.folder.parents[1])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[9, 8, 7], ["openvino"]]
