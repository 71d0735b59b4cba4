from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.build.networks import (
    TINY,
    probability,
    random_inputs,
    random_variables,
    save_checkpoint,
)
from trtseg import __version__
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.build import builder
from trtseg.build.freeze import FrozenNetwork, freeze
from trtseg.build.parts import parts
from trtseg.build.reference import evaluate
from trtseg.engine import load_engine
from trtseg.errors import EngineError, ModelError
from trtseg.models import ModelSet

CONFIG = """
numberOfOutputClasses = 2
numberOfInputChannels = 1
numberFMsPerLayerNormal = [2, 3, 3, 4]
kernelDimPerLayerNormal = [[3,3,3], [3,3,3], [3,3,3], [3,3,3]]
layersWithResidualConnNormal = [4]
useSubsampledPathway = True
subsampleFactor = [[3,3,3]]
numberFMsPerLayerFC = [8, 8]
kernelDimFor1stFcLayer = [3,3,3]
layersWithResidualConnFC = [2]
segmentsDimTrain = [13,13,13]
segmentsDimInference = [15,15,15]
batchSizeTrain = 5
dropoutRatesFc = [0.0, 0.5, 0.5]
rollAverageForBNOverThatManyBatches = 4
"""
NETS = {"bdn": 1, "cgm": 2}  # the seed of each
FILES = ("fc.onnx", "manifest.json", "normal.onnx", "sub.onnx", "weights.npz")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """File name to content of a model set of two tiny networks."""
    folder = tmp_path_factory.mktemp("saved")
    for net, seed in NETS.items():
        save_checkpoint(folder / f"{net}.model.ckpt", random_variables(TINY, seed))
        (folder / f"{net}_model_config.cfg").write_text(CONFIG)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def models(saved: dict[str, bytes], tmp_path: Path) -> ModelSet:
    """That model set, in a folder of its own."""
    folder = tmp_path / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    return ModelSet("tiny", folder, "imported", "not for use")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "engines"


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Relative path to what changes when a file is written or replaced."""
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_builds_both_networks_whole(models: ModelSet, root: Path) -> None:
    said: list[str] = []
    engines = builder.build_models(models, root, report=said.append)
    assert [(engine.models, engine.net) for engine in engines] == [("tiny", "bdn"), ("tiny", "cgm")]
    assert sorted(stamps(root)) == [
        f"tiny/{net}/{name}" for net in ("bdn", "cgm") for name in FILES
    ]
    assert [line.split(":")[0] for line in said] == ["BDN"] * 3 + ["CGM"] * 3
    for engine in engines:
        assert engine.spec == TINY
        assert engine.notice == "not for use"
        loaded = load_engine(root, "tiny", engine.net)
        assert (loaded.folder, loaded.spec) == (engine.folder, TINY)
        assert loaded.manifest == json.loads(json.dumps(engine.manifest))


@pytest.mark.parametrize("net", NETS)
def test_what_is_built_computes_what_the_checkpoint_does(
    models: ModelSet, root: Path, net: str
) -> None:
    builder.build_models(models, root)
    variables = random_variables(TINY, NETS[net])
    folder = root / "tiny" / net
    assert (folder / "weights.npz").read_bytes() == freeze(variables, TINY).to_bytes()
    inputs = random_inputs(TINY, seed=9)
    network = OpenVINOBackend(threads=1).load(load_engine(root, "tiny", net))
    logits = network.tile_logits({name: tile[None] for name, tile in inputs.items()})
    expected = evaluate(variables, TINY, inputs)
    np.testing.assert_allclose(probability(logits), expected, rtol=0, atol=1e-5)


def test_manifest_says_what_was_built_from_what(models: ModelSet, root: Path) -> None:
    builder.build_models(models, root)
    folder = root / "tiny" / "cgm"
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert sorted(manifest) == [
        "architecture",
        "checkpoint",
        "files",
        "models",
        "network",
        "notice",
        "proof",
        "schema",
        "sha256",
        "tile",
        "versions",
    ]
    assert (manifest["models"], manifest["network"], manifest["tile"]) == ("tiny", "cgm", 15)
    assert manifest["architecture"] == json.loads(json.dumps(TINY.to_dict()))
    assert manifest["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("fc.onnx", "normal.onnx", "sub.onnx", "weights.npz")
    }
    assert manifest["checkpoint"] == {
        name: hashlib.sha256((models.folder / name).read_bytes()).hexdigest()
        for name in (
            "cgm.model.ckpt.index",
            "cgm.model.ckpt.data-00000-of-00001",
            "cgm_model_config.cfg",
        )
    }
    assert 0 <= manifest["proof"]["largest_difference"] < 1e-5
    assert manifest["proof"]["tolerance"] == 1e-4
    versions = manifest["versions"]
    assert sorted(versions) == ["numpy", "onnx", "openvino", "python", "tensorflow", "trtseg"]
    assert versions["trtseg"] == __version__
    assert versions["numpy"] == np.__version__
    # Shared machines: nothing says where or by whom it was built.
    assert str(models.folder) not in text
    assert str(root) not in text


def test_building_twice_gives_the_same_files(models: ModelSet, root: Path, tmp_path: Path) -> None:
    builder.build_models(models, root)
    builder.build_models(models, tmp_path / "other")
    for net in NETS:
        for name in FILES:
            first, second = (r / "tiny" / net / name for r in (root, tmp_path / "other"))
            assert first.read_bytes() == second.read_bytes()


def test_an_intact_build_is_kept_unless_forced(models: ModelSet, root: Path) -> None:
    builder.build_models(models, root)
    before = stamps(root)
    said: list[str] = []
    engines = builder.build_models(models, root, force=False, report=said.append)
    assert stamps(root) == before
    assert said == []
    assert [engine.net for engine in engines] == ["bdn", "cgm"]
    builder.build_models(models, root)
    after = stamps(root)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


@pytest.mark.parametrize("name", FILES)
def test_only_a_damaged_build_is_replaced(models: ModelSet, root: Path, name: str) -> None:
    builder.build_models(models, root)
    before = stamps(root)
    path = root / "tiny" / "cgm" / name
    intact = path.read_bytes()
    path.write_bytes(intact[:-40])
    builder.build_models(models, root, force=False)
    assert path.read_bytes() == intact
    after = stamps(root)
    kept = {name for name in before if after[name] == before[name]}
    assert kept == {f"tiny/bdn/{file}" for file in FILES}


def test_a_stale_build_is_replaced(models: ModelSet, root: Path) -> None:
    builder.build_models(models, root)
    old = (root / "tiny" / "bdn" / "weights.npz").read_bytes()
    changed = random_variables(TINY, seed=77)
    save_checkpoint(models.checkpoint("bdn"), changed)
    builder.build_models(models, root, force=False)
    new = (root / "tiny" / "bdn" / "weights.npz").read_bytes()
    assert new != old
    assert new == freeze(changed, TINY).to_bytes()
    load_engine(root, "tiny", "bdn", checkpoint=models.digests("bdn"))


def perturbed(variables: dict[str, np.ndarray], spec: object) -> FrozenNetwork:
    """A folding that is wrong in one weight of the last layer."""
    network = freeze(variables, TINY)
    last = network.fc[-1]
    weight = last.weight.copy()
    weight[0, 3] += 0.05
    return replace(network, fc=(*network.fc[:-1], replace(last, weight=weight)))


def test_a_network_that_disagrees_is_not_written(
    models: ModelSet, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "freeze", perturbed)
    with pytest.raises(EngineError) as caught:
        builder.build_models(models, root)
    assert "tiny BDN: the frozen network differs from its checkpoint by" in caught.value.found
    assert caught.value.expected == "at most 1e-04"
    assert stamps(root) == {}


def test_a_network_that_disagrees_leaves_the_older_build(
    models: ModelSet, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.build_models(models, root)
    before = stamps(root)
    monkeypatch.setattr(builder, "freeze", perturbed)
    with pytest.raises(EngineError, match="differs from its checkpoint"):
        builder.build_models(models, root)
    assert stamps(root) == before
    load_engine(root, "tiny", "bdn")


def test_a_difference_that_is_no_number_is_refused(
    models: ModelSet, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "disagreement", lambda *_: float("nan"))
    with pytest.raises(EngineError, match="differs from its checkpoint by nan"):
        builder.build_models(models, root)
    assert stamps(root) == {}


def test_disagreement_measures_probability() -> None:
    variables = random_variables(TINY)
    assert builder.disagreement(variables, TINY, parts(freeze(variables, TINY))) < 1e-5
    # Without its bias the last layer is off by that much in score: far from 0.
    biased = variables | {"net/b_2": np.array([0, 2], np.float32)}
    unbiased = variables | {"net/b_2": np.array([0, 0], np.float32)}
    found = builder.disagreement(biased, TINY, parts(freeze(unbiased, TINY)))
    assert 0.3 < found < 0.5  # the logistic changes by 0.46 at most over a score of 2


def test_a_damaged_checkpoint_leaves_the_older_build(models: ModelSet, root: Path) -> None:
    builder.build_models(models, root)
    before = stamps(root)
    data = models.folder / "bdn.model.ckpt.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x10
    data.write_bytes(bytes(content))
    for force in (True, False):
        with pytest.raises(ModelError, match="cannot be read"):
            builder.build_models(models, root, force=force)
        assert stamps(root) == before


def test_a_checkpoint_of_another_architecture_is_refused(models: ModelSet, root: Path) -> None:
    for net in NETS:  # without configs, the published architecture applies
        (models.folder / f"{net}_model_config.cfg").unlink()
    with pytest.raises(ModelError, match=r"bdn\.model\.ckpt: tensor net/W has shape"):
        builder.build_models(models, root)
    assert stamps(root) == {}


def test_a_config_that_trains_batch_norm_on_one_value_is_refused(
    models: ModelSet, root: Path
) -> None:
    # n / (n - 1) has no value there.
    text = CONFIG.replace("[13,13,13]", "[9,9,9]").replace("Train = 5", "Train = 1")
    assert text.count("9,9,9") == text.count("batchSizeTrain = 1") == 1
    (models.folder / "bdn_model_config.cfg").write_text(text)
    with pytest.raises(ModelError, match="training"):
        builder.build_models(models, root)
    assert stamps(root) == {}


def test_an_incomplete_model_set_is_refused(models: ModelSet, root: Path) -> None:
    (models.folder / "cgm.model.ckpt.index").unlink()
    with pytest.raises(ModelError, match=r"cgm\.model\.ckpt\.index"):
        builder.build_models(models, root)
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["bdn"]
