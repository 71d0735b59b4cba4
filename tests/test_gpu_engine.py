from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.build.networks import TINY, random_variables
from trtseg import gpu_engine
from trtseg.build.freeze import freeze
from trtseg.engine import write_engine
from trtseg.errors import EngineError, NotCompiledError, OutputError
from trtseg.gpu_engine import (
    GpuEngine,
    cache_key,
    engine_file,
    gpu_built,
    gpu_engine_folder,
    load_gpu_engine,
    read_owned,
    write_gpu_engine,
)

FROZEN = "f" * 64
COMMAND = "trtseg engines build --models tiny --device cuda"


def selftest_file() -> bytes:
    stream = io.BytesIO()
    inputs = {"normal": np.ones((1, 1, 15, 15, 15), np.float32)}
    np.savez(stream, **inputs, logit=answer())
    return stream.getvalue()


def answer() -> np.ndarray:
    """Alternating 1 and -1, (7, 7, 7)."""
    return np.where(np.arange(343) % 2, -1, 1).astype(np.float32).reshape(7, 7, 7)


FILES = {
    "b1.engine": b"one tile",
    "b4.engine": b"four tiles",
    "kernels.ptx": b"kernels\0",
    "ceiling.engine": b"a product",
    "selftest.npz": selftest_file(),
}


def facts() -> dict[str, Any]:
    return {
        "recipe": {"frozen_sha256": FROZEN, "form": "plain"},
        "checkpoint": {"bdn.model.ckpt.index": "c" * 64},
        "cost": {"multiply_adds": 10, "bytes": 20},
        "versions": {"trtseg": "1"},
        "library": {"name": "tensorrt_rtx", "version": "1.7.1"},
        "compute_capabilities": ["8.6", "12.0"],
        "later_than": "12.0",
        "batches": [1, 4],
        "form": "plain",
        "precision": "float16",
        "selftest": {"labels_equal": 0.99, "largest_difference": 0.5},
        "notice": "not for use",
    }


def write(root: Path, **changes: Any) -> GpuEngine:
    return write_gpu_engine(
        root, "tiny", "bdn", spec=TINY, files=FILES, facts={**facts(), **changes}
    )


def load(root: Path, frozen: str = FROZEN) -> GpuEngine:
    return load_gpu_engine(root, "tiny", "bdn", frozen_sha256=frozen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path).folder


def test_what_is_written_is_loaded(tmp_path: Path) -> None:
    written = write(tmp_path)
    loaded = load(tmp_path)
    assert loaded == written
    assert loaded.folder == tmp_path / "tiny" / "bdn" / "cuda"
    assert loaded.folder == gpu_engine_folder(tmp_path, "tiny", "bdn")
    assert sorted(path.name for path in loaded.folder.iterdir()) == [
        *sorted(FILES)[:4],
        "manifest.json",
        "selftest.npz",
    ]
    assert (loaded.models, loaded.net, loaded.spec) == ("tiny", "bdn", TINY)
    assert loaded.batches == (1, 4)
    assert loaded.kernels == ("kernels.ptx",)
    assert loaded.notice == "not for use"
    assert loaded.summary == (
        "tensorrt_rtx 1.7.1, plain, batches 1, 4, compute capability 8.6, 12.0 and above 12.0"
    )
    assert [loaded.read(engine_file(batch)) for batch in (1, 4)] == [b"one tile", b"four tiles"]


def test_layers_kept_in_float32_are_told(tmp_path: Path) -> None:
    layers = {"normal.5": ["convolution"], "fc.2": ["activation", "convolution"]}
    for engine in (write(tmp_path, float32_layers=layers), load(tmp_path)):
        assert engine.summary.startswith(
            "tensorrt_rtx 1.7.1, plain (fc.2, normal.5 in float32), batches 1, 4, "
        )
    assert "float32" not in write(tmp_path, float32_layers={}).summary


def test_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {
        name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }
    assert (manifest["schema"], manifest["tile"]) == (1, 15)
    assert manifest["cache_key"] == cache_key({"form": "plain", "frozen_sha256": FROZEN})
    assert manifest["architecture"] == json.loads(json.dumps(TINY.to_dict()))


def test_cache_key_covers_every_word_of_the_recipe() -> None:
    recipe = {"form": "plain", "batches": [1, 4], "library": ["tensorrt_rtx", "1.7"]}
    assert cache_key(recipe) == cache_key(dict(reversed(recipe.items())))
    for change in ({"form": "x"}, {"batches": [1]}, {"library": ["tensorrt_rtx", "1.8"]}):
        assert cache_key({**recipe, **change}) != cache_key(recipe)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o002, 0o077])
def test_nobody_else_may_write_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = write(tmp_path).folder
    finally:
        os.umask(before)
    shown = 0o755 & ~mask
    assert folder.stat().st_mode & 0o777 == shown
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644 & ~mask}
    load(tmp_path)


