from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from trtseg import __version__
from trtseg.architecture import NetworkSpec, PathwaySpec
from trtseg.engine import (
    Engine,
    build_command,
    build_lock,
    built_models,
    engine_folder,
    is_built,
    load_engine,
    write_engine,
)
from trtseg.errors import EngineError, EngineMissingError, OutputError

SPEC = NetworkSpec(
    pathways=(PathwaySpec(1, (2, 3), (), (0.0, 0.0)), PathwaySpec(3, (2, 3), (), (0.0, 0.0))),
    fc_maps=(6,),
    fc_residual_layers=(),
    fc_dropout=(0.0, 0.5),
    tile=9,
)
FILES = {
    "weights.npz": b"the weights",
    "normal.onnx": b"the graph",
    "sub.onnx": b"another graph",
    "fc.onnx": b"the last graph",
}
NAMES = ["fc.onnx", "manifest.json", "normal.onnx", "sub.onnx", "weights.npz"]
CHECKPOINT = {"bdn.model.ckpt.index": "1" * 64, "bdn.model.ckpt.data-00000-of-00001": "2" * 64}
AGAIN = "build again: trtseg engines build --models tiny"


def build(root: Path, models: str = "tiny", net: str = "bdn", **changes: Any) -> Engine:
    values: dict[str, Any] = {
        "spec": SPEC,
        "files": FILES,
        "checkpoint": CHECKPOINT,
        "notice": "not for use",
        "proof": {"largest_difference": 1e-6},
        "versions": {"numpy": "2.0"},
    }
    return write_engine(root, models, net, **{**values, **changes})


@pytest.fixture
def engine(tmp_path) -> Engine:
    """One built network, under tmp_path / "engines"."""
    build(tmp_path / "engines")
    return load_engine(tmp_path / "engines", "tiny", "bdn")


@pytest.fixture
def root(engine) -> Path:
    return engine.folder.parents[1]


def change(engine: Engine, **fields: Any) -> None:
    """Rewrite fields of the manifest, as a build of those values would have it."""
    path = engine.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trip


def test_write_engine_gives_what_it_wrote(tmp_path):
    built = build(tmp_path)
    loaded = load_engine(tmp_path, "tiny", "bdn")
    assert (built.folder, built.models, built.net) == (loaded.folder, "tiny", "bdn")
    assert built.spec == loaded.spec == SPEC
    assert json.loads(json.dumps(dict(built.manifest))) == loaded.manifest


def test_round_trip(root, engine):
    loaded = load_engine(root, "tiny", "bdn", checkpoint=CHECKPOINT)
    assert loaded.spec == SPEC
    assert (loaded.models, loaded.net, loaded.notice) == ("tiny", "bdn", "not for use")
    assert loaded.folder == root / "tiny" / "bdn" == engine_folder(root, "tiny", "bdn")
    assert loaded.read("normal.onnx") == b"the graph"
    assert loaded.read("weights.npz") == b"the weights"


def test_what_lies_in_the_folder(root, engine):
    assert names(root) == ["tiny"]
    assert names(root / "tiny") == ["bdn"]
    assert names(engine.folder) == NAMES


