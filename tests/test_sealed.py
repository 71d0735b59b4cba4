"""What both kinds of networks on disk share, shown with built ones that hold a ``cuda`` folder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.build.networks import ONE_LAYER
from tests.faults.strike import ended, fork, left_over
from trtseg import sealed
from trtseg.engine import load_engine, write_engine
from trtseg.errors import EngineError, EngineMissingError, OutputError

COMPILED = {"b1.engine": b"an engine", "manifest.json": b"what it is"}
AGAIN = "build again: trtseg engines build --models tiny"


def write(root: Path, notice: str) -> None:
    write_engine(
        root, "tiny", "bdn", spec=ONE_LAYER, checkpoint={}, notice=notice, proof={}, versions={},
        files=dict.fromkeys(("weights.npz", "normal.onnx", "fc.onnx"), notice.encode()),
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An engines folder with the older build and what was compiled from it."""
    lay(tmp_path / "engines")
    return tmp_path / "engines"


def lay(root: Path) -> None:
    write(root, "older")
    (root / "tiny" / "bdn" / "cuda").mkdir()
    for name, content in COMPILED.items():
        (root / "tiny" / "bdn" / "cuda" / name).write_bytes(content)


def compiled(root: Path) -> dict[str, bytes]:
    folder = root / "tiny" / "bdn" / "cuda"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is kept


def test_a_newer_build_takes_over_what_was_compiled(root: Path) -> None:
    (root / "tiny" / "bdn" / "extra").mkdir()
    write(root, "newer")
    assert load_engine(root, "tiny", "bdn").notice == "newer"
    assert compiled(root) == COMPILED
    assert left_over(root) == []
    assert sorted(path.name for path in (root / "tiny" / "bdn").iterdir()) == [
        *("cuda", "fc.onnx", "manifest.json", "normal.onnx", "weights.npz"),
    ]


def test_a_build_with_nothing_compiled_has_no_such_folder(tmp_path: Path) -> None:
    write(tmp_path, "older")
    write(tmp_path, "newer")
    assert not (tmp_path / "tiny" / "bdn" / "cuda").exists()


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(13, "Permission denied"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
@pytest.mark.parametrize("after", [False, True])
def test_what_was_compiled_cannot_be_moved(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: Any, after: bool
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "cuda" and self.parent.name.endswith(".old"):
            if after:
                rename(self, target)
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(raised):
        write(root, "newer")
    assert load_engine(root, "tiny", "bdn").notice == "older"
    assert compiled(root) == COMPILED
    assert left_over(root) == []


# Struck at every instruction of the swap


def swapping(write: Callable[[], None], act: Callable[[int], None]) -> None:
    """Write; call `act` with the number of each instruction of the swap that runs."""
    counter = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counter
        if frame.f_code is not sealed._swap.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            counter += 1
            act(counter)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write()
    finally:
        sys.settrace(before)


def instructions(folder: Path) -> range:
    lay(folder)
    numbers: list[int] = []
    swapping(lambda: write(folder, "newer"), numbers.append)
    assert len(numbers) > 50
    return range(1, len(numbers) + 1)


def test_interrupt_at_any_instruction_of_the_swap(tmp_path: Path) -> None:
    found = Counter[str]()
    for point in instructions(tmp_path / "all"):

        def interrupt(number: int, point: int = point) -> None:
            if number == point:
                raise KeyboardInterrupt

        root = tmp_path / str(point)
        lay(root)
        with pytest.raises(KeyboardInterrupt):
            swapping(lambda root=root: write(root, "newer"), interrupt)
        assert compiled(root) == COMPILED, f"instruction {point}"
        assert left_over(root) == [], f"instruction {point}"
        found[load_engine(root, "tiny", "bdn").notice] += 1
    assert found.keys() == {"older", "newer"}


def test_kill_at_any_instruction_of_the_swap(tmp_path: Path) -> None:
    found = Counter[str]()
    for point in instructions(tmp_path / "all"):

        def kill(number: int, point: int = point) -> None:
            if number == point:
                os.kill(os.getpid(), signal.SIGKILL)

        root = tmp_path / str(point)
        lay(root)
        code = ended(
            fork(lambda root=root, kill=kill: swapping(lambda: write(root, "newer"), kill))
        )
        assert code == -signal.SIGKILL
        try:
            notice = load_engine(root, "tiny", "bdn").notice
        except EngineMissingError:
            assert not (root / "tiny" / "bdn").exists()
            notice = "nothing"
        else:
            assert compiled(root) == COMPILED, f"instruction {point}"
        found[notice] += 1
    assert found.keys() == {"older", "newer", "nothing"}


# What is read


def reseal(folder: Path, **fields: Any) -> None:
    """Change a manifest and its seal."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **fields}
    del manifest["sha256"]
    text = json.dumps(manifest, sort_keys=True)
    path.write_text(json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def test_a_sealed_name_that_no_file_can_have(root: Path) -> None:
    folder = root / "tiny" / "bdn"
    digests = load_engine(root, "tiny", "bdn").manifest["files"]
    reseal(folder, files={**digests, "nul\0": "0" * 64})
    with pytest.raises(EngineError, match="embedded null byte") as caught:
        load_engine(root, "tiny", "bdn")
    assert caught.value.action == AGAIN


def test_what_is_lacking_is_named(root: Path) -> None:
    digests = dict(load_engine(root, "tiny", "bdn").manifest["files"])
    del digests["fc.onnx"]
    reseal(root / "tiny" / "bdn", files=digests)
    with pytest.raises(EngineError, match=r"not listed: fc\.onnx; expected fc\.onnx, normal\.onnx"):
        load_engine(root, "tiny", "bdn")


def test_only_the_seal_shows_a_changed_fact(root: Path) -> None:
    path = root / "tiny" / "bdn" / "manifest.json"
    path.write_text(path.read_text().replace('"older"', '"newer"'))
    with pytest.raises(EngineError, match="changed after it was written") as caught:
        load_engine(root, "tiny", "bdn")
    assert caught.value.action == AGAIN


def test_a_file_is_checked_as_it_is_read(root: Path) -> None:
    engine = load_engine(root, "tiny", "bdn")
    assert engine.read("fc.onnx") == b"older"
    (engine.folder / "fc.onnx").write_bytes(b"oldes")
    with pytest.raises(EngineError, match=r"fc\.onnx: SHA-256 .* damaged or foreign"):
        engine.read("fc.onnx")
    with pytest.raises(EngineError, match=r"b1\.engine: not listed in the manifest"):
        engine.read("b1.engine")
