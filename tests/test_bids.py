"""The BIDS-App form: which scans are found, what is written, and whether it is valid BIDS."""

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
from trtseg.batch import find_scans
from trtseg.bids import LabelsCommand, T2w, bids, describe_dataset, find_t2w, read_description
from trtseg.errors import InputError, OutputError, UsageError

#: Of the schema-based validator: the command, where it is not on PATH.
VALIDATOR_VARIABLE = "TRTSEG_BIDS_VALIDATOR"


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtseg.pipeline.Segmenter", FakeSegmenter)


def write_scan(path: Path) -> None:
    """A box of 108 mL, of which 36 mL are cortex, with air all around."""
    values = np.full((12, 14, 16), 10, np.int16)
    values[3:9, 4:10, 5:8] = 60
    values[3:9, 4:10, 5] = 90
    image = nibabel.Nifti1Image(values, np.diag([10.0, 10, 10, 1]))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def write_dataset(folder: Path, *names: str, **description: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"Name": "x", "BIDSVersion": "1.10.1", **description}
    (folder / "dataset_description.json").write_text(json.dumps(content), "utf-8")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_scan(folder / name)
    return folder


PLAIN = "sub-01/anat/sub-01_T2w.nii.gz"
SESSION = "sub-02/ses-a/anat/sub-02_ses-a_acq-x_rec-svr_run-1_T2w.nii"


def invoke(*args: Any) -> Any:
    app = typer.Typer()
    app.command("bids", cls=LabelsCommand)(bids)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


# Which scans


def found(
    folder: Path, participants: Any = (), sessions: Any = (), **labels: list[str]
) -> list[str]:
    return [scan.source for scan in find_t2w(folder, participants, sessions, labels).scans]


def test_every_t2w_image_of_the_dataset_is_found(tmp_path):
    second = "sub-02/ses-b/anat/sub-02_ses-b_T2w.nii.gz"
    folder = write_dataset(
        tmp_path,
        SESSION,
        second,
        PLAIN,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/func/sub-01_T2w.nii.gz",
        "derivatives/x/sub-01/anat/sub-01_T2w.nii.gz",
        "other/anat/sub-01_T2w.nii.gz",
    )
    (folder / "sub-01.txt").touch()
    assert found(folder) == [PLAIN, SESSION, second]
    assert found(folder, ["02"]) == [SESSION, second]
    assert found(folder, ["sub-02", "01"], ["b"]) == [second]
    assert found(folder, (), ["ses-a"]) == [SESSION]


@pytest.mark.parametrize(
    "name",
    [
        "sub-01/anat/sub-02_T2w.nii.gz",
        "sub-01/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-a/anat/sub-01_T2w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-b_T2w.nii.gz",
        "sub-01/anat/sub-01_run-1_run-2_T2w.nii.gz",
        "sub-01/anat/sub-01_label-x_T2w.nii.gz",
        "sub-01/anat/sub-01_stack_T2w.nii.gz",
    ],
)
def test_a_name_that_is_not_of_its_place_is_passed_over_with_a_word(tmp_path, name):
    folder = write_dataset(tmp_path, PLAIN, name)
    everything = find_t2w(folder, (), ())
    assert [scan.source for scan in everything.scans] == [PLAIN]
    assert everything.notes == (f"{folder / name}: no BIDS name for its place; passed over",)


def test_a_participant_without_scans_is_said(tmp_path):
    folder = write_dataset(tmp_path, PLAIN, "sub-02/anat/sub-02_T1w.nii.gz")
    assert find_t2w(folder, (), ()).notes == ("sub-02: no T2w image to segment",)


def test_labels_that_are_not_there(tmp_path):
    folder = write_dataset(tmp_path, PLAIN, SESSION)
    with pytest.raises(UsageError, match=r"sub-03 sub-1 not in.*expected labels out of: 01 02"):
        find_t2w(folder, ["03", "02", "1"], ())
    with pytest.raises(UsageError, match=r"ses-b not in.*expected labels out of: a$"):
        find_t2w(folder, (), ["b"])
    said = r"^--session-label: no image has a session label; leave it out, "
    with pytest.raises(UsageError, match=said):
        find_t2w(folder, ["01"], ["a"])


def test_images_are_chosen_by_their_entities(tmp_path):
    names = [
        f"sub-01/anat/sub-01_{middle}T2w.nii"
        for middle in ("", "acq-a_rec-x_", "acq-a_run-1_", "acq-b_rec-x_run-2_", "rec-y_")
    ]
    plain, ax, a1, bx2, y = names
    folder = write_dataset(tmp_path, *names)
    assert found(folder, acq=[], rec=[]) == sorted(names)
    assert found(folder, acq=["a"]) == [ax, a1]
    assert found(folder, acq=["acq-b", "a"]) == [ax, a1, bx2]
    assert found(folder, rec=["x", "y"]) == [ax, bx2, y]
    assert found(folder, acq=["a"], rec=["x"]) == [ax]
    assert found(folder, run=["1", "2"]) == [a1, bx2]
    assert plain in found(folder)


def test_entities_that_no_image_has(tmp_path):
    folder = write_dataset(tmp_path, PLAIN, SESSION)
    said = r"--reconstruction-label: rec-x not in the dataset; expected labels out of: svr$"
    with pytest.raises(UsageError, match=said):
        found(folder, rec=["x", "svr"])
    with pytest.raises(UsageError, match=r"^--run-label: no image has a run label; leave it out, "):
        found(folder, ["01"], run=["1"])
    with pytest.raises(UsageError, match="no image has an acquisition label"):
        found(folder, ["01"], acq=["1"])