def test_an_older_engine_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tiny" / "bdn" / "cuda" / "b4.cache").write_bytes(b"of the older one")
    write(tmp_path, form="transposed")
    loaded = load(tmp_path)
    assert loaded.manifest["form"] == "transposed"
    assert not loaded.folder.joinpath("b4.cache").exists()
    assert [path.name for path in loaded.folder.parent.iterdir()] == ["cuda"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(b"a file")
    with pytest.raises(OutputError, match="tiny"):
        write(tmp_path)


def test_nothing_compiled(tmp_path: Path) -> None:
    with pytest.raises(NotCompiledError) as caught:
        load(tmp_path)
    assert "BDN of model set 'tiny'" in caught.value.found
    assert caught.value.action == f"compile it: {COMMAND}"


def test_gpu_built_needs_both_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu_built(tmp_path, "tiny")
    for net, both in (("cgm", False), ("bdn", True)):
        write_gpu_engine(tmp_path, "tiny", net, spec=TINY, files=FILES, facts=facts())
        assert gpu_built(tmp_path, "tiny") is both

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(EngineError, match=r"cuda/manifest\.json: Permission denied"):
        gpu_built(tmp_path, "tiny")


def build(root: Path, seed: int) -> str:
    """Build a network of random weights; digest of them."""
    weights = freeze(random_variables(TINY, seed), TINY).to_bytes()
    names = ("normal.onnx", "sub.onnx", "fc.onnx")
    built = write_engine(
        root, "tiny", "bdn", spec=TINY, checkpoint={}, notice="", proof={}, versions={},
        files={"weights.npz": weights, **dict.fromkeys(names, b"a graph")},
    )  # fmt: skip
    return str(built.manifest["files"]["weights.npz"])


def test_building_the_same_weights_again_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path, 1)
    written = write(tmp_path, recipe={"frozen_sha256": first})
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert build(tmp_path, 1) == first
    assert load(tmp_path, first) == written
    with pytest.raises(EngineError, match="other weights"):
        load(tmp_path, build(tmp_path, 2))


def test_other_weights_make_it_stale(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="other weights") as caught:
        load(tmp_path, frozen="0" * 64)
    assert caught.value.action == f"compile again: {COMMAND}"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused_at_load_and_at_read(
    folder: Path, tmp_path: Path, name: str
) -> None:
    engine = load(tmp_path)
    flip(folder / name, 3)
    for attempt in (lambda: load(tmp_path), lambda: engine.read(name)):
        with pytest.raises(EngineError, match="damaged or foreign") as caught:
            attempt()
        assert str(folder / name) in caught.value.found
        assert COMMAND in caught.value.action


def test_every_byte_of_the_manifest_counts(folder: Path, tmp_path: Path) -> None:
    path = folder / "manifest.json"
    intact = path.read_bytes()
    for at in range(0, len(intact), 7):
        flip(path, at)
        # Spaces between the words mean nothing; all else is refused.
        if path.read_bytes().translate(None, b" \n\t\r") != intact.translate(None, b" \n\t\r"):
            with pytest.raises(EngineError):
                load(tmp_path)
        path.write_bytes(intact)
    load(tmp_path)


@pytest.mark.parametrize("name", ["b4.engine", "selftest.npz"])
def test_a_missing_file_is_told(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(EngineError, match=f"{name}.*No such file"):
        load(tmp_path)


def test_a_file_the_manifest_does_not_list_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "extra.engine").write_bytes(b"foreign")
    with pytest.raises(EngineError, match="not listed"):
        load(tmp_path).read("extra.engine")


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and its seal, as another version of trtseg would have written it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["sha256"]
    text = json.dumps(manifest, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schema", 2, "layout 2"),
        ("models", "other", "models 'other'"),
        ("network", "cgm", "network 'cgm'"),
        ("recipe", None, "recipe None"),
        ("library", "1.7", "library '1.7'"),
        ("batches", [], r"batches \[\]; expected a list, not empty"),
        ("batches", [1, 4, 16], r"expected b1\.engine, b16\.engine, b4\.engine, ceiling"),
        ("files", {"../b1.engine": "0" * 64}, "files are not listed"),
        ("files", None, "files are not listed"),
        ("architecture", {"tile": 45}, "architecture not readable"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    folder: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    reseal(folder, lambda manifest: manifest.update({key: value}))
    with pytest.raises(EngineError, match=said) as caught:
        load(tmp_path)
    assert COMMAND in caught.value.action


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100000])
def test_a_manifest_that_is_none_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"manifest\.json"):
        load(tmp_path)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_is_refused(folder: Path, tmp_path: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(
        EngineError, match=f"others than its owner can write it.*{mode:o}"
    ) as caught:
        load(tmp_path)
    assert caught.value.action.endswith(f"chmod go-w {folder}")
    folder.chmod(0o755)
    load(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "b1.engine", "kernels.ptx"])
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_can_write_is_refused(
    folder: Path, tmp_path: Path, name: str, mode: int
) -> None:
    (folder / name).chmod(mode)
    with pytest.raises(EngineError, match=rf"{name}: others than its owner"):
        load(tmp_path)


