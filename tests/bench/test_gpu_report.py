from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_report import PartError, Report, apart

from trtseg.errors import DeviceError, OutputError


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def fail() -> None:
    raise DeviceError("no\nGPU", action="buy one")


def test_each_part_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    report = Report(path)
    report.add(gpu="one")
    assert read(path) == {"gpu": "one"}
    report.attempt("first", lambda: [1])
    seen = {}
    report.attempt("second", lambda: seen.update(read(path)))
    assert seen["first"] == [1]
    assert read(path)["second"] is None
    assert set(read(path)["part_seconds"]) == {"first", "second"}


def test_a_part_that_fails_costs_only_what_needs_it(tmp_path: Path, capsys) -> None:
    report = Report(tmp_path / "found.json")
    report.attempt("compiled", fail)
    report.attempt("latency", lambda: 1, needs=["frozen", "compiled"])
    report.attempt("ratios", lambda: 1, needs=["latency"])
    report.attempt("files", lambda: 2)
    found = read(report.path)
    assert found["failed"] == {
        "compiled": "DeviceError: no GPU; buy one",
        "latency": "not tried: compiled failed",
        "ratios": "not tried: latency failed",
    }
    assert found["files"] == 2
    assert "latency" not in found
    assert capsys.readouterr().err.splitlines() == [
        "compiled failed: DeviceError: no GPU; buy one",
        "latency failed: not tried: compiled failed",
        "ratios failed: not tried: latency failed",
    ]


def test_parts_are_added_to_an_earlier_report(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    earlier = Report(path, add=True)
    earlier.attempt("compiled", fail)
    earlier.attempt("files", lambda: 1)
    later = Report(path, add=True)
    later.attempt("compiled", lambda: 2)
    assert (read(path)["compiled"], read(path)["files"], read(path)["failed"]) == (2, 1, {})
    later.attempt("files", fail)
    assert "files" not in read(path)
    assert list(read(path)["failed"]) == ["files"]
    assert Report(path).found == {}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Report(tmp_path / "file" / "found.json")


def test_another_process_answers() -> None:
    assert apart(os.getpid, limit=60) != os.getpid()
    assert apart(divmod, 7, 2, limit=60) == (3, 1)


def test_what_another_process_raises_is_told_in_one_line(capfd) -> None:
    with pytest.raises(PartError, match=r"^ZeroDivisionError: .*by zero$"):
        apart(divmod, 1, 0, limit=60)
    assert "Traceback" in capfd.readouterr().err  # for who mends it


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(PartError, match="its process was ended by SIGABRT"):
        apart(os.abort, limit=60)
    with pytest.raises(PartError, match="its process ended with exit code 3"):
        apart(os._exit, 3, limit=60)


def test_a_process_that_takes_too_long_is_killed() -> None:
    begun = time.monotonic()
    with pytest.raises(PartError, match=r"not done after 0\.5 s"):
        apart(signal.pause, limit=0.5)
    assert time.monotonic() - begun < 50