def test_entities_that_no_image_has_together(tmp_path):
    other = "sub-01/anat/sub-01_acq-y_T2w.nii"
    folder = write_dataset(tmp_path, SESSION, other)
    with pytest.raises(InputError, match="no T2w image of what is asked for"):
        found(folder, acq=["y"], rec=["svr"])


def test_no_scan_at_all(tmp_path):
    folder = write_dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    with pytest.raises(InputError, match="no T2w image"):
        find_t2w(folder, (), ())


def test_an_image_that_is_there_twice(tmp_path):
    folder = write_dataset(tmp_path, PLAIN, PLAIN.removesuffix(".gz"))
    with pytest.raises(InputError, match="the same image twice"):
        find_t2w(folder, (), ())


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(InputError, match="Permission denied"):
        find_t2w(tmp_path, (), ())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file.*give the top folder of a BIDS dataset"),
        (b"{", "no JSON"),
        (b"\xff\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "JSON, but no object"),
    ],
)
def test_a_dataset_without_a_description(tmp_path, content, said):
    if content is not None:
        (tmp_path / "dataset_description.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_description(tmp_path)


def test_names_keep_the_order_of_entities():
    scan = T2w(Path(), "", ("sub-01", "rec-svr"))
    assert scan.derived("dseg.tsv") == "sub-01_rec-svr_dseg.tsv"
    assert scan.derived("mask.json", label="CGM") == "sub-01_rec-svr_label-CGM_mask.json"
    scan = T2w(Path(), "", ("sub-01", "res-1", "desc-y"))
    assert scan.derived("mask.json", label="CGM") == "sub-01_res-1_label-CGM_desc-y_mask.json"


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


@pytest.mark.parametrize(
    "doi", ["doi:10.18112/x.v1", "10.18112/x.v1", "https://doi.org/10.18112/x.v1"]
)
def test_a_source_with_a_doi_is_called_by_it(tmp_path, doi):
    description = describe_dataset(tmp_path / "raw", tmp_path / "out", {"DatasetDOI": doi})
    assert description["SourceDatasets"] == [{"URL": "https://doi.org/10.18112/x.v1"}]
    assert description["DatasetLinks"] == {"raw": "https://doi.org/10.18112/x.v1"}


def test_a_source_without_a_doi_is_called_by_its_digest(tmp_path):
    (tmp_path / "dataset_description.json").write_bytes(b"Hello World!")
    for source in ({}, {"DatasetDOI": "/home/me"}, {"DatasetDOI": 5}):
        description = describe_dataset(tmp_path, tmp_path.parent / "out", source)
        # The example of RFC 6920, section 8.1.
        name = "ni:///sha-256;f4OxZX_x_FO5LcGBSKHWXfwtSx-j1ncoSt3SABJtkGk"
        assert description["DatasetLinks"] == {"raw": name}
        assert description["SourceDatasets"] == [{"URL": name}]


def test_what_was_there_is_kept(tmp_path):
    source = write_dataset(tmp_path / "raw", PLAIN)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".bidsignore").write_bytes(b"mine\n*_report.png\n")
    (out / "README").write_bytes(b"mine")
    for _ in range(2):
        assert invoke(source, out, "participant").exit_code == 0
    assert (out / "README").read_bytes() == b"mine"
    assert not (out / "README.md").exists()
    lines = (out / ".bidsignore").read_text("utf-8").splitlines()
    assert lines == ["mine", "*_report.png", "*_trtseg.json", "*_report.html"]


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
    ("place", "said"),
    [
        ("raw/log", "is in BIDS_DIR"),
        ("raw/sub-01/log", "is in BIDS_DIR"),
        ("raw/derivatives/trtseg/logs/log", "is in OUT_DIR"),
    ],
)
def test_a_log_inside_a_dataset_is_refused(tmp_path, place, said):
    source = write_dataset(tmp_path / "raw", PLAIN)
    before = files(tmp_path)
    out = source / "derivatives" / "trtseg"
    done = invoke(source, out, "participant", "--log-file", tmp_path / place)
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


@pytest.mark.parametrize(("place", "said"), [("", "is BIDS_DIR"), ("sub-01", "a part of BIDS_DIR")])
def test_the_source_dataset_is_not_written_to(tmp_path, place, said):
    source = write_dataset(tmp_path / "raw", PLAIN)
    (tmp_path / "link").symlink_to(source)
    before = files(source)
    done = invoke(source, tmp_path / "link" / place, "participant")
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
    assert files(source) == before


@pytest.mark.parametrize("content", [b"{}", b"x", b'{"GeneratedBy": [{"Name": "y"}, 5]}'])
def test_another_dataset_is_not_written_to(tmp_path, content):
    source, out = write_dataset(tmp_path / "raw", PLAIN), tmp_path / "out"
    out.mkdir()
    (out / "dataset_description.json").write_bytes(content)
    done = invoke(source, out, "participant")
    assert isinstance(done.exception, UsageError)
    assert "that trtseg did not make" in str(done.exception)
    assert files(out) == {"dataset_description.json"}


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