def test_what_the_manifest_says(engine):
    manifest = json.loads((engine.folder / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert (manifest["models"], manifest["network"]) == ("tiny", "bdn")
    assert manifest["tile"] == 9
    # from sha256sum
    assert manifest["files"] == {
        "weights.npz": "f38329d231164082b94f28edf29bff349b44403e09fc4057d65b31051f4ae6b5",
        "normal.onnx": "16b9f2912007922fe48f5343d131850f01f2095edbc97bf38d36efc3178bafc2",
        "sub.onnx": "d72f78e81a8a8daa3c673eda63218d3a4ffc65942999701c8d68c70441273ada",
        "fc.onnx": "de306db1422b701d23893d6541bc201c8e857c6600da61f1e7a5c42adbbed9a4",
    }
    assert manifest["checkpoint"] == CHECKPOINT
    assert manifest["proof"] == {"largest_difference": 1e-6}
    assert manifest["versions"]["trtseg"] == __version__
    assert manifest["versions"]["numpy"] == "2.0"


def test_the_manifest_names_no_place(tmp_path, engine):
    assert str(tmp_path) not in (engine.folder / "manifest.json").read_text()


def test_without_a_notice(tmp_path):
    build(tmp_path, notice="")
    assert load_engine(tmp_path, "tiny", "bdn").notice == ""


def test_the_checkpoint_need_not_be_known(root):
    assert load_engine(root, "tiny", "bdn").manifest["checkpoint"] == CHECKPOINT


def test_more_files_than_the_two(tmp_path):
    build(tmp_path, files={**FILES, "kernels.cu": b"more"})
    assert load_engine(tmp_path, "tiny", "bdn").read("kernels.cu") == b"more"
    (tmp_path / "tiny" / "bdn" / "kernels.cu").write_bytes(b"mare")
    with pytest.raises(EngineError, match=r"kernels\.cu: SHA-256"):
        load_engine(tmp_path, "tiny", "bdn")


def test_a_build_replaces_the_older_one_whole(root, engine):
    build(root, files={**FILES, "extra": b""})
    build(root, files=dict.fromkeys(FILES, b"new"), notice="newer")
    loaded = load_engine(root, "tiny", "bdn")
    assert loaded.notice == "newer"
    assert names(loaded.folder) == NAMES
    assert names(root / "tiny") == ["bdn"]


def test_a_moved_engines_folder_still_loads(root, tmp_path):
    shutil.move(root, tmp_path / "moved")
    assert load_engine(tmp_path / "moved", "tiny", "bdn").folder == (
        tmp_path / "moved" / "tiny" / "bdn"
    )


# Nothing built


@pytest.mark.parametrize(("models", "net"), [("other", "bdn"), ("tiny", "cgm")])
def test_nothing_built(root, models, net):
    with pytest.raises(EngineMissingError, match=f"nothing is built for {net.upper()}") as caught:
        load_engine(root, models, net)
    assert caught.value.action == f"build it: trtseg engines build --models {models}"
    assert caught.value.__suppress_context__


def test_no_engines_folder(tmp_path):
    with pytest.raises(EngineMissingError, match="nothing is built"):
        load_engine(tmp_path / "none", "tiny", "bdn")


def test_build_command():
    assert build_command("published") == "trtseg engines build --models published"


# Damage


@pytest.mark.parametrize("name", sorted(FILES))
def test_any_byte_of_a_file_counts(root, engine, name):
    path = engine.folder / name
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(EngineError) as caught:
            load_engine(root, "tiny", "bdn")
        assert str(caught.value).startswith(f"{path}: SHA-256 ")
        assert caught.value.action == AGAIN


@pytest.mark.parametrize("bit", [1, 0x20])
def test_any_byte_of_the_manifest_counts(root, engine, bit):
    """Whatever flips, either the manifest is refused or it says the same."""
    path = engine.folder / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= bit
        path.write_bytes(damaged)
        try:
            loaded = load_engine(root, "tiny", "bdn")
        except EngineError as error:
            refusal = str(error)
        else:
            refusal = ""
            assert loaded == engine, f"byte {position}: {bytes(damaged[position - 20 :][:40])!r}"
        assert refusal == "" or str(engine.folder) in refusal


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("content", [b"", b"the", b"the weights and more"])
def test_a_file_of_another_length(root, engine, name, content):
    (engine.folder / name).write_bytes(content)
    with pytest.raises(EngineError, match=f"{name}: SHA-256.*damaged or foreign"):
        load_engine(root, "tiny", "bdn")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file(root, engine, name):
    (engine.folder / name).unlink()
    with pytest.raises(EngineError, match=f"{name}: No such file") as caught:
        load_engine(root, "tiny", "bdn")
    assert not isinstance(caught.value, EngineMissingError)
    assert caught.value.action == AGAIN


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_folder_in_place_of_a_file(root, engine, name):
    (engine.folder / name).unlink()
    (engine.folder / name).mkdir()
    with pytest.raises(EngineError, match=f"{name}: Is a directory"):
        load_engine(root, "tiny", "bdn")


def test_a_folder_in_place_of_the_manifest(root, engine):
    (engine.folder / "manifest.json").unlink()
    (engine.folder / "manifest.json").mkdir()
    with pytest.raises(EngineError, match=r"manifest\.json: not readable"):
        load_engine(root, "tiny", "bdn")


@pytest.mark.parametrize("content", [b"", b"{", b"not JSON", b"\xff\xfe\x00", b"{'a': 1}"])
def test_a_manifest_that_is_no_json(root, engine, content):
    (engine.folder / "manifest.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"manifest\.json: not readable") as caught:
        load_engine(root, "tiny", "bdn")
    assert caught.value.action == AGAIN


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_manifest_that_is_no_object(root, engine, content):
    (engine.folder / "manifest.json").write_text(content)
    with pytest.raises(EngineError, match=r"manifest\.json: not a JSON object"):
        load_engine(root, "tiny", "bdn")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 0, "layout 0; expected layout 1"),
        ("schema", 2, "layout 2; expected layout 1"),
        ("schema", "1", "layout '1'; expected layout 1"),
        ("schema", None, "layout None; expected layout 1"),
        ("models", "other", "models 'other'; expected 'tiny'"),
        ("network", "cgm", "network 'cgm'; expected 'bdn'"),
        ("files", None, "files are not listed"),
        ("files", [], "files are not listed"),
        ("files", {}, "files are not listed"),
        ("files", {"weights.npz": "0" * 64}, "files are not listed"),
        ("checkpoint", None, "checkpoint None; expected a dict"),
        ("checkpoint", "0" * 64, "checkpoint '0+'; expected a dict"),
        ("architecture", None, "architecture not readable"),
        ("architecture", {}, "architecture not readable"),
        ("architecture", {**SPEC.to_dict(), "tile": 4}, "architecture not readable.*field, 5"),
    ],
)
def test_a_manifest_of_other_values(root, engine, field, value, message):
    change(engine, **{field: value})
    with pytest.raises(EngineError, match=message) as caught:
        load_engine(root, "tiny", "bdn")
    assert str(caught.value).startswith(f"{engine.folder / 'manifest.json'}: ")
    assert caught.value.action == AGAIN


