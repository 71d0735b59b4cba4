from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.build.networks import TINY, enlarge, random_inputs, random_variables
from trtseg import __version__
from trtseg.architecture import PUBLISHED
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.tensorrt_library import Library, installed_libraries, open_library
from trtseg.build import graph, tensorrt
from trtseg.build.forms import FORMS, form_graph
from trtseg.build.freeze import FrozenNetwork, freeze
from trtseg.build.graph import kept_layers, read_graph
from trtseg.build.half import fit
from trtseg.build.parts import parts
from trtseg.build.tensorrt import (
    BuiltEngine,
    build_engine,
    build_gpu_models,
    inspect_engine,
    layer_report,
)
from trtseg.cuda.device import GpuInfo
from trtseg.engine import load_engine, write_engine
from trtseg.errors import (
    DeviceError,
    EngineError,
    EngineMissingError,
    MissingExtraError,
    UsageError,
)
from trtseg.gpu_engine import GpuEngine, load_gpu_engine
from trtseg.models import ModelSet

pytestmark = pytest.mark.skipif(
    "tensorrt_rtx" not in installed_libraries(), reason="TensorRT-RTX is not installed"
)

SEEDS = {"bdn": 1, "cgm": 2}
DIGESTS = {"net.model.ckpt.index": "c" * 64}


@dataclass
class FakeCompiler:
    """Stands for nvcc, which is not everywhere and takes 15 s."""

    name: str = "fake 1.0"
    calls: int = 0

    def compile(self, source: str) -> dict[str, bytes]:
        self.calls += 1
        return {"kernels.ptx": b"ptx of " + source[:10].encode() + b"\0"}


@dataclass(frozen=True)
class FakeModels(ModelSet):
    """A model set whose checkpoint is known by its digest only."""

    def digests(self, net: str) -> dict[str, str]:
        return DIGESTS


def frozen(seed: int) -> FrozenNetwork:
    return freeze(random_variables(TINY, seed), TINY)


