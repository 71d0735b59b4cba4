"""Writing that is killed, interrupted, or finds no room: old, new or nothing, never half."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.faults.counts import ROOT, SLOW, count, run_child
from tests.faults.strike import Checked, left_over
from trtseg.errors import OutputError
from trtseg.files import atomic_write

PACKAGE = ROOT / "trtseg"


def struck(scenario: str, fault: str, points: int, folder: Path) -> Counter[str]:
    """Outcomes of all strikes; the child ends with a traceback on a half-written file."""
    outcomes = Counter(run_child("strike", scenario, fault, points, folder)["outcomes"])
    assert sum(outcomes.values()) == points
    return outcomes


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_kill_at_any_instruction(tmp_path: Path, scenario: str) -> None:
    points = count(40, 200)
    outcomes = struck(scenario, "kill", points, tmp_path)
    assert outcomes["killed: nothing"] > 0
    assert outcomes["killed: older"] > 0
    assert outcomes["done: newer"] <= 0.1 * points


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_kill_at_any_time(tmp_path: Path, scenario: str) -> None:
    outcomes = struck(scenario, "kill-timed", count(20, 200), tmp_path)
    assert any(outcome.startswith("killed") for outcome in outcomes)


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_interrupt_at_any_instruction_leaves_no_temporary_file(
    tmp_path: Path, scenario: str
) -> None:
    points = count(60, 1000)
    outcomes = struck(scenario, "interrupt", points, tmp_path)
    assert outcomes["interrupted: nothing"] > 0
    assert outcomes["interrupted: older"] > 0
    assert outcomes["done: newer"] <= 0.1 * points


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_interrupt_at_any_time_leaves_no_temporary_file(tmp_path: Path, scenario: str) -> None:
    struck(scenario, "interrupt-timed", count(20, 200), tmp_path)


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_room_for_so_many_bytes(tmp_path: Path, scenario: str) -> None:
    points = count(30, 200)
    outcomes = struck(scenario, "full", points, tmp_path)
    assert outcomes["refused: nothing"] > 0
    assert outcomes["refused: older"] > 0
    assert outcomes["done: newer"] >= 1


# Disks and folders that take nothing


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    (tmp_path / "checked").mkdir()
    return Checked("result", tmp_path / "checked")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 512 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mount(folder, "-t", "tmpfs", "-o", "size=512k", "none"):
        pytest.skip("only root can mount a disk, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, *options: str) -> bool:
    program = shutil.which("mount")
    if program is None:
        return False
    return subprocess.run([program, *options, str(folder)], capture_output=True).returncode == 0


def fill(folder: Path, room: int) -> None:
    """Leave so much room on a disk."""
    (folder / ".filler").unlink(missing_ok=True)
    (folder / ".filler").write_bytes(bytes(shutil.disk_usage(folder).free - room))
    assert shutil.disk_usage(folder).free == room


@pytest.mark.parametrize("older", [False, True])
def test_full_disk(checked: Checked, small_disk: Path, older: bool) -> None:
    states = Counter[str]()
    largest = max(map(len, checked.newer.values()))
    for room in range(0, 4 * largest, 4096):
        for path in checked.newer:
            (small_disk / path).unlink(missing_ok=True)
        if older:
            (small_disk / ".filler").unlink(missing_ok=True)
            checked.write(small_disk, 1)
        fill(small_disk, room)
        try:
            checked.write(small_disk, 2)
        except OutputError as error:
            message, state = str(error), checked.judge(small_disk, older)
            assert "No space left on device" in message
        else:
            state = checked.judge(small_disk, older)
            assert state == "newer"
        states[state] += 1
        assert left_over(small_disk) == [".filler"]
    print(f"full disk: {dict(states)}")
    assert states["older" if older else "nothing"] > 0
    assert states["newer and older" if older else "newer and nothing"] > 0
    assert states["newer"] > 0


def test_disk_that_cannot_be_written(checked: Checked, small_disk: Path) -> None:
    checked.write(small_disk, 1)
    assert mount(small_disk, "-o", "remount,ro")
    with pytest.raises(OutputError, match="Read-only file system"):
        checked.write(small_disk, 2)
    assert checked.judge(small_disk, True) == "older"
    assert left_over(small_disk) == []


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_folder_of_another_user(scenario: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which no other user may enter
        Path(folder).chmod(0o755)
        outcomes = struck(scenario, "forbidden", 2, Path(folder))
    assert outcomes == {"refused: nothing": 1, "refused: older": 1}


@pytest.mark.parametrize("scenario", ["result", "build"])
def test_file_in_place_of_the_folder(tmp_path: Path, scenario: str) -> None:
    (tmp_path / "checked").mkdir()
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(OutputError, match="out"):
        Checked(scenario, tmp_path / "checked").write(tmp_path / "out", 2)
    assert (tmp_path / "out").read_bytes() == b"a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checked", "out"]


# Several writers at once

WRITER = """
import os, sys
from pathlib import Path
from trtseg.files import atomic_write
folder, name = Path(sys.argv[1]), sys.argv[2]
for turn in range(int(sys.argv[3])):
    killed = folder / f".file.{int(name):08x}{turn:08x}.part"
    killed.write_bytes(b"half")
    os.utime(killed, (0, 0))
    with atomic_write(folder / "file") as stream:
        stream.write(name.encode() * 50_000)
