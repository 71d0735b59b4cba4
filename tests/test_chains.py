"""Both networks on a device: the choice of it, and the GPU's chain on doubles of a GPU."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trtseg
from tests.backends.fake_tensorrt import Diagnostics, FakeTensorRT, Validity, engine_bytes
from tests.cuda.executors import Function, threshold
from tests.cuda.host_device import HostDevice
from tests.golden import GOLDEN, NETWORK_CASES, golden_scan, network_case, read_golden
from trtseg import chains, tiling
from trtseg.architecture import NETWORKS, PUBLISHED
from trtseg.backends.base import NetworkOutput
from trtseg.backends.fake import FakeBackend
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.tensorrt import TensorRTBackend
from trtseg.chains import gate, load_engines, load_gpu_engines, open_chain
from trtseg.engine import WEIGHTS, Engine
from trtseg.errors import DeviceError, EngineError, NotCompiledError, UsageError
from trtseg.gpu_engine import write_gpu_engine
from trtseg.nifti import read_scan
from trtseg.scan import Scan

CASE = GOLDEN / "chain_random11" / "scan.nii.gz"
COST = {"multiply_adds": 1000, "bytes": 10, "time": 1}


@pytest.fixture
def root(engines_root: Path, tmp_path: Path) -> Path:
    """An engines folder of its own, for what is compiled into it."""
    return Path(shutil.copytree(engines_root, tmp_path / "engines"))


def compiled(
    root: Path, models: str, *, exact: bool = False, batches: tuple[int, ...] = (1, 4)
) -> dict[str, Function]:
    """Put engines for the double of TensorRT in place; gives what they compute.

    That is OpenVINO's float32 answer where they are to be `exact`, else a threshold.
    """
    functions = {}
    for net, engine in load_engines(models, root).items():
        functions[net] = exactly(engine) if exact else threshold(engine.spec)
        write(root, engine, functions[net], batches)
    return functions


def exactly(engine: Engine) -> Function:
    network = OpenVINOBackend().load(engine)
    return lambda inputs: network.tile_logits(
        {name: one[None, None] for name, one in inputs.items()}
    )


def write(root: Path, engine: Engine, function: Function, batches: tuple[int, ...]) -> None:
    spec, stream = engine.spec, io.BytesIO()
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.standard_normal((1, 1, side, side, side)).astype(np.float32)
        for name, side in spec.input_sizes().items()
    }
    answer = function({name: one[0, 0] for name, one in inputs.items()})
    np.savez(stream, **inputs, logit=answer)
    engines = {f"b{n}.engine": engine_bytes(spec, n, engine.net) for n in batches}
    write_gpu_engine(
        root,
        engine.models,
        engine.net,
        spec=spec,
        files={
            **engines,
            "ceiling.engine": b"{}",
            "selftest.npz": stream.getvalue(),
            "kernels.ptx": b"ptx",
        },
        facts={
            "recipe": {"frozen_sha256": engine.manifest["files"][WEIGHTS]},
            "checkpoint": engine.manifest["checkpoint"],
            "library": {"name": "tensorrt_rtx", "version": "9.8.7"},
            "compute_capabilities": ["8.6"],
            "batches": batches,
            "form": "plain",
            "precision": "float16",
            "selftest": {"labels_equal": 1.0, "largest_difference": 1e-4},
            "notice": engine.notice,
            "cost": COST,
            "versions": {"trtseg": "0"},
        },
    )


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def gpu(root: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """A GPU by doubles, with the random networks' place taken by thresholds."""
    fake = FakeTensorRT(device, PUBLISHED, compiled(root, "random11"))
    put_in_place(monkeypatch, fake)
    yield fake
    assert device.closed


def put_in_place(monkeypatch: pytest.MonkeyPatch, fake: FakeTensorRT) -> None:
    def opened(index: int) -> TensorRTBackend:
        return TensorRTBackend(index, library=fake.library, device=fake.device)

    monkeypatch.setattr(chains, "open_gpu", opened)


