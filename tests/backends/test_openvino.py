from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.build.networks import ARCHITECTURES, TINY, Arrays, random_inputs, random_variables
from trtseg import tiling
from trtseg.architecture import NetworkSpec
from trtseg.backends import open_cpu
from trtseg.backends import openvino as module
from trtseg.backends.openvino import OpenVINOBackend, OpenVINONetwork
from trtseg.backends.openvino_library import openvino_module
from trtseg.build.freeze import freeze
from trtseg.build.parts import parts
from trtseg.build.reference import evaluate
from trtseg.engine import Engine, write_engine
from trtseg.errors import DeviceError, EngineError

# Results of 7 per axis: 2 x 1 x 3 tiles, shifted back at the end of the first and third axis.
SHAPE = (12, 7, 17)
TILES = 6
PARTS = ("fc.onnx", "normal.onnx", "sub.onnx")
SUBS = tuple(pathway.name for pathway in TINY.pathways[1:])


@pytest.fixture(scope="module")
def openvino() -> ModuleType:
    return openvino_module()


@pytest.fixture(scope="module")
def variables() -> Arrays:
    return random_variables(TINY, seed=6)


@pytest.fixture(scope="module")
def graphs(variables: Arrays) -> dict[str, bytes]:
    """The tiny network, file name to ONNX."""
    return parts(freeze(variables, TINY))


@pytest.fixture(scope="module")
def network(graphs: dict[str, bytes]) -> OpenVINONetwork:
    return OpenVINOBackend(threads=1).compile(TINY, graphs)


@pytest.fixture
def own_network(graphs: dict[str, bytes]) -> OpenVINONetwork:
    """One of the test's own, for those that break it."""
    return OpenVINOBackend(threads=1).compile(TINY, graphs)


@pytest.fixture(scope="module")
def volume() -> NDArray[np.float32]:
    return noise(SHAPE)


@pytest.fixture
def build(tmp_path: Path) -> Callable[[Mapping[str, bytes]], Engine]:
    """Writes an intact engine around graphs."""

    def engine(graphs: Mapping[str, bytes]) -> Engine:
        return write_engine(
            tmp_path / "engines of µ",
            "tiny",
            "bdn",
            spec=TINY,
            files={**graphs, "weights.npz": b"unused at run time"},
            checkpoint={},
            notice="",
            proof={},
            versions={},
        )

    return engine


@pytest.fixture
def compiled(openvino: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, Any]]:
    """What is compiled from here on: the config asked for, and the compiled model."""
    models: list[tuple[dict, Any]] = []
    compile_model = openvino.Core.compile_model

    def spy(core: object, model: object, device: str, config: dict[str, str]) -> object:
        models.append((config, compile_model(core, model, device, config)))
        return models[-1][1]

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    return models