"""


def test_writers_at_once_sweep_what_was_left_and_nothing_else(tmp_path: Path) -> None:
    turns = str(count(50, 1000))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name, turns],
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for name in "123"
    ]  # fmt: skip
    for writer in writers:
        _, stderr = writer.communicate(timeout=120)
        assert writer.returncode == 0, stderr
    assert (tmp_path / "file").read_bytes() in {name * 50_000 for name in (b"1", b"2", b"3")}
    with atomic_write(tmp_path / "file"):  # for what two of them wanted to sweep at once
        pass
    assert left_over(tmp_path) == []


# All writing goes that way

#: Module to how often it writes otherwise, and why that is no half-written result.
OTHERWISE = {
    "files.py": 1,  # the temporary file of atomic_write
    "logs.py": 1,  # the log, to which lines are added
    "modelinstall.py": 2,  # downloads and copies into a staging folder, verified and renamed whole
    "cuda/compile.py": 1,  # the compiler's source, in a temporary folder
}


def writes(call: ast.Call) -> bool:
    """Whether a call opens a file for writing, or writes one."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("write_text", "write_bytes", "tofile", "savez", "savez_compressed"):
        return not _in_memory(call)
    values = [*call.args[:2], *(key.value for key in call.keywords if key.arg == "mode")]
    modes = [value.value for value in values if isinstance(value, ast.Constant)]
    return name in ("open", "fdopen") and any(
        isinstance(mode, str) and len(mode) <= 3 and set(mode) & set("wax+") for mode in modes
    )


def _in_memory(call: ast.Call) -> bool:
    """Whether the target is a name such as `buffer`, which holds bytes and is no path."""
    target = call.args[0] if call.args else None
    return isinstance(target, ast.Name) and target.id in ("buffer", "stream")


def test_every_file_is_written_atomically() -> None:
    found = Counter(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and writes(node)
    )
    assert dict(found) == OTHERWISE


# The command line, interrupted while it writes

PROGRAM = """
import sys, time

from isal import igzip

import trtseg.cli

class Slow(igzip.IGzipFile):
    def write(self, data):
        done = super().write(data)
        print("writing", flush=True)
        for _ in range(600):  # in steps: a signal just before a long sleep would wait for its end
            time.sleep(0.1)
        return done

igzip.IGzipFile = Slow
trtseg.cli.main(sys.argv[1:])
"""


def test_interrupt_of_the_command_line_while_it_writes(engines_root: Path, tmp_path: Path) -> None:
    scan = tmp_path / "a.nii"
    voxels = np.random.default_rng(0).integers(0, 900, (12, 14, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-0.8, 0.8, 0.8, 1])), scan)
    out = tmp_path / "out"
    arguments = [scan, "--models", "demo", "--engines", engines_root, "-o", out, "-q"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "segment", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(left_over(out)) == 1
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        seconds = time.monotonic() - started
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []
    print(f"ended {seconds:.2f} s after the interrupt")
    if SLOW:  # a busy machine may need longer than a person should wait
        assert seconds < 2