@pytest.mark.parametrize(
    ("case", "models"), [("chain_random11", "random11"), ("chain_crop", "demo")]
)
def test_the_gpus_chain_gives_deepmedics_labels(
    case: str, models: str, root: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the GPU's path but the arithmetic of its networks, which is OpenVINO's here."""
    functions = compiled(root, models, exact=True, batches=(1,))
    put_in_place(monkeypatch, FakeTensorRT(device, PUBLISHED, functions))
    with trtseg.Segmenter(models, engines=root, device="cuda:1") as segmenter:
        result = segmenter.segment(golden_scan(case), probabilities=True)
    assert result.device == "cuda:1"
    assert result.precision == "f16"
    maps = (
        (result.brain, result.brain_probabilities),
        (result.cortex, result.cortex_probabilities),
    )
    for net, (labels, probabilities) in zip(("brain_", "cgm_"), maps, strict=True):
        assert probabilities is not None
        read_golden(case, net).compare(labels, probabilities, net)
    assert result.brain_ml == pytest.approx(result.brain.sum() * 0.512e-3, rel=1e-5)
    assert list(result.times) == [
        "read",
        "upload",
        "z-score",
        "brain",
        "boxes",
        "cortex",
        "gate",
        "download",
        "host",
    ]


@pytest.mark.parametrize("case", NETWORK_CASES)
def test_one_network_on_the_gpu_gives_deepmedics_labels(
    case: str, root: Path, device: HostDevice
) -> None:
    functions = compiled(root, "random11", exact=True, batches=(4,))
    backend = TensorRTBackend(
        library=FakeTensorRT(device, PUBLISHED, functions).library, device=device
    )
    network = backend.load(load_gpu_engines(load_engines("random11", root), root)["cgm"])
    volume, roi = network_case(case)
    plan = tiling.plan_tiles(volume.shape, network.spec, roi)
    output = gate(network.run(volume, plan, probabilities=True), roi)
    backend.close()
    assert output.probabilities is not None
    read_golden(case).compare(output.labels, output.probabilities, case)


def test_auto_is_a_gpu_that_has_everything(gpu: FakeTensorRT, root: Path) -> None:
    chain, note = open_chain("random11", root)
    assert (chain.device, chain.precision, note) == ("cuda:0", "f16", "")
    assert chain.description == "host double, tensorrt_rtx 9.8.7, bdn b4, cgm b4"
    assert {net: one.folder.name for net, one in chain.engines.items()} == {
        "bdn": "cuda",
        "cgm": "cuda",
    }
    device_bytes = chain.device_bytes()
    assert device_bytes is not None
    assert device_bytes > 2 * gpu.weights_bytes
    chain.close()


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_precision_of_the_cpu_decides_for_it(root: Path, monkeypatch, precision: str) -> None:
    def no_gpu(index: int) -> TensorRTBackend:
        raise AssertionError

    monkeypatch.setattr(chains, "open_gpu", no_gpu)
    monkeypatch.setattr(chains, "open_cpu", lambda **given: FakeBackend(given["precision"]))
    chain, note = open_chain("random11", root, precision=precision)
    assert (chain.device, chain.precision, note) == ("fake", precision, "")
    chain.close()


def test_f16_asks_for_a_gpu(gpu: FakeTensorRT, root: Path) -> None:
    chain, _ = open_chain("random11", root, precision="f16")
    assert chain.device == "cuda:0"
    chain.close()


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [
        ("gpu", None, "device 'gpu'; expected auto, cpu, cuda or cuda:N"),
        ("auto", "f64", "precision 'f64'; expected f32, bf16, f16"),
        ("cpu", "f16", "precision f16 with device cpu; expected f32, bf16"),
        ("cuda", "f32", "precision f32 with device cuda; expected f16"),
        ("cuda:1", "bf16", "precision bf16 with device cuda:1; expected f16"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, device, precision, said) -> None:
    with pytest.raises(UsageError) as caught:
        open_chain("demo", tmp_path, device=device, precision=precision)
    assert str(caught.value).startswith(said)


def test_the_scan_that_follows_goes_up_beside_the_present_one(
    gpu: FakeTensorRT, root: Path
) -> None:
    chain, _ = open_chain("random11", root)
    scan, other = read_scan(CASE), read_scan(CASE)
    asked: list[None] = []

    def following() -> Scan | None:
        asked.append(None)
        return other if len(asked) == 2 else None

    first = chain.run(scan, following=following)
    again = chain.run(other)
    assert len(asked) == 2
    assert gpu.device.asides == [scan.data.nbytes]
    assert gpu.device.uploads.count(scan.data.nbytes) == 1
    np.testing.assert_array_equal(first.cortex.labels, again.cortex.labels)
    chain.close()


def test_the_cpu_does_not_ask_for_the_scan_that_follows(root: Path) -> None:
    def following() -> Scan | None:
        raise AssertionError

    chain, _ = open_chain("random11", root, device="cpu")
    assert chain.run(read_scan(CASE), following=following).brain.labels.any()
    chain.close()


def test_auto_without_a_gpu_is_the_cpu_and_says_so(root: Path, monkeypatch) -> None:
    def no_gpu(index: int) -> TensorRTBackend:
        raise DeviceError("no GPU", expected="one", action="buy it")

    monkeypatch.setattr(chains, "open_gpu", no_gpu)
    chain, note = open_chain("random11", root)
    assert (chain.device, chain.precision) == ("cpu", "f32")
    assert note == "running on the CPU: no GPU"
    assert chain.device_bytes() is None
    chain.close()
    with pytest.raises(DeviceError, match="buy it"):
        open_chain("random11", root, device="cuda")


def test_auto_with_a_driver_that_is_too_old_is_the_cpu(gpu: FakeTensorRT, root: Path) -> None:
    gpu.validity = (Validity.INVALID, Diagnostics.OLD_CUDA_DRIVER)
    chain, note = open_chain("random11", root)
    assert chain.device == "cpu"
    assert note.startswith("running on the CPU: tensorrt_rtx 9.8.7 cannot start on host double")
    chain.close()


def test_auto_with_nothing_compiled_names_the_command(gpu: FakeTensorRT, root: Path) -> None:
    for net in NETWORKS:
        shutil.rmtree(root / "random11" / net / "cuda")
    chain, note = open_chain("random11", root)
    assert chain.device == "cpu"
    assert note.startswith("running on the CPU: ")
    assert note.endswith("compile it: trtseg engines build --models random11 --device cuda")
    chain.close()
    with pytest.raises(NotCompiledError, match="--device cuda"):
        open_chain("random11", root, device="cuda")


@pytest.mark.parametrize("device_name", ["auto", "cuda"])
def test_a_damaged_engine_is_refused_whatever_was_asked_for(
    gpu: FakeTensorRT, root: Path, device_name: str
) -> None:
    path = root / "random11" / "cgm" / "cuda" / "b4.engine"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(EngineError, match=r"b4\.engine.*damaged or foreign.*--device cuda"):
        open_chain("random11", root, device=device_name)


def test_engines_of_other_weights_are_stale(root: Path) -> None:
    compiled(root, "random11")
    built = load_engines("random11", root)
    assert set(load_gpu_engines(built, root)) == set(NETWORKS)
    bdn = built["bdn"]
    files = {**bdn.manifest["files"], WEIGHTS: "0" * 64}
    other = dataclasses.replace(bdn, manifest={**bdn.manifest, "files": files})
    with pytest.raises(EngineError, match="other weights"):
        load_gpu_engines({"bdn": other}, root)


def test_what_a_gpu_executes_counts_whole_batches(gpu: FakeTensorRT, root: Path) -> None:
    chain, _ = open_chain("random11", root)
    scan = read_scan(CASE)
    brain = np.zeros(scan.shape, np.uint8)
    brain[:2, :2, :2] = 1
    # 53 x 40 x 32 voxels: 8 tiles for the brain, 2 batches of 4; 1 tile for the cortex, 1 batch.
    assert chain.work(scan, brain).multiply_adds == 12 * COST["multiply_adds"]
    assert chain.work(scan, brain).bytes == 12 * COST["bytes"]
    chain.close()


def test_what_the_cpu_executes_is_less_than_the_published_system(root: Path) -> None:
    chain, _ = open_chain("random11", root, device="cpu")
    scan = read_scan(CASE)
    brain = np.ones(scan.shape, np.uint8)
    tiles = len(tiling.plan_tiles(scan.shape, PUBLISHED))
    published = 2 * tiles * PUBLISHED.multiply_adds()
    assert 0.1 * published < chain.work(scan, brain).multiply_adds < 0.7 * published
    # The brain's network runs over all of the scan, the cortex's within the brain.
    nothing = chain.work(scan, np.zeros_like(brain))
    assert chain.work(scan, brain).multiply_adds == 2 * nothing.multiply_adds
    chain.close()


def test_gate() -> None:
    roi = np.array([[[True, False]]])
    output = NetworkOutput(np.array([[[1, 1]]], np.uint8), np.array([[[0.7, 0.9]]], np.float32))
    gated = gate(output, roi)
    assert gated.labels.tolist() == [[[1, 0]]]
    assert gated.labels.dtype == np.uint8
    assert gated.probabilities is not None
    assert gated.probabilities.tolist() == [[[pytest.approx(0.7), 0.0]]]
    assert gated.probabilities.dtype == np.float32
