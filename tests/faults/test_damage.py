"""Checkpoints and engine folders with bytes flipped or cut off: refused, or as good as intact."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.faults.counts import count
from trtseg.architecture import PUBLISHED
from trtseg.build.checkpoint import read_variables
from trtseg.build.variables import network_variables
from trtseg.engine import Engine, load_engine
from trtseg.errors import EngineError, EngineMissingError, ModelError
from trtseg.home import demo_folder

INDEX, DATA = ".index", ".data-00000-of-00001"
REQUIRED = network_variables(PUBLISHED).required(PUBLISHED)

Variables = dict[str, NDArray[np.float32]]


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over; the same again puts it back."""
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def bits(path: Path, many: int) -> list[int]:
    """Bits of a file to turn over, the same at every run."""
    size = path.stat().st_size
    return np.random.default_rng(size).integers(0, 8 * size, many).tolist()


def lengths(path: Path, many: int) -> list[int]:
    """Lengths to cut a file to, the same at every run: none, all but one byte, and others."""
    size = path.stat().st_size
    some = np.random.default_rng(size + 1).integers(1, size - 1, many - 2).tolist()
    return [0, *some, size - 1]


# Checkpoints


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint of the cortex network, to damage."""
    for suffix in (INDEX, DATA):
        shutil.copy(demo_folder() / f"cgm.model.ckpt{suffix}", tmp_path)
    return tmp_path / "cgm.model.ckpt"


def outcome(prefix: Path, intact: Variables) -> str:
    try:
        variables = read_variables(prefix, REQUIRED)
    except ModelError as error:
        message = str(error)
    else:
        assert variables.keys() == intact.keys()
        assert all(variables[name].tobytes() == intact[name].tobytes() for name in intact)
        return "harmless"
    assert prefix.name in message
    assert "\n" not in message
    return "refused"


def places(prefix: Path, variables: Variables) -> NDArray[np.bool_]:
    """Which bytes of the data file belong to the required tensors."""
    content = Path(f"{prefix}{DATA}").read_bytes()
    used = np.zeros(len(content), bool)
    for values in variables.values():
        stored = values.tobytes()
        start = content.index(stored)
        while used[start]:  # the same values twice
            start = content.index(stored, start + 1)
        used[start : start + len(stored)] = True
    return used


def test_flips_in_the_data_of_a_checkpoint(prefix: Path) -> None:
    intact = read_variables(prefix, REQUIRED)
    used = places(prefix, intact)
    file = Path(f"{prefix}{DATA}")
    outcomes = Counter[str]()
    for bit in bits(file, count(75, 500)):
        flip(file, bit)
        found = outcome(prefix, intact)
        flip(file, bit)
        assert found == ("refused" if used[bit // 8] else "harmless"), f"bit {bit}"
        outcomes[found] += 1
    assert outcome(prefix, intact) == "harmless"
    print(f"flips in data: {dict(outcomes)}; {used.mean():.1%} of the bytes are used")
    assert outcomes["refused"] > 0


def test_flips_in_the_index_of_a_checkpoint(prefix: Path) -> None:
    # What few bits of the index mean nothing; a flip there must change no weight.
    intact = read_variables(prefix, REQUIRED)
    file = Path(f"{prefix}{INDEX}")
    outcomes = Counter[str]()
    for bit in bits(file, count(75, 500)):
        flip(file, bit)
        outcomes[outcome(prefix, intact)] += 1
        flip(file, bit)
    print(f"flips in the index: {dict(outcomes)}")
    assert outcomes["refused"] > 0.9 * sum(outcomes.values())


def test_cuts_of_the_index_of_a_checkpoint(prefix: Path) -> None:
    intact = read_variables(prefix, REQUIRED)
    file = Path(f"{prefix}{INDEX}")
    content = file.read_bytes()
    for kept in lengths(file, count(20, 100)):
        file.write_bytes(content[:kept])
        assert outcome(prefix, intact) == "refused", f"{kept} bytes"


def test_cuts_of_the_data_of_a_checkpoint(prefix: Path) -> None:
    # From the longest to the shortest, so that each cut is a cut of the file before it.
    intact = read_variables(prefix, REQUIRED)
    used = places(prefix, intact)
    file = Path(f"{prefix}{DATA}")
    outcomes = Counter[str]()
    for kept in sorted(lengths(file, count(20, 100)), reverse=True):
        with file.open("r+b") as stream:
            stream.truncate(kept)
        found = outcome(prefix, intact)
        assert found == ("refused" if used[kept:].any() else "harmless"), f"{kept} bytes"
        outcomes[found] += 1
    print(f"cuts of data: {dict(outcomes)}")
    assert outcomes["refused"] > 0


# Engine folders


@pytest.fixture
def engine(engines_root: Path, tmp_path: Path) -> Engine:
    """A copy of the built demo network of the cortex, to damage."""
    shutil.copytree(engines_root / "demo" / "cgm", tmp_path / "demo" / "cgm")
    return load_engine(tmp_path, "demo", "cgm")


def says_of_engine(engine: Engine) -> str:
    try:
        found = load_engine(engine.folder.parents[1], "demo", "cgm")
    except EngineError as error:
        message = str(error)
    else:
        assert found == engine
        return "harmless"
    assert str(engine.folder) in message
    assert "\n" not in message
    assert "trtseg engines build --models demo" in message
    return "refused"


def test_flips_in_an_engine_folder(engine: Engine) -> None:
    files = sorted(engine.folder.iterdir())
    each = count(150, 1000) // len(files)
    outcomes = Counter[tuple[str, str]]()
    for file in files:
        for bit in bits(file, each):
            flip(file, bit)
            outcomes[file.name, says_of_engine(engine)] += 1
            flip(file, bit)
    print(f"flips in an engine folder: {dict(outcomes)}")
    assert {name for name, found in outcomes if found == "refused"} == {
        "fc.onnx",
        "manifest.json",
        "normal.onnx",
        "sub.onnx",
        "weights.npz",
    }
    # Only in the manifest may a flip say the same: white space, or letters of an escape.
    assert {name for name, found in outcomes if found == "harmless"} <= {"manifest.json"}
    assert outcomes["manifest.json", "harmless"] < 0.3 * each


def test_cuts_in_an_engine_folder(engine: Engine) -> None:
    files = sorted(engine.folder.iterdir())
    for file in files:
        content = file.read_bytes()
        for kept in lengths(file, count(40, 200) // len(files)):
            file.write_bytes(content[:kept])
            found = says_of_engine(engine)
            # The manifest may lose its last line's end.
            whole = file.name == "manifest.json" and kept == len(content) - 1
            assert found == ("harmless" if whole else "refused"), f"{file.name}, {kept} bytes"
        file.write_bytes(content)
    assert says_of_engine(engine) == "harmless"


def test_files_missing_from_an_engine_folder(engine: Engine) -> None:
    for file in sorted(engine.folder.iterdir()):
        content = file.read_bytes()
        file.unlink()
        wanted = EngineMissingError if file.name == "manifest.json" else EngineError
        with pytest.raises(wanted):
            load_engine(engine.folder.parents[1], "demo", "cgm")
        file.write_bytes(content)
