"""BIDS datasets: which scans are found, and what is said and kept of the derivatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from trtseg import bids
from trtseg.bids import (
    T2w,
    check_log_file,
    check_out_dir,
    describe_dataset,
    find_t2w,
    read_description,
)
from trtseg.errors import InputError, UsageError


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
    source, out = write_dataset(tmp_path / "raw"), tmp_path / "out"
    out.mkdir()
    (out / ".bidsignore").write_bytes(b"mine\n*_report.png\n")
    (out / "README").write_bytes(b"mine")
    for _ in range(2):
        bids.write_dataset(source, out, read_description(source))
    assert files(out) == {".bidsignore", "README", "dataset_description.json", "dseg.tsv"}
    assert (out / "README").read_bytes() == b"mine"
    lines = (out / ".bidsignore").read_text("utf-8").splitlines()
    assert lines == ["mine", "*_report.png", "*_trtseg.json", "*_report.html"]


# What may be written where


@pytest.mark.parametrize(("place", "said"), [("", "is BIDS_DIR"), ("sub-01", "a part of BIDS_DIR")])
def test_the_source_dataset_is_no_place_for_derivatives(tmp_path, place, said):
    source = write_dataset(tmp_path / "raw")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match=said):
        check_out_dir(source, tmp_path / "link" / place)


@pytest.mark.parametrize("content", [b"{}", b"x", b'{"GeneratedBy": [{"Name": "y"}, 5]}'])
def test_another_dataset_is_no_place_for_derivatives(tmp_path, content):
    (tmp_path / "dataset_description.json").write_bytes(content)
    with pytest.raises(UsageError, match="that trtseg did not make"):
        check_out_dir(tmp_path / "raw", tmp_path)


def test_places_for_derivatives(tmp_path):
    source = write_dataset(tmp_path / "raw")
    ours = write_dataset(tmp_path / "ours", GeneratedBy=[{"Name": "trtseg"}])
    for out in (ours, tmp_path / "new", source / "derivatives" / "trtseg"):
        check_out_dir(source, out)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("raw/log", "is in BIDS_DIR"),
        ("raw/sub-01/log", "is in BIDS_DIR"),
        ("raw/derivatives/trtseg/logs/log", "is in OUT_DIR"),
    ],
)
def test_a_dataset_is_no_place_for_a_log(tmp_path, place, said):
    out = tmp_path / "raw" / "derivatives" / "trtseg"
    with pytest.raises(UsageError, match=said):
        check_log_file(tmp_path / "raw", out, tmp_path / place)