def noise(shape: tuple[int, ...], seed: int = 8) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_tiles(
    variables: Arrays, spec: NetworkSpec, volume: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Probabilities as DeepMedic gets them: tile by tile, later ones over earlier ones."""
    plan = tiling.plan_tiles(volume.shape, spec)
    padded = tiling.pad(volume, plan)
    expected = np.full(volume.shape, np.nan)
    for start in plan.starts:
        inputs = tiling.gather(padded, start[None], spec)
        tile = evaluate(variables, spec, {name: batch[0] for name, batch in inputs.items()})
        where = tuple(slice(s, s + spec.out) for s in start)
        expected[where] = tile[tuple(slice(0, n) for n in expected[where].shape)]
    return expected


def assert_same(
    labels: NDArray[np.uint8],
    probabilities: NDArray[np.float32] | None,
    expected: NDArray[np.floating],
    tolerance: float = 1e-5,
) -> None:
    """Probabilities agree, and labels do wherever rounding does not decide them."""
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=tolerance)
    decided = np.abs(expected - 0.5) > tolerance
    np.testing.assert_array_equal(labels[decided], (expected > 0.5)[decided])


def test_an_engine_computes_what_its_checkpoint_does(
    build: Callable[[Mapping[str, bytes]], Engine],
    graphs: dict[str, bytes],
    variables: Arrays,
    volume: NDArray[np.float32],
) -> None:
    loaded = OpenVINOBackend(threads=1).load(build(graphs))
    plan = tiling.plan_tiles(SHAPE, TINY)
    assert len(plan) == TILES
    found = loaded.run(volume, plan, probabilities=True)
    assert loaded.spec == TINY
    assert found.labels.shape == SHAPE
    assert found.labels.dtype == np.uint8
    assert found.probabilities is not None
    assert found.probabilities.shape == SHAPE
    assert found.probabilities.dtype == np.float32
    assert_same(found.labels, found.probabilities, by_tiles(variables, TINY, volume))
    assert 0.1 < found.labels.mean() < 0.9


@pytest.mark.parametrize("spec", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_is_computed(spec: NetworkSpec) -> None:
    # Shorter than a tile, a tile and a bit, several tiles.
    shape = (spec.margin + 1, spec.out + 2, 3 * spec.out + 1)
    variables = random_variables(spec, seed=2)
    image = noise(shape)
    tiny = OpenVINOBackend(threads=1).compile(spec, parts(freeze(variables, spec)))
    found = tiny.run(image, tiling.plan_tiles(shape, spec), probabilities=True)
    assert_same(found.labels, found.probabilities, by_tiles(variables, spec, image))
    assert found.probabilities is not None
    assert found.probabilities.std() > 0.005


def test_logits_of_one_tile(network: OpenVINONetwork, variables: Arrays) -> None:
    inputs = random_inputs(TINY, seed=3)
    logits = network.tile_logits({name: tile[None] for name, tile in inputs.items()})
    assert logits.shape == (7, 7, 7)
    assert logits.dtype == np.float32
    expected = evaluate(variables, TINY, inputs)
    np.testing.assert_allclose(logits, np.log(expected / (1 - expected)), atol=1e-4)


@pytest.mark.parametrize(("block", "batch"), [(1, 1), (1, 4), (800, 2), (80**3, 4), (80**3, 5)])
def test_how_work_is_grouped_does_not_change_the_result(
    network: OpenVINONetwork,
    variables: Arrays,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    batch: int,
) -> None:
    monkeypatch.setattr(module, "BLOCK_VOXELS", block)
    monkeypatch.setattr(module, "SUB_BATCH", batch)
    image = noise((15, 16, 17))
    plan = tiling.plan_tiles(image.shape, TINY)
    assert len(plan) == 27
    found = network.run(image, plan, probabilities=True)
    assert_same(found.labels, found.probabilities, by_tiles(variables, TINY, image))


@pytest.mark.parametrize(
    "where",
    [
        np.s_[3, 3, 3],
        np.s_[2:4, 2:5, 8:11],
        np.s_[:, 3, 5:9],
        np.s_[11:, :1, 16:],
        np.s_[::5, 6, :],
    ],
    ids=["one-voxel", "inside-a-tile", "across-tiles", "corner", "scattered"],
)
def test_inside_a_roi_results_are_those_without_one(
    network: OpenVINONetwork, volume: NDArray[np.float32], where: tuple[slice | int, ...]
) -> None:
    roi = np.zeros(SHAPE, bool)
    roi[where] = True
    plan = tiling.plan_tiles(SHAPE, TINY, roi)
    found = network.run(volume, plan, probabilities=True)
    whole = network.run(volume, tiling.plan_tiles(SHAPE, TINY), probabilities=True)
    assert whole.probabilities is not None
    assert found.probabilities is not None
    assert_same(found.labels[roi], found.probabilities[roi], whole.probabilities[roi])


def test_tiles_outside_a_roi_stay_zero(
    network: OpenVINONetwork, volume: NDArray[np.float32]
) -> None:
    roi = np.zeros(SHAPE, bool)
    roi[:5] = True
    plan = tiling.plan_tiles(SHAPE, TINY, roi)
    assert len(plan) == TILES // 2
    found = network.run(volume, plan, probabilities=True)
    assert found.probabilities is not None
    assert found.labels[:5].any()
    assert found.probabilities[:5].all()
    assert not found.labels[5:].any()
    assert not found.probabilities[5:].any()


def masked(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """A scan whose background is one value but for a corner, as masked scans have it."""
    image = np.full(shape, -0.25, np.float32)
    image[:6, :6, :6] = noise((6, 6, 6))
    return image


def test_a_constant_background_gives_the_same_result(
    network: OpenVINONetwork, variables: Arrays
) -> None:
    image = masked((22, 22, 22))
    plan = tiling.plan_tiles(image.shape, TINY)
    told: list[int] = []
    found = network.run(image, plan, probabilities=True, progress=told.append)
    assert_same(found.labels, found.probabilities, by_tiles(variables, TINY, image))
    assert sum(told) == len(plan) == 64


@pytest.mark.parametrize("bias", [-0.0005, 0.0, 0.0005])
def test_a_constant_background_near_a_tie_gives_the_same_result(
    variables: Arrays, bias: float
) -> None:
    # Moved to that distance from a tie, where sharing an answer could change labels.
    image = masked((22, 7, 7))
    expected = by_tiles(variables, TINY, image)
    logit = np.log(expected[-1, -1, -1] / (1 - expected[-1, -1, -1]))
    softmax = variables["net/b_2"] + np.array([0, bias - logit], np.float32)
    near = variables | {"net/b_2": softmax.astype(np.float32)}
    tied = OpenVINOBackend(threads=1).compile(TINY, parts(freeze(near, TINY)))
    found = tied.run(image, tiling.plan_tiles(image.shape, TINY), probabilities=True)
    assert_same(found.labels, found.probabilities, by_tiles(near, TINY, image))


def test_a_tie_is_class_0(variables: Arrays, volume: NDArray[np.float32]) -> None:
    tied = variables | {
        "net/W_10": np.zeros_like(variables["net/W_10"]),
        "net/b_2": np.zeros(2, np.float32),
    }
    level = OpenVINOBackend(threads=1).compile(TINY, parts(freeze(tied, TINY)))
    found = level.run(volume, tiling.plan_tiles(SHAPE, TINY), probabilities=True)
    np.testing.assert_array_equal(found.probabilities, 0.5)
    np.testing.assert_array_equal(found.labels, 0)


def test_progress_counts_every_tile(network: OpenVINONetwork, volume: NDArray[np.float32]) -> None:
    told: list[int] = []
    network.run(volume, tiling.plan_tiles(SHAPE, TINY), progress=told.append)
    assert sum(told) == TILES
    assert min(told) >= 1


def test_three_runs_give_the_same_bits(
    graphs: dict[str, bytes], volume: NDArray[np.float32]
) -> None:
    threaded = OpenVINOBackend(threads=2).compile(TINY, graphs)
    plan = tiling.plan_tiles(SHAPE, TINY)
    first, *others = (threaded.run(volume, plan, probabilities=True) for _ in range(3))
    for other in others:
        np.testing.assert_array_equal(other.labels, first.labels)
        np.testing.assert_array_equal(other.probabilities, first.probabilities)


def test_results_belong_to_the_caller(
    network: OpenVINONetwork, volume: NDArray[np.float32]
) -> None:
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
    network: OpenVINONetwork, volume: NDArray[np.float32]
) -> None:
    plan = tiling.plan_tiles(SHAPE, TINY)
    found = network.run(volume, plan)
    assert found.probabilities is None
    expected = network.run(volume, plan, probabilities=True)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_a_plan_without_tiles_gives_zeros(
    network: OpenVINONetwork, volume: NDArray[np.float32]
) -> None:
    plan = tiling.plan_tiles(SHAPE, TINY, np.zeros(SHAPE, bool))
    told: list[int] = []
    found = network.run(volume, plan, probabilities=True, progress=told.append)
    assert told == []
    assert found.probabilities is not None
    assert not found.labels.any()
    assert not found.probabilities.any()


def test_float32_is_asked_for_and_granted(
    openvino: ModuleType, graphs: dict[str, bytes], compiled: list[tuple[dict, Any]]
) -> None:
    OpenVINOBackend(threads=1).compile(TINY, graphs)
    assert len(compiled) == len(PARTS)
    for config, model in compiled:
        # Processors without bfloat16 units grant it unasked, so both are looked at.
        assert config["INFERENCE_PRECISION_HINT"] == "f32"
        assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@pytest.fixture
def any_processor(openvino: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets bfloat16 be asked for everywhere: OpenVINO computes in float32 where it must."""
    get_property = openvino.Core.get_property

    def able(core: object, device: str, name: str) -> object:
        found = get_property(core, device, name)
        return [*found, "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else found

    monkeypatch.setattr(openvino.Core, "get_property", able)


def ports(model: Any) -> dict[str, str]:
    """Name of each input and output to its type."""
    return {
        name: port.element_type.get_type_name()
        for port in [*model.inputs, *model.outputs]
        for name in port.get_names()
    }


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_features_are_handed_over_in_the_precision(
    graphs: dict[str, bytes], compiled: list[tuple[dict, Any]], precision: str
) -> None:
    OpenVINOBackend(threads=1, precision=precision).compile(TINY, graphs)
    found = [ports(model).items() for _, model in compiled]
    cells = {f"{name}.{index}": "i32" for name in SUBS for index in ("variant", "cell")}
    normal = {"normal": "f32", "features": precision}
    sub = dict.fromkeys(SUBS, "f32") | {f"{name}.features": precision for name in SUBS}
    fc = dict.fromkeys(("normal", *SUBS), precision) | cells | {"logit": "f32"}
    assert len(found) == len(PARTS)
    for expected in (normal, sub, fc):
        assert any(expected.items() <= types for types in found), expected


@pytest.mark.usefixtures("any_processor")
def test_bfloat16_is_near_float32(graphs: dict[str, bytes], volume: NDArray[np.float32]) -> None:
    plan = tiling.plan_tiles(SHAPE, TINY)
    exact, rounded = (
        OpenVINOBackend(threads=1, precision=precision)
        .compile(TINY, graphs)
        .run(volume, plan, probabilities=True)
        for precision in ("f32", "bf16")
    )
    assert exact.probabilities is not None
    assert rounded.probabilities is not None
    # bfloat16 has 8 significant bits; the tiny network has a dozen layers.
    np.testing.assert_allclose(rounded.probabilities, exact.probabilities, rtol=0, atol=0.03)
    assert np.abs(rounded.probabilities - exact.probabilities).max() > 0


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_fixed_size_does_not_change_the_result(
    graphs: dict[str, bytes],
    volume: NDArray[np.float32],
    compiled: list[tuple[dict, Any]],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    tiny = OpenVINOBackend(threads=1, precision=precision).compile(TINY, graphs)
    plan = tiling.plan_tiles(SHAPE, TINY)
    free = tiny.run(volume, plan, probabilities=True)
    assert len(compiled) == len(PARTS)
    monkeypatch.setattr(module, "FIXED_SIZE_BOXES", 1)
    fixed = tiny.run(volume, plan, probabilities=True)
    assert len(compiled) > len(PARTS)
    assert all(port.partial_shape.is_static for _, m in compiled[len(PARTS) :] for port in m.inputs)
    assert free.probabilities is not None
    assert fixed.probabilities is not None
    tolerance = {"f32": 1e-5, "bf16": 0.02}[precision]
    np.testing.assert_allclose(fixed.probabilities, free.probabilities, rtol=0, atol=tolerance)
    # A plan with fewer whole tiles runs as on the first day, though the other is compiled now.
    monkeypatch.setattr(module, "FIXED_SIZE_BOXES", 10**6)
    again = tiny.run(volume, plan, probabilities=True)
    np.testing.assert_array_equal(again.probabilities, free.probabilities)


def test_rows_are_transposed_where_sizes_are_fixed_and_copied_elsewhere(
    openvino: ModuleType, graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[set[tuple[int, ...]]] = []
    compile_model = openvino.Core.compile_model

    def spy(core: object, model: Any, device: str, config: dict[str, str]) -> object:
        nodes = [node for node in model.get_ops() if node.get_type_name() == "Transpose"]
        orders.append({tuple(node.input_value(1).get_node().data.tolist()) for node in nodes})
        return compile_model(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    monkeypatch.setattr(module, "FIXED_SIZE_BOXES", 1)
    tiny = OpenVINOBackend(threads=1).compile(TINY, graphs)
    assert [one for one in orders if one] == [{(2, 0, 3, 4, 1)}]
    orders.clear()
    tiny.run(noise((7, 7, 7)), tiling.plan_tiles((7, 7, 7), TINY))
    assert orders == [{(0, 2, 3, 4, 1)}]


def test_threads_default_to_the_cores_the_process_may_use(
    graphs: dict[str, bytes],
    compiled: list[tuple[dict, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert OpenVINOBackend().threads == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    backend = OpenVINOBackend()
    assert backend.threads == 1
    backend.compile(TINY, graphs)
    assert {model.get_property("INFERENCE_NUM_THREADS") for _, model in compiled} == {1}
    assert {model.get_property("NUM_STREAMS") for _, model in compiled} == {1}


def test_chosen_threads_are_used(
    graphs: dict[str, bytes], compiled: list[tuple[dict, Any]]
) -> None:
    backend = open_cpu(threads=1)
    assert isinstance(backend, OpenVINOBackend)
    backend.compile(TINY, graphs)
    assert {model.get_property("INFERENCE_NUM_THREADS") for _, model in compiled} == {1}


@pytest.mark.parametrize("kept", [0, 20, 1000, -7])
@pytest.mark.parametrize("part", PARTS)
def test_a_broken_graph_is_refused(
    build: Callable[[Mapping[str, bytes]], Engine],
    graphs: dict[str, bytes],
    part: str,
    kept: int,
) -> None:
    broken = {**graphs, part: graphs[part][:kept]}
    engine = build(broken)
    backend = OpenVINOBackend(threads=1)
    with pytest.raises(EngineError) as caught:
        backend.load(engine)
    assert str(engine.folder / part) in caught.value.found
    assert "trtseg engines build" in caught.value.action
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match=f"{part} in memory: OpenVINO cannot run it"):
        backend.compile(TINY, broken)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"another")])
def test_a_graph_that_went_or_changed_since_it_was_verified_is_refused(
    build: Callable[[Mapping[str, bytes]], Engine],
    graphs: dict[str, bytes],
    change: Callable[[Path], object],
) -> None:
    engine = build(graphs)
    change(engine.folder / "fc.onnx")
    with pytest.raises(EngineError, match=r"fc\.onnx: "):
        OpenVINOBackend(threads=1).load(engine)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_is_an_error(value: float) -> None:
    plan = tiling.plan_tiles((9, 9, 9), TINY)
    logits = np.zeros(plan.boxes[0][:, 1] - plan.boxes[0][:, 0], np.float32)
    logits[0, 0, 0] = value
    with pytest.raises(EngineError, match="values that are not finite"):
        module._Output(plan, False, None).decide(0, logits, plan.boxes[0][:, 0])


def test_no_cpu_device_is_a_device_error(
    openvino: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = 'Device with "CPU" name is not registered in the OpenVINO Runtime'
    monkeypatch.setattr(openvino.Core, "get_property", raising(failure(said)))
    with pytest.raises(DeviceError) as caught:
        OpenVINOBackend()
    assert caught.value.found == f"OpenVINO finds no CPU device ({said})"


# OpenVINO's words where memory ran out, by the limit it was given on Linux.
NO_MEMORY = [
    "[CPU] Convolution node with name 'conv_0/WithoutBiases' can't alloc",
    "[CPU] Pad node with name 'pad_10' Check 'ptr' failed at src/plugins/intel_cpu/src/"
    "cpu_memory.cpp:257:\nFailed to allocate 26264000 bytes of memory",
    "std::bad_alloc",
    "Resource temporarily unavailable",
    "[CPU] Convolution node with name 'conv_29' std::future_error: Broken promise",
    'Cannot load library "libopenvino_intel_cpu_plugin.so": failed to map segment from shared '
    "object",
]


def failure(said: str) -> RuntimeError:
    """What OpenVINO raises: where it came from, what it is, empty lines."""
    return RuntimeError(f"Exception from src/inference/src/cpp/infer_request.cpp:224:\n{said}\n\n")


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("said", NO_MEMORY)
@pytest.mark.parametrize("method", ["get_property", "read_model", "compile_model"])
def test_no_memory_to_load_is_a_memory_error(
    openvino: ModuleType,
    graphs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    said: str,
) -> None:
    monkeypatch.setattr(openvino.Core, method, raising(failure(said)))
    with pytest.raises(MemoryError):
        OpenVINOBackend(threads=1).compile(TINY, graphs)


def test_a_graph_there_is_no_room_for_is_not_read(
    openvino: ModuleType, graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # OpenVINO's reader ends the process where it finds no room for its copies.
    read: list[object] = []
    monkeypatch.setattr(openvino.Core, "read_model", lambda *given: read.append(given))
    monkeypatch.setattr(module, "READING_BYTES", 1 << 60)
    with pytest.raises(MemoryError):
        OpenVINOBackend(threads=1).compile(TINY, graphs)
    assert read == []


def test_no_memory_to_import_openvino_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ImportError("libopenvino.so.2641: failed to map segment from shared object")
    monkeypatch.setattr(module, "openvino_module", raising(missing))
    with pytest.raises(MemoryError):
        OpenVINOBackend()


def test_an_openvino_that_is_not_installed_is_no_memory_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = ModuleNotFoundError("No module named 'openvino'")
    monkeypatch.setattr(module, "openvino_module", raising(missing))
    with pytest.raises(ModuleNotFoundError):
        OpenVINOBackend()


def failing(request: Any, error: RuntimeError, answers: int) -> Callable[..., object]:
    """An infer request's `infer` that fails once it has answered some calls."""
    infer, results = request.infer, iter(range(answers))

    def call(*given: object, **options: object) -> object:
        if next(results, None) is None:
            raise error
        return infer(*given, **options)

    return call


@pytest.mark.parametrize("answers", [0, 1])
@pytest.mark.parametrize("request_name", ["_normal", "_sub", "_fc"])
@pytest.mark.parametrize("said", NO_MEMORY)
def test_no_memory_to_run_is_a_memory_error_and_the_next_scan_runs(
    own_network: OpenVINONetwork,
    volume: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    request_name: str,
    answers: int,
) -> None:
    monkeypatch.setattr(module, "BLOCK_VOXELS", 1)
    monkeypatch.setattr(module, "SUB_BATCH", 1)
    plan = tiling.plan_tiles(SHAPE, TINY)
    expected = own_network.run(volume, plan, probabilities=True)
    request = getattr(own_network, request_name)
    monkeypatch.setattr(request, "infer", failing(request, failure(said), answers))
    with pytest.raises(MemoryError):
        own_network.run(volume, plan)
    found = own_network.run(volume, plan, probabilities=True)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)


@pytest.mark.parametrize("request_name", ["_normal", "_sub", "_fc"])
def test_another_failure_to_run_is_a_device_error(
    own_network: OpenVINONetwork,
    volume: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    request_name: str,
) -> None:
    error = failure("could not execute a primitive")
    request = getattr(own_network, request_name)
    monkeypatch.setattr(request, "infer", failing(request, error, 0))
    with pytest.raises(DeviceError) as caught:
        own_network.run(volume, tiling.plan_tiles(SHAPE, TINY))
    assert caught.value.found == "OpenVINO failed on the CPU (could not execute a primitive)"
    assert caught.value.expected
    assert "pip install --force-reinstall openvino" in caught.value.action
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_what_failed_is_compiled_anew_for_the_next_scan(
    graphs: dict[str, bytes],
    volume: NDArray[np.float32],
    compiled: list[tuple[dict, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # OpenVINO's graphs are left between two shapes: used again they can give another scan's answer.
    tiny = OpenVINOBackend(threads=1).compile(TINY, graphs)
    plan = tiling.plan_tiles(SHAPE, TINY)
    tiny.run(volume, plan)
    assert len(compiled) == len(PARTS)
    monkeypatch.setattr(tiny._fc, "infer", raising(failure("could not execute a primitive")))
    with pytest.raises(DeviceError):
        tiny.run(volume, plan)
    assert len(compiled) == len(PARTS)
    for _ in range(2):
        tiny.run(volume, plan)
        assert len(compiled) == 2 * len(PARTS)


@pytest.mark.parametrize("request_name", ["_normal", "_sub", "_fc"])
@pytest.mark.parametrize(
    ("said", "expected"),
    [("std::bad_alloc", MemoryError), ("could not execute a primitive", DeviceError)],
)
def test_a_tile_that_failed_leaves_the_next_one_to_run(
    own_network: OpenVINONetwork,
    compiled: list[tuple[dict, Any]],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    expected: type[Exception],
    request_name: str,
) -> None:
    inputs = {name: tile[None] for name, tile in random_inputs(TINY, seed=3).items()}
    before = own_network.tile_logits(inputs).copy()
    request = getattr(own_network, request_name)
    monkeypatch.setattr(request, "infer", raising(failure(said)))
    with pytest.raises(expected):
        own_network.tile_logits(inputs)
    assert compiled == []
    for _ in range(2):
        np.testing.assert_array_equal(own_network.tile_logits(inputs), before)
        assert len(compiled) == len(PARTS)


def test_a_constant_tile_that_failed_leaves_the_next_scan_to_run(
    own_network: OpenVINONetwork,
    compiled: list[tuple[dict, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    level = np.ones(SHAPE, np.float32)
    plan = tiling.plan_tiles(SHAPE, TINY)
    before = own_network.run(level, plan, probabilities=True)
    monkeypatch.setattr(own_network._fc, "infer", raising(failure("std::bad_alloc")))
    with pytest.raises(MemoryError):
        own_network.run(level, plan)
    for _ in range(2):
        found = own_network.run(level, plan, probabilities=True)
        np.testing.assert_array_equal(found.probabilities, before.probabilities)
        assert len(compiled) == len(PARTS)


def test_no_memory_to_compile_anew_leaves_the_scan_after_it_to_run(
    openvino: ModuleType,
    own_network: OpenVINONetwork,
    volume: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = tiling.plan_tiles(SHAPE, TINY)
    expected = own_network.run(volume, plan)
    no_memory = raising(failure("std::bad_alloc"))
    monkeypatch.setattr(own_network._fc, "infer", no_memory)
    with monkeypatch.context() as broken:
        broken.setattr(openvino.Core, "compile_model", no_memory)
        for _ in range(2):
            with pytest.raises(MemoryError):
                own_network.run(volume, plan)
    np.testing.assert_array_equal(own_network.run(volume, plan).labels, expected.labels)


def test_no_memory_to_tidy_up_is_a_memory_error(
    own_network: OpenVINONetwork, volume: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        release_memory = staticmethod(raising(failure("std::bad_alloc")))

    monkeypatch.setattr(own_network, "_models", [Model()])
    with pytest.raises(MemoryError):
        own_network.run(volume, tiling.plan_tiles(SHAPE, TINY))


def test_what_a_progress_callback_raises_is_its_own(
    own_network: OpenVINONetwork, volume: NDArray[np.float32]
) -> None:
    error = RuntimeError("no terminal")
    with pytest.raises(RuntimeError) as caught:
        own_network.run(volume, tiling.plan_tiles(SHAPE, TINY), progress=raising(error))
    assert caught.value is error


@pytest.mark.parametrize(
    ("said", "expected"),
    [*((said, MemoryError) for said in NO_MEMORY), ("no such layer", EngineError)],
)
def test_compiling_for_whole_tiles_fails_as_loading_does(
    openvino: ModuleType,
    graphs: dict[str, bytes],
    volume: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    expected: type[Exception],
) -> None:
    tiny = OpenVINOBackend(threads=1).compile(TINY, graphs)
    plan = tiling.plan_tiles(SHAPE, TINY)
    monkeypatch.setattr(module, "FIXED_SIZE_BOXES", 1)
    with monkeypatch.context() as broken:
        broken.setattr(openvino.Core, "compile_model", raising(failure(said)))
        with pytest.raises(expected):
            tiny.run(volume, plan)
    # The next scan compiles it.
    assert tiny.run(volume, plan).labels.any()


def test_a_closed_backend_leaves_its_networks_usable(
    graphs: dict[str, bytes], volume: NDArray[np.float32]
) -> None:
    backend = OpenVINOBackend(threads=1)
    tiny = backend.compile(TINY, graphs)
    plan = tiling.plan_tiles(SHAPE, TINY)
    before = tiny.run(volume, plan)
    backend.close()
    np.testing.assert_array_equal(tiny.run(volume, plan).labels, before.labels)


RUN = """
import json, os, sys
import numpy as np
from pathlib import Path
from trtseg import tiling
from trtseg.backends import open_cpu
from trtseg.engine import load_engine

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "os.fork", "subprocess.Popen"):
        print(event, arguments, file=sys.stderr)
        os._exit(3)

sys.addaudithook(refuse)
engine = load_engine(Path(sys.argv[1]), "tiny", "bdn")
network = open_cpu(threads=1).load(engine)
plan = tiling.plan_tiles((9, 8, 7), engine.spec)
labels = network.run(np.ones((9, 8, 7), np.float32), plan).labels
names = ("openvino", "openvino_telemetry", "tensorflow", "onnx", "nibabel", "pooch")
print(json.dumps([labels.shape, [name for name in names if sys.modules.get(name)]]))
"""


def test_running_is_offline_and_leaves_the_build_step_alone(
    build: Callable[[Mapping[str, bytes]], Engine], graphs: dict[str, bytes], tmp_path: Path
) -> None:
    # Importing openvino starts its telemetry, which reports the import by a forked process and
    # keeps an identifier in the home folder: neither may happen on a clinical machine.
    engine = build(graphs)
    home = tmp_path / "home"
    home.mkdir()
    # Telemetry is silent where CI says it is one; what is proven here must not rest on that.
    silencers = ("CI", "TF_BUILD", "JENKINS_URL")
    environment = {name: value for name, value in os.environ.items() if name not in silencers}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(engine.folder.parents[1])],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[9, 8, 7], ["openvino"]]
    assert list(home.iterdir()) == []