def put_network(root: Path, net: str, network: FrozenNetwork) -> None:
    """What the build step leaves for a network."""
    write_engine(
        root,
        "tiny",
        net,
        spec=TINY,
        files={"weights.npz": network.to_bytes(), **parts(network)},
        checkpoint=DIGESTS,
        notice="not for use",
        proof={},
        versions={},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for net, seed in SEEDS.items():
        put_network(tmp_path / "engines", net, frozen(seed))
    return tmp_path / "engines"


@pytest.fixture
def models(tmp_path: Path) -> ModelSet:
    return FakeModels("tiny", tmp_path, "imported", "not for use")


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("tensorrt_rtx")


Build = Callable[..., list[GpuEngine]]


@pytest.fixture
def build(models: ModelSet, root: Path) -> Build:
    def run(**options: Any) -> list[GpuEngine]:
        return build_gpu_models(
            models, root, **{"compiler": FakeCompiler(), "batches": (1,), **options}
        )

    return run


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("cuda/*")
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_without_a_gpu(
    library: Library, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    built = build_engine(library, form_graph(frozen(1), form, batch=2))
    assert len(built.content) > 10000
    assert built.seconds > 0
    assert built.messages.errors == []
    for tensor in ("normal (Float[2,1,15,15,15])", "sub3 (Float[2,1,11,11,11])"):
        assert tensor in layer_report(built)
    assert "-> logit (Float[2,7,7,7])" in layer_report(built)
    assert capfd.readouterr() == ("", "")


def test_the_published_architecture_compiles_in_the_default_form(library: Library) -> None:
    network = freeze(random_variables(PUBLISHED), PUBLISHED)
    built = build_engine(library, form_graph(network, "transposed8", batch=16), detailed=True)
    report = layer_report(built)
    assert "Max Scratch Memory: " in report
    kernels = [line for line in report.splitlines() if line.startswith("Name: ")]
    convolutions = [line for line in kernels if "LayerType: correlation" in line]
    assert len(convolutions) == 26
    # Float32 in the last layer only.
    results = [line.split("Outputs: ")[1] for line in convolutions]
    assert all("atatype: Half" in result for result in results)
    assert not any("atatype: Float" in result for result in results)
    assert sum("LayerType: deconv" in line for line in kernels) == 2
    last = [line for line in kernels if "reducesum" in line]
    assert "cast" in last[0]
    assert "atatype: Float" in last[-1]


def test_turing_can_be_asked_for(library: Library) -> None:
    content = form_graph(frozen(1), "transposed8", batch=1)
    turing = build_engine(library, content, compute_capabilities=["7.5"])
    assert turing.content != build_engine(library, content).content
    with pytest.raises(DeviceError, match=r"no ComputeCapability\.SM70"):
        build_engine(library, content, compute_capabilities=["7.0"])


def test_progress_is_reported(library: Library) -> None:
    told: list[tuple[str, float]] = []
    build_engine(
        library, form_graph(frozen(1), "plain", batch=1), report=lambda *what: told.append(what)
    )
    assert len(told) > 2
    assert len({phase for phase, _ in told}) == 1
    shares = [part for _, part in told]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] == 1


def test_ctrl_c_ends_a_build(library: Library) -> None:
    def interrupt(phase: str, part: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(library, form_graph(frozen(1), "plain", batch=1), report=interrupt)


def test_a_node_the_library_does_not_know_is_named(library: Library) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Unheard", ["normal"], ["logit"], "unheard_7")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "g",
            [value("normal", onnx.TensorProto.FLOAT, [1])],
            [value("logit", onnx.TensorProto.FLOAT, [1])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    with pytest.raises(EngineError, match=r"tensorrt_rtx .*\(node Unheard unheard_7: "):
        build_engine(library, model.SerializeToString())


def test_bytes_that_are_no_graph_are_refused(library: Library) -> None:
    with pytest.raises(EngineError, match="cannot read the graph"):
        build_engine(library, b"not a graph" * 10)


def test_a_graph_the_library_cannot_compile_is_refused(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "WORKSPACE_BYTES", 1 << 10)
    with pytest.raises(EngineError, match=r"cannot compile the network \(.*workspace limit"):
        build_engine(library, form_graph(frozen(1), "plain", batch=1))


def fake_library(**members: Any) -> Library:
    class Logger:
        pass

    return Library(SimpleNamespace(ILogger=Logger, **members), "tensorrt", "10.13")


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_library_that_needs_a_gpu_says_so(error: type[Exception]) -> None:
    def fail(logger: Any) -> None:
        raise error("factory function returned nullptr")

    with pytest.raises(DeviceError, match=r"tensorrt 10\.13 cannot start.*trtseg\[rtx\]"):
        build_engine(fake_library(Builder=fail), b"")


def test_strong_typing_is_asked_for() -> None:
    asked: list[int] = []
    found = fake_library(
        NetworkDefinitionCreationFlag=SimpleNamespace(__members__={"STRONGLY_TYPED": 1})
    )
    tensorrt._network(found, SimpleNamespace(create_network=asked.append))
    assert asked == [0b10]


def test_an_engine_that_cannot_be_loaded_is_not_inspected() -> None:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            logger.log(SimpleNamespace(name="ERROR"), "no driver")

        def deserialize_cuda_engine(self, content: bytes) -> None:
            return None

    with pytest.raises(DeviceError, match=r"cannot load the engine \(no driver"):
        inspect_engine(fake_library(Runtime=Runtime), b"engine")


def test_both_networks_are_compiled_whole(build: Build, root: Path) -> None:
    said: list[str] = []
    compiler = FakeCompiler()
    engines = build(batches=(2, 1), report=said.append, compiler=compiler)
    assert [(engine.models, engine.net) for engine in engines] == [("tiny", "bdn"), ("tiny", "cgm")]
    assert sorted(stamps(root)) == [
        f"tiny/{net}/cuda/{name}"
        for net in SEEDS
        for name in (
            "b1.engine",
            "b2.engine",
            "ceiling.engine",
            "kernels.ptx",
            "manifest.json",
            "selftest.npz",
        )
    ]
    assert compiler.calls == 1
    assert said == [
        f"{net}: {step}"
        for net in ("BDN", "CGM")
        for step in (
            "evaluating float16 rounding on the CPU",
            "compiling for 1 tile at a time",
            "compiling for 2 tiles at a time",
        )
    ]
    for engine in engines:
        weights = load_engine(root, "tiny", engine.net).manifest["files"]["weights.npz"]
        assert load_gpu_engine(root, "tiny", engine.net, frozen_sha256=weights) == engine
        assert engine.spec == TINY
        assert engine.batches == (1, 2)


def test_the_selftest_holds_the_float32_answer(build: Build) -> None:
    for engine in build():
        inputs, answer = engine.selftest
        assert {name: tile.shape for name, tile in inputs.items()} == {
            "normal": (1, 1, 15, 15, 15),
            "sub3": (1, 1, 11, 11, 11),
        }
        network = OpenVINOBackend(threads=1).compile(TINY, parts(frozen(SEEDS[engine.net])))
        np.testing.assert_allclose(network.tile_logits(inputs), answer, rtol=0, atol=1e-5)
        # A tile from within the phantom, not its background.
        assert inputs["normal"].std() > 0.1
        assert engine.check_selftest(answer)["labels_equal"] == 1.0
        with pytest.raises(EngineError, match="self-test"):
            engine.check_selftest(answer + np.float32(0.5))


def test_evidence_of_float16_is_stored(build: Build) -> None:
    for engine in build():
        evidence = engine.manifest["float16_on_cpu"]
        assert 0.9 < evidence["labels_equal"] <= 1
        assert 1e-5 < evidence["largest_difference"] < 0.05
        assert 0.1 < evidence["largest_activation"] < 100
        coarse = evidence["float16_sums"]
        assert coarse["products"] == 8
        assert 0.9 < coarse["labels_equal"] <= 1
        assert evidence["largest_difference"] < coarse["largest_difference"] < 0.05
        limits = engine.manifest["selftest"]
        assert limits["largest_difference"] == 2 * coarse["largest_difference"] + 1e-3


def test_the_worse_kind_of_sums_sets_the_limits() -> None:
    one = {"labels_equal": 0.9990, "largest_difference": 0.01}
    other = {"labels_equal": 0.9995, "largest_difference": 0.02}
    for evidence in ({**one, "float16_sums": other}, {**other, "float16_sums": one}):
        assert tensorrt._limits(evidence) == pytest.approx(
            {"labels_equal": 0.997, "largest_difference": 0.041}
        )
    none = {"labels_equal": 0.4, "largest_difference": 0.0}
    assert tensorrt._limits({**none, "float16_sums": none}) == {
        "labels_equal": 0.0,
        "largest_difference": 1e-3,
    }


def test_manifest_says_what_was_compiled_from_what(build: Build, root: Path) -> None:
    engine, _ = build(form="plain8", batches=(1, 2))
    text = (engine.folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["library"] == {"name": "tensorrt_rtx", "version": open_library().version}
    assert manifest["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert manifest["later_than"] == "12.0"
    assert (manifest["form"], manifest["batches"], manifest["tile"]) == ("plain8", [1, 2], 15)
    assert manifest["precision"] == "float16, last layer float32"
    assert manifest["notice"] == "not for use"
    assert manifest["checkpoint"] == DIGESTS
    assert sorted(manifest["compile_seconds"]) == ["1", "2"]
    assert manifest["built"].endswith("Z")
    assert manifest["versions"]["trtseg"] == __version__
    assert manifest["versions"]["onnx"] == graph.version()
    recipe = manifest["recipe"]
    weights = (root / "tiny" / "bdn" / "weights.npz").read_bytes()
    assert recipe["frozen_sha256"] == tensorrt.sha256_bytes(weights)
    assert recipe["kernels"]["compiler"] == "fake 1.0"
    assert recipe["form"] == "plain8"
    # Shared machines: nothing says where or by whom it was built.
    assert str(root) not in text


def test_an_intact_engine_is_kept_unless_forced(build: Build, root: Path) -> None:
    build()
    before = stamps(root)
    said: list[str] = []
    compiler = FakeCompiler()
    engines = build(report=said.append, compiler=compiler)
    assert (stamps(root), said, compiler.calls) == (before, [], 0)
    assert [engine.net for engine in engines] == ["bdn", "cgm"]
    build(force=True)
    assert all(stamp != before[name] for name, stamp in stamps(root).items())


@pytest.mark.parametrize(
    "change",
    [
        {"form": "plain"},
        {"batches": (1, 3)},
        {"compute_capabilities": ("7.5",)},
        {"compiler": FakeCompiler("fake 2.0")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_is_compiled_anew(build: Build, root: Path, change: dict[str, Any]) -> None:
    first = [engine.manifest["cache_key"] for engine in build()]
    second = [engine.manifest["cache_key"] for engine in build(**change)]
    assert not set(first) & set(second)


def test_other_limits_are_compiled_anew(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [engine.manifest["cache_key"] for engine in build()]
    monkeypatch.setattr(tensorrt, "_SLACK", 3.0)
    second = build()
    assert not set(first) & {engine.manifest["cache_key"] for engine in second}


def test_other_weights_are_compiled_anew(build: Build, root: Path) -> None:
    old = [engine.read("b1.engine") for engine in build()]
    put_network(root, "bdn", frozen(7))
    new = [engine.read("b1.engine") for engine in build()]
    assert (new[0] != old[0], new[1] == old[1]) == (True, True)


def test_only_a_damaged_engine_is_compiled_again(build: Build, root: Path) -> None:
    build()
    before = stamps(root)
    path = root / "tiny" / "cgm" / "cuda" / "b1.engine"
    path.write_bytes(path.read_bytes()[:-5])
    build()
    after = stamps(root)
    assert {name.split("/")[1] for name in after if after[name] != before[name]} == {"cgm"}


def test_an_engine_that_others_can_write_is_compiled_again(build: Build, root: Path) -> None:
    build()
    folder = root / "tiny" / "bdn" / "cuda"
    folder.chmod(0o777)
    build()
    assert folder.stat().st_mode & 0o022 == 0


def test_without_a_build_to_start_from(models: ModelSet, tmp_path: Path) -> None:
    with pytest.raises(EngineMissingError, match="trtseg engines build --models tiny"):
        build_gpu_models(models, tmp_path / "nothing", compiler=FakeCompiler())


def test_a_build_of_another_checkpoint_is_refused(
    build: Build, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DIGESTS, "net.model.ckpt.index", "d" * 64)
    with pytest.raises(EngineError, match="another checkpoint"):
        build()
    assert stamps(root) == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "layer", [("sub3", 3, 1e5), ("fc", 1, 1e6), ("fc", 2, 1e6)], ids=lambda layer: layer[0]
)
def test_layers_in_float32_compile_in_every_form(
    library: Library, form: str, layer: tuple[str, int, float]
) -> None:
    network = enlarge(frozen(1), *layer)
    inputs = {name: tile[None] for name, tile in random_inputs(TINY).items()}
    fitted = fit(lambda wide: form_graph(network, form, batch=1, wide=wide), inputs)
    content = form_graph(network, form, batch=2, wide=fitted.wide)
    report = layer_report(build_engine(library, content, detailed=True))
    # A line for every kernel; convolutions are correlations there, and biases always float32.
    kernels = [
        line.split("Inputs: ")[1].split("Constants: ")[0]
        for line in report.splitlines()
        if "LayerType: correlation" in line or "LayerType: deconv" in line
    ]
    single = [line for line in kernels if "atatype: Float" in line]
    assert 0 < len(single) < len(kernels)


def test_a_layer_beyond_float16s_range_is_kept_in_float32(
    build: Build, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bytes] = []

    def compile_one(library: Library, content: bytes, **options: Any) -> BuiltEngine:
        compiled.append(content)
        return build_engine(library, content, **options)

    monkeypatch.setattr(tensorrt, "build_engine", compile_one)
    network = enlarge(frozen(1), "sub3", 3, 1e6)
    put_network(root, "bdn", network)
    said: list[str] = []
    bdn, cgm = build(form="plain8", batches=(1, 2), report=said.append)
    kept = [line for line in said if "kept" in line]
    assert kept == [
        "BDN: kept in float32, near or beyond float16's range: sub3.3 (convolution), "
        "sub3.4 (activation, convolution)"
    ]
    assert bdn.manifest["float32_layers"] == {
        "sub3.3": ["convolution"],
        "sub3.4": ["activation", "convolution"],
    }
    assert cgm.manifest["float32_layers"] == {}
    assert "plain8 (sub3.3, sub3.4 in float32), batches 1, 2" in bdn.summary
    assert "float32" not in cgm.summary
    # No further from float32 than without that layer.
    evidence = bdn.manifest["float16_on_cpu"]
    assert 0.99 < evidence["labels_equal"] <= 1
    assert 1e-5 < evidence["largest_difference"] < 0.05
    assert evidence["largest_activation"] < 100
    # And so it is compiled, for every batch.
    first = [read_graph(content) for content in compiled[1:3]]
    assert [one.constants["sub3.3.weight.float32"].dtype for one in first] == [np.float32] * 2
    assert all(kept_layers(one.operations) == bdn.manifest["float32_layers"] for one in first)
    assert all(kept_layers(read_graph(one).operations) == {} for one in compiled[3:])


def test_a_network_that_leaves_float16s_range_throughout_is_refused(
    build: Build, root: Path
) -> None:
    network = frozen(1)
    pathways = tuple(
        (replace(first, weight=first.weight * np.float32(1e9)), *others)
        for first, *others in network.pathways
    )
    put_network(root, "bdn", replace(network, pathways=pathways))
    with pytest.raises(
        EngineError,
        match=r"tiny BDN: activations reach .*with 0 convolutions in float16.*65504.*--device cpu",
    ):
        build()
    assert stamps(root) == {}


def test_a_network_beyond_float32_is_refused(build: Build, root: Path) -> None:
    network = frozen(1)
    first, second, *others = network.pathways[0]
    large = [replace(one, weight=one.weight * np.float32(1e25)) for one in (first, second)]
    put_network(root, "bdn", replace(network, pathways=((*large, *others), *network.pathways[1:])))
    with pytest.raises(EngineError, match=r"tiny BDN: activations reach .*expected finite logits"):
        build()
    assert stamps(root) == {}


@pytest.mark.parametrize("batches", [(), (0, 1), (4, 4)])
def test_batches_that_mean_nothing(build: Build, batches: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="batches"):
        build(batches=batches)


def test_unknown_forms_gpus_and_libraries(build: Build) -> None:
    for options, error in (
        ({"form": "planar"}, UsageError),
        ({"library": "tensorflow"}, UsageError),
        ({"compute_capabilities": ["6.1"]}, UsageError),
        ({"compute_capabilities": ["abc"]}, UsageError),
    ):
        with pytest.raises(error):
            build(**options)


def test_without_a_compiler_for_the_kernels(
    models: ModelSet, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise MissingExtraError("no compiler for the CUDA kernels")

    monkeypatch.setattr(tensorrt, "find_compiler", none)
    with pytest.raises(MissingExtraError, match="no compiler"):
        build_gpu_models(models, root)


def gpu_here(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu = GpuInfo(0, "this one", capability, 80 << 30)
    monkeypatch.setattr(tensorrt, "list_gpus", lambda: [gpu])


def test_a_library_that_compiles_on_the_gpu_names_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_here(monkeypatch, (9, 0))
    found = fake_library()
    assert tensorrt._targets(found, ()).listed == ("9.0",)
    assert tensorrt._targets(found, ()).later_than is None
    with pytest.raises(UsageError, match=r"compute capability 8\.6 with tensorrt"):
        tensorrt._targets(found, ["8.6"])


def test_turing_is_compiled_for_where_it_is_the_gpu(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = tensorrt._targets(library, ())
    assert (everywhere.named, everywhere.later_than) == ((), "12.0")
    gpu_here(monkeypatch, (8, 6))
    assert tensorrt._targets(library, ()) == everywhere
    gpu_here(monkeypatch, (7, 5))
    assert tensorrt._targets(library, ()).named == ("7.5",)
    assert tensorrt._targets(library, ["8.9"]).named == ("8.9",)


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), ["tensorrt_rtx", "tensorrt"], "tensorrt"),
        ((8, 0), ["tensorrt_rtx", "tensorrt"], "tensorrt"),
        ((9, 0), ["tensorrt_rtx"], None),
        ((7, 5), ["tensorrt_rtx", "tensorrt"], None),
        ((8, 9), ["tensorrt_rtx", "tensorrt"], None),
        ((12, 1), ["tensorrt_rtx", "tensorrt"], None),
    ],
)
def test_the_library_goes_with_the_gpu(monkeypatch, capability, installed, chosen) -> None:
    monkeypatch.setattr(tensorrt, "installed_libraries", lambda: installed)
    assert tensorrt._library_for_this_gpu() is None  # no GPU here
    gpu_here(monkeypatch, capability)
    assert tensorrt._library_for_this_gpu() == chosen
