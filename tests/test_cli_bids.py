"""``trtseg bids``: its options, what it writes, and whether that is valid BIDS."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.fake_segmenter import FakeSegmenter
from tests.test_bids import PLAIN, SESSION, files, write_dataset
from trtseg.batch import find_scans
from trtseg.bids import read_description
from trtseg.cli_bids import LabelsCommand, bids
from trtseg.errors import OutputError, UsageError

#: Of the schema-based validator: the command, where it is not on PATH.
VALIDATOR_VARIABLE = "TRTSEG_BIDS_VALIDATOR"


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtseg.pipeline.Segmenter", FakeSegmenter)


def invoke(*args: Any) -> Any:
    app = typer.Typer()
    app.command("bids", cls=LabelsCommand)(bids)
    return CliRunner().invoke(app, [str(arg) for arg in args])


# What is written


MAPS = ("label-brain_mask", "label-CGM_mask", "dseg")


def test_the_derivatives(tmp_path):
    source = write_dataset(tmp_path / "raw", PLAIN, SESSION)
    out = source / "derivatives" / "trtseg"
    done = invoke(source, out, "participant")
    assert done.exit_code == 0, done.output
    assert "2 of 2 scans segmented" in done.output
    first = "sub-01/anat/sub-01"
    second = "sub-02/ses-a/anat/sub-02_ses-a_acq-x_rec-svr_run-1"
    of_scans = {
        f"{stem}_{rest}"
        for stem in (first, second)
        for rest in ("trtseg.json", *(f"{m}{end}" for m in MAPS for end in (".nii.gz", ".json")))
    }
    top = {"dataset_description.json", "dseg.tsv", "README.md", ".bidsignore"}
    assert files(out) == of_scans | top
    voxels = [np.asanyarray(nibabel.load(out / f"{second}_{m}.nii.gz").dataobj) for m in MAPS]
    assert [int((one == 1).sum()) for one in voxels] == [108, 36, 72]
    assert int((voxels[2] == 2).sum()) == 36
    uri = f"bids:raw:{SESSION}"
    common = {"Manual": False, "Sources": [uri], "SpatialReference": uri}
    sidecars = [json.loads((out / f"{second}_{m}.json").read_text("utf-8")) for m in MAPS]
    assert sidecars == [
        {"Type": "Brain", "Description": "Brain (fake weights)", **common},
        {
            "Type": "ROI",
            "Description": "Cortical grey matter within the brain (fake weights)",
            **common,
        },
        {
            "Description": "Brain without its cortical grey matter (1), and that (2)"
            " (fake weights)",
            **common,
        },
    ]
    table = (out / "dseg.tsv").read_text("utf-8").splitlines()
    assert [row.split("\t")[:3:2] for row in table] == [
        ["index", "abbreviation"],
        ["1", "BRAINOTHER"],
        ["2", "CGM"],
    ]
    record = json.loads((out / f"{second}_trtseg.json").read_text("utf-8"))
    assert record["options"]["save_dseg"] is True
    assert set(record["outputs"]) == {"brain", "cortex", "dseg"}
    description = read_description(out)
    assert description["DatasetType"] == "derivative"
    assert description["DatasetLinks"] == {"raw": "../.."}
    assert description["GeneratedBy"][0]["Name"] == "trtseg"
    assert "not a medical device" in (out / "README.md").read_text("utf-8")


def test_nothing_written_holds_a_path(tmp_path):
    source = write_dataset(tmp_path / "canary-raw", PLAIN)
    out = tmp_path / "canary-out"
    assert invoke(source, out, "participant", "--report").exit_code == 0
    assert {"sub-01/anat/sub-01_report.html", "sub-01/anat/sub-01_report.png"} <= files(out)
    for name in files(out):
        content = (out / name).read_bytes()
        assert b"canary" not in content, name
        assert os.fsencode(tmp_path) not in content, name


def test_one_bad_scan_does_not_stop_the_rest(tmp_path):
    last = "sub-03/anat/sub-03_T2w.nii.gz"
    source = write_dataset(tmp_path / "raw", PLAIN, SESSION, last)
    whole = (source / PLAIN).read_bytes()
    (source / PLAIN).write_bytes(whole[:-20])
    done = invoke(source, tmp_path / "out", "participant")
    assert done.exit_code == 2
    assert "2 of 3 scans segmented" in done.output
    assert "sub-03/anat/sub-03_dseg.json" in files(tmp_path / "out")
    assert not (tmp_path / "out" / "sub-01").exists()


def test_a_sidecar_that_cannot_be_written_fails_its_scan(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OutputError("disk full")

    source = write_dataset(tmp_path / "raw", PLAIN, SESSION)
    monkeypatch.setattr("trtseg.bids.write_sidecars", full)
    done = invoke(source, tmp_path / "out", "participant")
    assert done.exit_code == 5
    assert "0 of 2 scans segmented" in done.output


def test_resume_mends_a_missing_sidecar_without_another_run(tmp_path, monkeypatch):
    source, out = write_dataset(tmp_path / "raw", PLAIN), tmp_path / "out"
    assert invoke(source, out, "participant").exit_code == 0
    before = files(out)
    (out / "sub-01/anat/sub-01_dseg.json").unlink()
    monkeypatch.delattr(FakeSegmenter, "segment")
    done = invoke(source, out, "participant", "--resume")
    assert done.exit_code == 0
    assert "not run again" in done.output
    assert files(out) == before


def test_a_report_of_an_earlier_run_goes(tmp_path):
    source, out = write_dataset(tmp_path / "raw", PLAIN, SESSION), tmp_path / "out"
    assert invoke(source, out, "participant").exit_code == 0
    plain = files(out)
    assert invoke(source, out, "participant", "--report").exit_code == 0
    edited = out / "sub-01/anat/sub-01_report.html"
    edited.write_bytes(b"with my notes")
    assert len(files(out) - plain) == 4
    assert invoke(source, out, "participant").exit_code == 0
    assert files(out) - plain == {"sub-01/anat/sub-01_report.html"}
    assert plain <= files(out)


def test_its_results_are_no_scans(tmp_path):
    described = "sub-03/anat/sub-03_desc-x_T2w.nii.gz"
    source, out = write_dataset(tmp_path / "raw", SESSION, described), tmp_path / "out"
    assert invoke(source, out, "participant").exit_code == 0
    maps = sorted(out.rglob("*.nii.gz"))
    assert len(maps) == 6
    # By folder, by pattern, and by name.
    for arguments in ([out / "sub-02/ses-a/anat", out / "sub-03/*"], maps):
        found = find_scans([*arguments, source / SESSION])
        assert found.scans == (source / SESSION,)
        assert sorted(found.passed_over) == maps


# The command line


def test_label_options_take_several_values(tmp_path):
    names = [f"sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T2w.nii" for n in "123" for s in "ab"]
    source, out = write_dataset(tmp_path / "raw", *names), tmp_path / "out"
    args = ("--participant_label", "1", "sub-3", "--session-label", "b", "--device", "cpu")
    done = invoke(source, out, "participant", *args, "-q")
    assert (done.exit_code, done.output) == (0, "")
    assert {name.split("/")[0] for name in files(out) if "/" in name} == {"sub-1", "sub-3"}
    assert not list(out.rglob("ses-a"))


def test_entity_options_take_several_values(tmp_path):
    names = [f"sub-1/anat/sub-1_{m}_T2w.nii" for m in ("acq-a_rec-x_run-1", "acq-b_rec-x_run-2")]
    third = "sub-1/anat/sub-1_acq-c_rec-y_run-1_T2w.nii"
    source, out = write_dataset(tmp_path / "raw", *names, third), tmp_path / "out"
    args = ("--acquisition_label", "a", "acq-b", "c", "--reconstruction-label", "x")
    done = invoke(source, out, "participant", *args, "--run-label", "2", "1", "-q")
    assert (done.exit_code, done.output) == (0, "")
    assert sorted(path.name for path in out.rglob("*_dseg.nii.gz")) == [
        "sub-1_acq-a_rec-x_run-1_dseg.nii.gz",
        "sub-1_acq-b_rec-x_run-2_dseg.nii.gz",
    ]


def test_the_age_is_that_of_all(tmp_path):
    source, out = write_dataset(tmp_path / "raw", PLAIN, SESSION), tmp_path / "out"
    # 108 mL of brain are too little at 37 weeks, and fit 28.
    assert invoke(source, out, "participant", "--ga", "37.5").exit_code == 6
    assert invoke(source, out, "participant", "--ga", "28").exit_code == 0
    records = [json.loads(path.read_bytes()) for path in out.rglob("*_trtseg.json")]
    assert [record["options"]["ga_weeks"] for record in records] == [28, 28]
    done = invoke(source, out, "participant", "--ga", "250")
    assert isinstance(done.exception, UsageError)
    assert "a gestational age of 250 weeks" in str(done.exception)


def test_options_reach_the_segmenter(tmp_path, monkeypatch):
    made = []

    class Watched(FakeSegmenter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__()
            made.append((args, options))

    monkeypatch.setattr("trtseg.pipeline.Segmenter", Watched)
    source = write_dataset(tmp_path / "raw", PLAIN)
    args = ("--models", "m", "--engines", "e", "--device", "cpu", "--threads", 3)
    assert invoke(source, tmp_path / "out", "participant", *args).exit_code == 0
    invoke(source, tmp_path / "out", "participant", "--precision", "bf16")
    assert made == [
        (("m",), {"engines": Path("e"), "device": "cpu", "threads": 3, "precision": None}),
        ((None,), {"engines": None, "device": "auto", "threads": None, "precision": "bf16"}),
    ]


def test_the_log_knows_scans_by_their_digest(tmp_path):
    last = "sub-03/anat/sub-03_T2w.nii.gz"
    source = write_dataset(tmp_path / "raw", PLAIN, SESSION, last)
    (source / last).write_bytes((source / last).read_bytes()[:-20])
    log = tmp_path / "logs" / "trtseg.log"
    for _ in range(2):
        invoke(source, tmp_path / "out", "participant", "--log-file", log, "--resume")
    text = log.read_text("utf-8")
    assert "sub-" not in text
    assert str(tmp_path) not in text
    lines = [line.split(" ", 2)[2] for line in text.splitlines()]
    assert lines[0].startswith("bids: trtseg ")
    assert lines[1] == "models fake, device cpu, precision f32, scans: 3"
    assert sum(line.endswith(": started") for line in lines) == 4  # the damaged one twice
    assert sum(line.endswith(": complete, not run again") for line in lines) == 2
    assert sum("failed, InputError, exit code 2" in line for line in lines) == 2


def test_a_failed_sidecar_is_in_the_log(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OutputError("disk full")

    source, log = write_dataset(tmp_path / "raw", PLAIN), tmp_path / "log"
    monkeypatch.setattr("trtseg.bids.write_sidecars", full)
    assert invoke(source, tmp_path / "out", "participant", "--log-file", log).exit_code == 5
    assert log.read_text("utf-8").endswith(": failed, OutputError, exit code 5\n")


@pytest.mark.parametrize(
    ("out", "log", "said"),
    [
        ("raw", "log", "is BIDS_DIR"),
        ("other", "log", "that trtseg did not make"),
        ("out", "raw/log", "is in BIDS_DIR"),
        ("out", "out/log", "is in OUT_DIR"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(tmp_path, out, log, said):
    source = write_dataset(tmp_path / "raw", PLAIN)
    write_dataset(tmp_path / "other")
    before = files(tmp_path)
    done = invoke(source, tmp_path / out, "participant", "--log-file", tmp_path / log)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
    assert files(tmp_path) == before


def test_a_log_beside_the_derivatives(tmp_path):
    source = write_dataset(tmp_path / "raw", PLAIN)
    log = source / "derivatives" / "trtseg.log"
    out = source / "derivatives" / "trtseg"
    assert invoke(source, out, "participant", "--log-file", log).exit_code == 0
    assert log.is_file()


@pytest.mark.parametrize(
    ("level", "said"),
    [("group", "trtseg has no group level; expected participant"), ("x", "analysis level x;")],
)
def test_other_levels_are_refused(tmp_path, level, said):
    done = invoke(write_dataset(tmp_path / "raw", PLAIN), tmp_path / "out", level)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


# Validity


def validator() -> list[str]:
    """The command of the schema-based validator; the test is skipped without one."""
    named = os.environ.get(VALIDATOR_VARIABLE)
    if named:
        return shlex.split(named)
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    command = shutil.which("bids-validator-deno", path=os.pathsep.join(folders))
    if command is None:
        pytest.skip(f"no bids-validator-deno on PATH, and {VALIDATOR_VARIABLE} is not set")
    return [command]


def errors(command: list[str], folder: Path) -> set[str]:
    done = subprocess.run(
        [*command, "--format", "json", str(folder)], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return {
        f"{issue['code']} {issue['location']}" for issue in issues if issue["severity"] == "error"
    }


def test_the_derivatives_are_valid_bids(tmp_path):
    command = validator()
    described = "sub-01/anat/sub-01_rec-svr_desc-x_T2w.nii.gz"
    source = write_dataset(tmp_path / "raw", PLAIN, described, SESSION)
    for out in (tmp_path / "out", source / "derivatives" / "trtseg"):
        done = invoke(source, out, "participant", "--report")
        assert done.exit_code == 0, done.output
        assert errors(command, out) == set()
    # The validator sees what is not valid.
    (out / ".bidsignore").unlink()
    stem = "/sub-01/anat/sub-01"
    assert {f"NOT_INCLUDED {stem}_trtseg.json", f"NOT_INCLUDED {stem}_report.html"} <= errors(
        command, out
    )
