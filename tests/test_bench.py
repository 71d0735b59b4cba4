"""`trtseg bench`: that its figures are what they say; how large they are is not tested."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from trtseg import bench
from trtseg.backends.base import Ceilings
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.cli import app
from trtseg.cuda.device import OutOfDeviceMemory
from trtseg.errors import EngineError, InputError, OutputError, UsageError
from trtseg.pipeline import Segmenter

STAGES = ["read", "z-score", "brain", "cortex", "gate", "write", "other"]


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVINOBackend, "ceilings", lambda _: Ceilings(2e12, 3e10))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "doe_john.nii"
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=(9, 10, 11)).astype(np.float32), None), path)
    return path


@pytest.fixture
def load(engines_root: Path) -> functools.partial[Segmenter]:
    return functools.partial(Segmenter, "random11", engines=engines_root, device="cpu")


def test_a_report(load, scan):
    told = []
    report = bench.measure(load, scan, runs=3, progress=lambda *given: told.append(given))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert report["scan"]["shape"] == [9, 10, 11]
    assert report["scan"]["voxels"] == 990
    assert (report["models"], report["device"], report["precision"]) == ("random11", "cpu", "f32")
    assert list(report["stages"]) == STAGES
    assert report["runs"] == 3
    for row in (*report["stages"].values(), report["network"], report["total"]):
        assert 0 <= row["p50_s"] <= row["p95_s"] == row["max_s"]
    assert report["network"]["p50_s"] < report["total"]["p50_s"]
    assert report["voxels_per_second"] == pytest.approx(990 / report["total"]["p50_s"])
    rate = 2 * report["work"]["multiply_adds"] / report["network"]["p50_s"]
    assert report["achieved"]["operations_per_second"] == pytest.approx(rate)
    assert report["of_ceilings"]["operations_per_second"] == pytest.approx(rate / 2e12)
    assert report["of_ceilings"]["bytes_per_second"] == pytest.approx(
        report["work"]["bytes"] / report["network"]["p50_s"] / 3e10
    )
    assert report["memory"]["host_peak_bytes"] > 1 << 20
    assert report["memory"]["device_bytes"] is None
    text = json.dumps(report)
    assert "doe" not in text
    assert str(scan.parent) not in text


def test_lines(load, scan):
    report = bench.measure(load, scan, runs=1)
    report["memory"] = {"host_peak_bytes": 3 << 29, "device_bytes": 1 << 30}
    report["stages"]["read"] = {"p50_s": 1.5, "p95_s": 2.5, "max_s": 3.5}
    shown = list(bench.lines(report))
    assert shown[0] == "9 x 10 x 11 voxels, models random11, f32"
    assert "read          1.5000    2.5000    3.5000" in shown
    assert any(line.startswith("network: ") and "TFLOP/s" in line for line in shown)
    assert shown[-1] == "peak memory: 1.50 GiB, 1.00 GiB on the device"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OutOfDeviceMemory(3 << 30, 1 << 30, "the measurement of the GPU's ceilings"),
            "the GPU has 1024 MiB of free memory; expected 3072 MiB for the measurement of the "
            "GPU's ceilings; close other programs on the GPU (nvidia-smi lists them), or run with "
            "--device cpu",
        ),
        (MemoryError(), "there is not enough memory"),
    ],
)
def test_without_room_for_ceilings_the_timings_are_kept(load, scan, monkeypatch, error, reason):
    def fail(_: OpenVINOBackend) -> Ceilings:
        raise error

    known = bench.measure(load, scan, runs=1)
    assert known["not_measured"] is None
    monkeypatch.setattr(OpenVINOBackend, "ceilings", fail)
    report = json.loads(json.dumps(bench.measure(load, scan, runs=1)))
    assert list(report) == list(known)
    assert (report["ceilings"], report["of_ceilings"]) == (None, None)
    assert report["not_measured"] == reason
    assert report["labels_sha256"] == known["labels_sha256"]
    assert report["achieved"]["operations_per_second"] > 0
    shown = list(bench.lines(report))
    assert f"what the device reaches at its best: not measured: {reason}" in shown
    assert sum(line.startswith("network: ") for line in shown) == 2
    assert not any("reaches" in line for line in shown if line.startswith("network: "))
    assert shown[-1].startswith("peak memory: ")


def test_summary():
    # Nearest rank: of 20, the 19th.
    assert bench.summary(list(range(20, 0, -1))) == {"p50_s": 10.5, "p95_s": 19, "max_s": 20}
    assert bench.summary([7.0]) == {"p50_s": 7.0, "p95_s": 7.0, "max_s": 7.0}


def test_runs_that_differ_are_told(load, scan, monkeypatch):
    segment, calls = Segmenter.segment, []

    def flaky(self, *given, **named):
        result = segment(self, *given, **named)
        calls.append(1)
        if len(calls) == 3:
            result.brain[0, 0, 0] ^= 1
        return result

    monkeypatch.setattr(Segmenter, "segment", flaky)
    with pytest.raises(EngineError, match="run 2 gave other labels than the first one"):
        bench.measure(load, scan, runs=5)


def test_no_runs(load, scan):
    with pytest.raises(UsageError, match="0 runs; expected at least 1"):
        bench.measure(load, scan, runs=0)


def test_no_such_scan(load, tmp_path):
    with pytest.raises(InputError):
        bench.measure(load, tmp_path / "none.nii")


def test_no_temporary_folder(load, scan, monkeypatch):
    def refuse(prefix: str) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(bench.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(OutputError, match="TMPDIR=FOLDER"):
        bench.measure(load, scan)


def test_command(engines_root, scan, tmp_path):
    target = tmp_path / "figures.json"
    options = {"--models": "random11", "--engines": engines_root, "--device": "cpu"}
    options |= {"--runs": 1, "--json": target}
    arguments = [str(word) for option in options.items() for word in option]
    done = CliRunner().invoke(app, ["bench", str(scan), *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "9 x 10 x 11 voxels, models random11, f32"
    report = json.loads(target.read_text("utf-8"))
    assert sorted(report["stages"]) == sorted(STAGES)
    assert sorted(path.name for path in scan.parent.iterdir()) == ["doe_john.nii", "figures.json"]