@pytest.mark.parametrize(
    "field", ["schema", "models", "network", "files", "checkpoint", "architecture"]
)
def test_a_manifest_without_a_field(root, engine, field):
    path = engine.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[field]
    path.write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=r"manifest\.json"):
        load_engine(root, "tiny", "bdn")


@pytest.mark.parametrize("name", ["../bdn/weights.npz", "/etc/hostname", "sub/file", "./file"])
def test_a_file_name_with_a_folder_is_not_followed(root, engine, name):
    digests = dict(engine.manifest["files"])
    change(engine, files={**digests, name: digests["weights.npz"]})
    with pytest.raises(EngineError, match="file names with a folder"):
        load_engine(root, "tiny", "bdn")


@pytest.mark.parametrize("name", ["", ".", "..", "nul\0", "\ud800"])
def test_a_file_name_that_names_no_file(root, engine, name):
    change(engine, files={**engine.manifest["files"], name: "0" * 64})
    with pytest.raises(EngineError):
        load_engine(root, "tiny", "bdn")


@pytest.mark.parametrize("digest", [None, 0, "", ["0" * 64]])
def test_a_digest_that_is_none(root, engine, digest):
    change(engine, files={**engine.manifest["files"], "weights.npz": digest})
    with pytest.raises(EngineError, match=r"weights\.npz|manifest\.json"):
        load_engine(root, "tiny", "bdn")


def test_an_engine_under_another_name(root, engine):
    shutil.copytree(root / "tiny", root / "copy")
    with pytest.raises(EngineError, match="models 'tiny'; expected 'copy'"):
        load_engine(root, "copy", "bdn")
    shutil.copytree(root / "tiny" / "bdn", root / "tiny" / "cgm")
    with pytest.raises(EngineError, match="network 'bdn'; expected 'cgm'"):
        load_engine(root, "tiny", "cgm")


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {**CHECKPOINT, "bdn.model.ckpt.index": "3" * 64},
        {**CHECKPOINT, "bdn.cfg": "3" * 64},
        {"bdn.model.ckpt.index": "1" * 64},
    ],
)
def test_a_stale_build(root, engine, checkpoint):
    with pytest.raises(EngineError, match="built from another checkpoint") as caught:
        load_engine(root, "tiny", "bdn", checkpoint=checkpoint)
    assert str(engine.folder) in str(caught.value)
    assert caught.value.action == AGAIN