def owned_by(monkeypatch: pytest.MonkeyPatch, owner: int, user: int) -> None:
    """Let every file seem to belong to `owner`, and the process to be `user`'s."""
    stat = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        values = list(stat(descriptor))
        values[4] = owner
        return os.stat_result(values)

    monkeypatch.setattr(gpu_engine.os, "fstat", fstat)
    monkeypatch.setattr(gpu_engine.os, "geteuid", lambda: user)


@pytest.mark.parametrize(("owner", "user"), [(1000, 1000), (0, 1000), (0, 0)])
def test_the_users_own_and_roots_are_trusted(
    folder: Path, tmp_path: Path, owner: int, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned_by(monkeypatch, owner, user)
    load(tmp_path)


@pytest.mark.parametrize(("owner", "user"), [(1001, 1000), (1000, 0)])
def test_somebody_elses_is_refused(
    folder: Path, tmp_path: Path, owner: int, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned_by(monkeypatch, owner, user)
    with pytest.raises(EngineError, match=f"belongs to user {owner}.*user {user}, who runs this"):
        load(tmp_path)


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "b1.engine").rename(tmp_path / "b1.engine")
    (folder / "b1.engine").symlink_to(tmp_path / "b1.engine")
    with pytest.raises(EngineError, match=r"b1\.engine.*neither of them a link"):
        load(tmp_path)
    (folder / "b1.engine").unlink()
    (tmp_path / "b1.engine").rename(folder / "b1.engine")
    load(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="neither of them a link"):
        load(tmp_path)


def test_a_cache_beside_the_engine_is_checked_too(folder: Path) -> None:
    path = folder / "b1.cache"
    with pytest.raises(FileNotFoundError):
        read_owned(path)
    path.write_bytes(b"kernels")
    path.chmod(0o600)
    assert read_owned(path) == b"kernels"
    path.chmod(0o666)
    with pytest.raises(EngineError, match="others than its owner"):
        read_owned(path)


def test_another_library_or_version_makes_it_stale(folder: Path, tmp_path: Path) -> None:
    engine = load(tmp_path)
    engine.check_library("tensorrt_rtx", "1.7.1")
    for name, version in (("tensorrt_rtx", "1.7.2"), ("tensorrt", "1.7.1")):
        with pytest.raises(EngineError, match=r"compiled by tensorrt_rtx 1\.7\.1") as caught:
            engine.check_library(name, version)
        assert f"{name} {version}" in caught.value.expected
        assert COMMAND in caught.value.action


@pytest.mark.parametrize("capability", [(8, 6), (12, 0), (12, 1), (13, 0)])
def test_gpus_it_was_compiled_for(
    folder: Path, tmp_path: Path, capability: tuple[int, int]
) -> None:
    load(tmp_path).check_device(capability, "a GPU")


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 0), (10, 0)])
def test_gpus_it_was_not_compiled_for(
    folder: Path, tmp_path: Path, capability: tuple[int, int]
) -> None:
    with pytest.raises(EngineError, match=r"8\.6, 12\.0 and above 12\.0") as caught:
        load(tmp_path).check_device(capability, "Quadro")
    assert caught.value.expected == "{}.{}, that of Quadro".format(*capability)


def test_without_later_gpus_only_those_named_will_do(tmp_path: Path) -> None:
    engine = write(tmp_path, later_than=None)
    engine.check_device((12, 0), "a GPU")
    with pytest.raises(EngineError, match=r"compute capability 8\.6, 12\.0;"):
        engine.check_device((12, 1), "a GPU")


def test_selftest(folder: Path, tmp_path: Path) -> None:
    engine = load(tmp_path)
    inputs, expected = engine.selftest
    assert {name: tile.shape for name, tile in inputs.items()} == {"normal": (1, 1, 15, 15, 15)}
    np.testing.assert_array_equal(expected, answer())
    assert engine.check_selftest(answer() + np.float32(0.25)) == {
        "labels_equal": 1.0,
        "largest_difference": 0.25,
    }


def wrong_labels() -> np.ndarray:
    logits = answer()
    logits.flat[:8:2] = -0.01  # 4 of 343
    return logits


def not_finite() -> np.ndarray:
    logits = answer()
    logits[3, 3, 3] = np.nan
    return logits


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (answer() + np.float32(0.6), "100.0000% .* by up to 0.6"),
        (wrong_labels(), "98.8338% of the labels"),
        (not_finite(), "342 of them finite"),
        (answer()[:6], r"\(6, 7, 7\) logits"),
    ],
)
def test_a_failed_selftest_refuses_the_engine(
    folder: Path, tmp_path: Path, logits: np.ndarray, said: str
) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        load(tmp_path).check_selftest(logits)
    assert COMMAND in caught.value.action