# Writing fails


class Interrupted(dict):
    """Files of which the second never comes."""

    def __init__(self, error: BaseException) -> None:
        super().__init__({"weights.npz": b"half a build"})
        self.error = error

    def items(self):  # type: ignore[override]
        yield from super().items()
        raise self.error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_interrupted_write_leaves_the_older_build(root, engine, kind):
    with pytest.raises(kind):
        build(root, files=Interrupted(kind()))
    assert load_engine(root, "tiny", "bdn") == engine
    assert names(root / "tiny") == ["bdn"]


def test_an_interrupted_first_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, files=Interrupted(KeyboardInterrupt()))
    assert names(tmp_path / "tiny") == []
    assert built_models(tmp_path) == []


def test_a_full_disk_leaves_the_older_build(root, engine, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        build(root, notice="newer")
    assert load_engine(root, "tiny", "bdn") == engine
    assert names(root / "tiny") == ["bdn"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(5, "Input/output error"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failed_swap_puts_the_older_build_back(root, engine, monkeypatch, error, raised):
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == engine.folder and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(raised):
        build(root, notice="newer")
    assert load_engine(root, "tiny", "bdn") == engine
    assert names(root / "tiny") == ["bdn"]


@pytest.mark.parametrize("place", ["engines", "engines/tiny"])
def test_a_file_where_a_folder_must_be(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a file")
    with pytest.raises(OutputError, match=str(path)):
        build(tmp_path / "engines")
    assert path.read_bytes() == b"a file"


# What is built


def test_built_models_needs_both_networks(tmp_path):
    build(tmp_path, "whole", "cgm")
    assert not is_built(tmp_path, "whole")
    build(tmp_path, "whole", "bdn")
    assert is_built(tmp_path, "whole")
    build(tmp_path, "half", "bdn")
    for net in ("bdn", "cgm"):
        build(tmp_path, "another", net)
    (tmp_path / "README.md").touch()
    (tmp_path / "empty").mkdir()
    with build_lock(tmp_path, "whole", print):
        assert built_models(tmp_path) == ["another", "whole"]


def test_built_models_without_a_folder(tmp_path):
    assert built_models(tmp_path / "none") == []
    (tmp_path / "file").touch()
    assert built_models(tmp_path / "file") == []
    assert not is_built(tmp_path / "file", "tiny")


def test_built_models_where_nothing_can_be_seen(tmp_path, monkeypatch):
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(EngineError) as caught:
        built_models(tmp_path)
    assert caught.value.found == f"{tmp_path}: Permission denied"
    assert caught.value.expected == "a folder of built networks that can be read"
    assert caught.value.action == "choose another with --engines, or set TRTSEG_HOME"


def test_built_models_beside_a_folder_that_cannot_be_entered(tmp_path, monkeypatch):
    looks = Path.is_file

    def refuse(self: Path) -> bool:
        if "lost+found" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return looks(self)

    monkeypatch.setattr(Path, "is_file", refuse)
    for net in ("bdn", "cgm"):
        for models in ("lost+found", "whole"):
            (tmp_path / models / net).mkdir(parents=True)
            (tmp_path / models / net / "manifest.json").touch()
    assert built_models(tmp_path) == ["whole"]


def test_is_built_where_nothing_can_be_seen(tmp_path, monkeypatch):
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(EngineError, match=r"bdn/manifest\.json: Permission denied"):
        is_built(tmp_path, "tiny")


# The lock


def test_builders_of_one_model_set_take_turns_and_say_so(tmp_path):
    root, said = tmp_path / "engines", []
    inside, waited = threading.Event(), threading.Event()

    def second() -> None:
        def report(line: str) -> None:
            said.append(line)
            waited.set()

        inside.wait()
        with build_lock(root, "tiny", report):
            said.append("in")

    thread = threading.Thread(target=second)
    thread.start()
    with build_lock(root, "tiny", said.append), build_lock(root, "other", said.append):
        inside.set()
        waited.wait()
        said.append("out")
    thread.join()
    assert said == ["waiting for another trtseg that builds tiny", "out", "in"]


def test_no_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"), build_lock(tmp_path / "file", "tiny", print):
        pytest.fail("entered without a lock")
