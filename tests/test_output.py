from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from trtseg.errors import OutputError, UsageError
from trtseg.files import sha256_bytes
from trtseg.nifti import scan_from_array
from trtseg.output import OutputPaths, map_of, plan_outputs, remove_stale, save
from trtseg.pipeline import Segmentation

AFFINE = np.array(
    [[0.8, 0.0, 0.0, -10.0], [0.0, 0.0, -1.2, 20.0], [0.0, 0.8, 0.0, -30.0], [0.0, 0.0, 0.0, 1.0]]
)


def scans(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Names


def test_beside_the_scan_by_default(tmp_path):
    [plan] = plan_outputs(scans(tmp_path, "sub/scan.nii.gz"), None)
    assert plan == OutputPaths(
        cortex=tmp_path / "sub" / "scan_cgm.nii.gz",
        brain=tmp_path / "sub" / "scan_brain.nii.gz",
        cortex_probabilities=None,
        brain_probabilities=None,
        sidecar=tmp_path / "sub" / "scan_trtseg.json",
    )
    assert plan.all() == (plan.cortex, plan.brain, plan.sidecar)
    assert plan.pages() == {}


def test_in_a_folder_that_need_not_exist(tmp_path):
    plans = plan_outputs(
        scans(tmp_path, "a/one.nii", "b/two.nii.gz"), tmp_path / "out" / "deep", probabilities=True
    )
    out = tmp_path / "out" / "deep"
    assert plans == [
        OutputPaths(
            cortex=out / "one_cgm.nii.gz",
            brain=out / "one_brain.nii.gz",
            cortex_probabilities=out / "one_cgm_prob.nii.gz",
            brain_probabilities=out / "one_brain_prob.nii.gz",
            sidecar=out / "one_trtseg.json",
        ),
        OutputPaths(
            cortex=out / "two_cgm.nii.gz",
            brain=out / "two_brain.nii.gz",
            cortex_probabilities=out / "two_cgm_prob.nii.gz",
            brain_probabilities=out / "two_brain_prob.nii.gz",
            sidecar=out / "two_trtseg.json",
        ),
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cortex.nii", "cortex.nii.gz", "CORTEX.NII.GZ"])
def test_one_named_file(tmp_path, name):
    [plan] = plan_outputs(
        scans(tmp_path, "a/scan.nii.gz"), tmp_path / "out" / name, probabilities=True
    )
    assert plan == OutputPaths(
        cortex=tmp_path / "out" / name,
        brain=tmp_path / "out" / "scan_brain.nii.gz",
        cortex_probabilities=tmp_path / "out" / "scan_cgm_prob.nii.gz",
        brain_probabilities=tmp_path / "out" / "scan_brain_prob.nii.gz",
        sidecar=tmp_path / "out" / "scan_trtseg.json",
    )


def test_all_that_may_be_written(tmp_path):
    [plan] = plan_outputs(
        scans(tmp_path, "scan.nii"), None, probabilities=True, dseg=True, report=True
    )
    assert [path.relative_to(tmp_path).name for path in plan.all()] == [
        "scan_cgm.nii.gz",
        "scan_brain.nii.gz",
        "scan_cgm_prob.nii.gz",
        "scan_brain_prob.nii.gz",
        "scan_dseg.nii.gz",
        "scan_dseg.tsv",
        "scan_report.html",
        "scan_report.png",
        "scan_trtseg.json",
    ]
    assert list(plan.pages()) == ["report", "picture"]
    assert {**plan.results(), "sidecar": plan.sidecar} == {
        role: path for role, path in vars(plan).items() if path is not None
    }


def test_a_named_file_may_replace_an_older_result(tmp_path):
    [scan, older] = scans(tmp_path, "scan.nii.gz", "cortex.nii.gz")
    assert plan_outputs([scan], older)[0].cortex == older


@pytest.mark.parametrize("name", ["results.nii", "results.nii.gz"])
def test_a_folder_that_is_called_like_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    plans = plan_outputs(scans(tmp_path, "a.nii", "b.nii"), tmp_path / name)
    assert [plan.cortex for plan in plans] == [
        tmp_path / name / "a_cgm.nii.gz",
        tmp_path / name / "b_cgm.nii.gz",
    ]


def test_what_was_not_asked_for(tmp_path):
    [scan] = scans(tmp_path, "scan.nii")
    [plan] = plan_outputs([scan], None, mask=tmp_path / "mask.nii", dseg=True)
    assert {role: path.name for role, path in plan.unasked().items()} == {
        "cortex_probabilities": "scan_cgm_prob.nii.gz",
        "brain_probabilities": "scan_brain_prob.nii.gz",
        "report": "scan_report.html",
        "picture": "scan_report.png",
    }
    [plan] = plan_outputs([scan], None, probabilities=True, dseg=True, report=True)
    assert plan.unasked() == {}
    [named] = plan_outputs([scan], tmp_path / "scan_dseg.nii.gz")
    assert named.unasked()["cortex"] == tmp_path / "scan_cgm.nii.gz"
    assert "dseg" not in named.unasked()


@pytest.mark.parametrize(
    ("stem", "start"),
    [
        ("a_cgm", "a"),
        ("a_brain_prob", "a"),
        ("a_brain_cgm_prob", "a_brain"),
        ("sub-1_run-2_dseg", "sub-1_run-2"),
        ("sub-1_label-CGM_mask", "sub-1"),
        ("sub-1_res-1_label-brain_desc-y_mask", "sub-1_res-1_desc-y"),
        ("sub-1_label-WM_mask", None),
        ("sub-1_label-CGM_desc-y_desc-z_mask", None),
        ("a_prob", None),
        ("_cgm", None),
    ],
)
def test_the_names_of_maps(stem, start):
    assert map_of(stem) == start


@pytest.mark.parametrize(
    ("scan", "stem"),
    [
        ("scan.nii", "scan"),
        ("scan.NII.GZ", "scan"),
        ("scan.hdr", "scan"),
        ("scan.img", "scan"),
        ("sub-01_ses-2_T2w.nii.gz", "sub-01_ses-2_T2w"),
        ("v1.2.nii.gz", "v1.2"),
        ("scan.nii.nii.gz", "scan.nii"),
    ],
)
def test_stems(tmp_path, scan, stem):
    [plan] = plan_outputs(scans(tmp_path, scan), tmp_path / "out")
    assert plan.brain == tmp_path / "out" / f"{stem}_brain.nii.gz"


def test_no_probability_of_a_given_brain(tmp_path):
    [scan, mask] = scans(tmp_path, "scan.nii", "mask.nii")
    [plan] = plan_outputs([scan], None, mask=mask, probabilities=True)
    assert plan.brain_probabilities is None
    assert plan.brain == tmp_path / "scan_brain.nii.gz"
    assert plan.cortex_probabilities == tmp_path / "scan_cgm_prob.nii.gz"
    assert plan.all() == (plan.cortex, plan.brain, plan.cortex_probabilities, plan.sidecar)


def test_same_names_in_different_folders_go_beside_their_scans(tmp_path):
    plans = plan_outputs(scans(tmp_path, "a/scan.nii", "b/scan.nii"), None)
    assert [plan.cortex for plan in plans] == [
        tmp_path / "a" / "scan_cgm.nii.gz",
        tmp_path / "b" / "scan_cgm.nii.gz",
    ]


def test_no_scans(tmp_path):
    assert plan_outputs([], tmp_path) == []


# Refusals


def refuse(paths: list[Path], out: Path | None, message: str, **options) -> UsageError:
    with pytest.raises(UsageError, match=message) as caught:
        plan_outputs(paths, out, **options)
    assert caught.value.action
    return caught.value


@pytest.mark.parametrize("name", ["cortex.nii", "cortex.nii.gz"])
def test_one_file_for_several_scans(tmp_path, name):
    error = refuse(
        scans(tmp_path, "a.nii", "b.nii"), tmp_path / name, "one file, and 2 scans are given"
    )
    assert error.action == "give -o a folder"


@pytest.mark.parametrize("end", [".mgz", ".MGH", ".nrrd", ".mha", ".mhd", ".img", ".hdr", ".gz"])
def test_a_file_of_another_kind(tmp_path, end):
    paths = scans(tmp_path, "a.nii", "b.nii")
    for some in (paths, paths[:1]):
        error = refuse(some, tmp_path / f"q{end}", f"-o .*q{end} is the name of a file of another")
        assert error.expected == "a folder, or for one scan a name ending in .nii or .nii.gz"
    (tmp_path / f"q{end}").mkdir()
    [plan, _] = plan_outputs(paths, tmp_path / f"q{end}")
    assert plan.cortex == tmp_path / f"q{end}" / "a_cgm.nii.gz"


def test_same_names_from_different_folders_into_one(tmp_path):
    [a, b] = scans(tmp_path, "a/scan.nii", "b/scan.nii")
    error = refuse([a, b], tmp_path / "out", "would both write")
    assert str(error).startswith(
        f"{a} and {b} would both write {tmp_path / 'out' / 'scan_cgm.nii.gz'};"
    )


@pytest.mark.parametrize("other", ["scan.nii.gz", "scan.hdr", "scan.NII"])
def test_same_stem_in_one_folder(tmp_path, other):
    refuse(scans(tmp_path, "scan.nii", other), None, r"both write .*scan_cgm\.nii\.gz")


def test_a_scan_given_twice(tmp_path):
    [scan] = scans(tmp_path, "scan.nii")
    refuse([scan, scan], None, "both write")
    refuse([scan, tmp_path / "x" / ".." / "scan.nii"], None, "both write")


def test_a_folder_reached_by_two_names(tmp_path):
    [scan] = scans(tmp_path, "real/scan.nii")
    (tmp_path / "link").symlink_to("real")
    refuse([scan, tmp_path / "link" / "scan.nii"], None, "both write")


def test_one_scan_whose_maps_would_collide(tmp_path):
    [scan] = scans(tmp_path, "scan.nii")
    refuse([scan], tmp_path / "scan_brain.nii.gz", r"both write .*scan_brain\.nii\.gz")
    named = tmp_path / "scan_cgm_prob.nii.gz"
    refuse([scan], named, r"both write .*scan_cgm_prob", probabilities=True)
    assert plan_outputs([scan], named)[0].cortex == named


def test_an_output_equal_to_its_scan(tmp_path):
    [scan] = scans(tmp_path, "scan.nii.gz")
    error = refuse([scan], scan, "would overwrite the input")
    assert str(error).startswith(f"{scan} would overwrite the input {scan};")


def test_an_output_equal_to_its_scan_by_another_name(tmp_path, monkeypatch):
    [scan] = scans(tmp_path, "scan.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to("scan.nii.gz")
    refuse([scan], tmp_path / "link.nii.gz", "would overwrite the input")
    refuse([tmp_path / "link.nii.gz"], scan, "would overwrite the input")
    refuse([scan], tmp_path / "x" / ".." / "scan.nii.gz", "would overwrite the input")
    monkeypatch.chdir(tmp_path)
    refuse([scan], Path("scan.nii.gz"), "would overwrite the input")


def test_an_output_equal_to_another_scan(tmp_path):
    [scan, other] = scans(tmp_path, "scan.nii.gz", "scan_brain.nii.gz")
    refuse([scan, other], None, r"scan_brain\.nii\.gz would overwrite the input")
    refuse([other, scan], None, r"scan_brain\.nii\.gz would overwrite the input")


def test_an_older_result_that_is_no_input_may_be_replaced(tmp_path):
    [scan, older] = scans(tmp_path, "scan.nii.gz", "scan_brain.nii.gz")
    assert plan_outputs([scan], None)[0].brain == older


def test_an_output_equal_to_the_mask(tmp_path):
    [scan, mask] = scans(tmp_path, "scan.nii.gz", "scan_brain.nii.gz")
    refuse([scan], None, "would overwrite the input", mask=mask)
    refuse([scan], mask, "would overwrite the input", mask=mask)
    (tmp_path / "mask.nii.gz").symlink_to("scan_brain.nii.gz")
    refuse([scan], None, "would overwrite the input", mask=tmp_path / "mask.nii.gz")


def test_a_planned_probability_map_counts_too(tmp_path):
    [scan, mask] = scans(tmp_path, "scan.nii.gz", "scan_cgm_prob.nii.gz")
    refuse([scan], None, "would overwrite the input", mask=mask, probabilities=True)
    assert plan_outputs([scan], None, mask=mask)


@pytest.mark.parametrize("name", ["scan_trtseg.json", "scan_report.html", "scan_dseg.tsv"])
def test_other_files_count_too(tmp_path, name):
    [scan, other] = scans(tmp_path, "scan.nii.gz", name)
    everything = {"dseg": True, "report": True}
    refuse([scan, other], None, "would overwrite the input", **everything)
    others = {"--stats": tmp_path / name, "--log-file": None}
    error = refuse([scan], None, "would both write", others=others, **everything)
    assert str(error).startswith(f"{scan} and --stats would both write {tmp_path / name};")


def test_a_table_or_a_log_never_overwrites_a_scan_or_one_another(tmp_path):
    [scan] = scans(tmp_path, "scan.nii.gz")
    refuse([scan], None, "would overwrite the input", others={"--log-file": scan})
    same = {"--stats": tmp_path / "a.json", "--log-file": tmp_path / "x" / ".." / "a.json"}
    refuse([scan], None, "--stats and --log-file would both write", others=same)


def test_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    [scan] = scans(tmp_path, "scan.nii.gz")
    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert plan_outputs([scan], tmp_path / "x.nii")[0].cortex == tmp_path / "x.nii"


def test_a_link_that_leads_round_in_a_circle(tmp_path):
    (tmp_path / "scan.nii.gz").symlink_to("scan.nii.gz")
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], None)
    assert plan.cortex == tmp_path / "scan_cgm.nii.gz"


# Writing


def segmentation(*, probabilities: bool = True) -> Segmentation:
    shape = (3, 4, 5)
    brain = np.zeros(shape, np.uint8)
    brain[1:] = 1
    cortex = np.zeros(shape, np.uint8)
    cortex[2, 1:] = 1
    chance = np.linspace(0, 1, 60, dtype=np.float32).reshape(shape)
    return Segmentation(
        cortex=cortex,
        brain=brain,
        geometry=scan_from_array(np.arange(60.0).reshape(shape), AFFINE).geometry,
        brain_ml=1.0,
        cortex_ml=0.5,
        times={},
        cortex_probabilities=chance * brain if probabilities else None,
        brain_probabilities=chance if probabilities else None,
        models="demo",
        device="cpu",
        precision="f32",
        notice="demo weights",
    )


def read(path: Path) -> tuple[np.ndarray, nibabel.Nifti1Image]:
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image


def test_save_writes_every_map(tmp_path):
    result = segmentation()
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], tmp_path / "new" / "out", probabilities=True)
    save(result, plan)
    assert names(tmp_path / "new" / "out") == [
        "scan_brain.nii.gz",
        "scan_brain_prob.nii.gz",
        "scan_cgm.nii.gz",
        "scan_cgm_prob.nii.gz",
    ]
    assert plan.cortex_probabilities is not None
    assert plan.brain_probabilities is not None
    for path, expected in (
        (plan.cortex, result.cortex),
        (plan.brain, result.brain),
        (plan.cortex_probabilities, result.cortex_probabilities),
        (plan.brain_probabilities, result.brain_probabilities),
    ):
        data, image = read(path)
        np.testing.assert_array_equal(data, expected)
        assert data.dtype == expected.dtype
        np.testing.assert_array_equal(image.affine, AFFINE.astype(np.float32))
        assert image.header["descrip"].item() == b"demo weights"


def test_save_without_probabilities(tmp_path):
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], None)
    save(segmentation(probabilities=False), plan)
    assert names(tmp_path) == ["scan_brain.nii.gz", "scan_cgm.nii.gz"]


def test_save_keeps_to_the_plan(tmp_path):
    """Maps that were computed but not asked for are not written."""
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], None)
    save(segmentation(), plan)
    assert names(tmp_path) == ["scan_brain.nii.gz", "scan_cgm.nii.gz"]


def test_save_of_a_given_brain(tmp_path):
    result = replace(segmentation(), brain_probabilities=None)
    [plan] = plan_outputs(
        [tmp_path / "scan.nii.gz"], None, mask=tmp_path / "mask.nii.gz", probabilities=True
    )
    save(result, plan)
    assert names(tmp_path) == ["scan_brain.nii.gz", "scan_cgm.nii.gz", "scan_cgm_prob.nii.gz"]


def test_save_of_both_labels_in_one_map(tmp_path):
    result = segmentation(probabilities=False)
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], None, dseg=True)
    save(result, plan)
    assert names(tmp_path) == [
        "scan_brain.nii.gz",
        "scan_cgm.nii.gz",
        "scan_dseg.nii.gz",
        "scan_dseg.tsv",
    ]
    data, image = read(tmp_path / "scan_dseg.nii.gz")
    assert data.dtype == np.uint8
    np.testing.assert_array_equal(data == 2, result.cortex == 1)
    np.testing.assert_array_equal(data == 1, (result.brain == 1) & (result.cortex == 0))
    assert image.header["descrip"].item() == b"demo weights"
    lines = (tmp_path / "scan_dseg.tsv").read_text("utf-8").splitlines()
    assert lines[0].split("\t")[:2] == ["index", "name"]
    assert [line.split("\t")[0] for line in lines[1:]] == ["1", "2"]


@pytest.mark.parametrize("name", ["cortex.nii", "CORTEX.NII.GZ"])
def test_save_under_a_name_of_its_own(tmp_path, name):
    result = segmentation(probabilities=False)
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], tmp_path / "out" / name)
    save(result, plan)
    assert names(tmp_path / "out") == sorted([name, "scan_brain.nii.gz"])
    content = (tmp_path / "out" / name).read_bytes()
    assert content.startswith(b"\x1f\x8b") == name.endswith("GZ")


def test_save_replaces_older_results(tmp_path):
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], None)
    for path in plan.maps().values():
        path.write_bytes(b"older")
    result = segmentation(probabilities=False)
    save(result, plan)
    np.testing.assert_array_equal(read(plan.cortex)[0], result.cortex)
    assert names(tmp_path) == ["scan_brain.nii.gz", "scan_cgm.nii.gz"]


@pytest.mark.parametrize(
    "blocked",
    [
        "scan_brain.nii.gz",
        "scan_brain_prob.nii.gz",
        "scan_cgm_prob.nii.gz",
        "scan_dseg.nii.gz",
        "scan_dseg.tsv",
    ],
)
def test_the_cortex_is_written_last(tmp_path, blocked):
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], None, probabilities=True, dseg=True)
    (tmp_path / blocked).mkdir()
    with pytest.raises(OutputError, match=f"{blocked}: Is a directory"):
        save(segmentation(), plan)
    assert not plan.cortex.exists()
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_save_where_no_folder_can_be(tmp_path):
    (tmp_path / "out").write_bytes(b"a file")
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], tmp_path / "out")
    with pytest.raises(OutputError, match="out: File exists"):
        save(segmentation(), plan)
    assert (tmp_path / "out").read_bytes() == b"a file"


# What an earlier result left

ROLES = {
    "cortex_probabilities": "scan_cgm_prob.nii.gz",
    "brain_probabilities": "scan_brain_prob.nii.gz",
    "dseg": "scan_dseg.nii.gz",
    "lookup": "scan_dseg.tsv",
    "report": "scan_report.html",
    "picture": "scan_report.png",
}


def earlier_result(folder: Path, **more: str) -> OutputPaths:
    """Files and sidecar of a result with all there is; give the plan of a plain one."""
    outputs = {"cortex": "scan_cgm.nii.gz", "brain": "scan_brain.nii.gz", **ROLES, **more}
    for name in outputs.values():
        (folder / name).write_bytes(name.encode())
    described: dict[str, Any] = {
        role: {"sha256": sha256_bytes(name.encode())} for role, name in outputs.items()
    }
    (folder / "scan_trtseg.json").write_text(json.dumps({"outputs": described, "seal": "x"}))
    [plan] = plan_outputs([folder / "scan.nii.gz"], None)
    return plan


PLAIN = ["scan_brain.nii.gz", "scan_cgm.nii.gz", "scan_trtseg.json"]


def test_stale_files_are_removed_and_the_sidecar_no_longer_vouches(tmp_path):
    plan = earlier_result(tmp_path)
    before = json.loads(plan.sidecar.read_text("utf-8"))
    assert remove_stale(plan, [tmp_path / "scan.nii.gz"]) == tuple(ROLES)
    assert names(tmp_path) == PLAIN
    assert json.loads(plan.sidecar.read_text("utf-8")) == {"outputs": before["outputs"]}
    assert remove_stale(plan, []) == ()


def test_what_is_asked_for_again_stays(tmp_path):
    earlier_result(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    [plan] = plan_outputs(
        [tmp_path / "scan.nii.gz"], None, probabilities=True, dseg=True, report=True
    )
    assert remove_stale(plan, []) == ()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_what_the_sidecar_lists_and_nobody_changed_is_removed(tmp_path):
    plan = earlier_result(tmp_path, other="notes.txt", sidecar="scan_trtseg.nii")
    (tmp_path / "scan_dseg.nii.gz").write_bytes(b"corrected by hand")
    (tmp_path / "scan_dseg.tsv").unlink()
    (tmp_path / "scan_dseg.tsv").mkdir()
    found = json.loads(plan.sidecar.read_text("utf-8"))
    del found["outputs"]["report"]
    plan.sidecar.write_text(json.dumps(found), "utf-8")
    assert remove_stale(plan, []) == ("cortex_probabilities", "brain_probabilities", "picture")
    assert names(tmp_path) == sorted(
        [
            *PLAIN,
            "notes.txt",
            "scan_dseg.nii.gz",
            "scan_dseg.tsv",
            "scan_report.html",
            "scan_trtseg.nii",
        ]
    )


def test_an_input_is_never_removed(tmp_path):
    plan = earlier_result(tmp_path)
    (tmp_path / "scan.nii.gz").symlink_to("scan_cgm_prob.nii.gz")
    (tmp_path / "mask.nii.gz").symlink_to("scan_brain_prob.nii.gz")
    inputs = [tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"]
    assert set(remove_stale(plan, inputs)) == {"dseg", "lookup", "report", "picture"}
    assert all(path.read_bytes() for path in inputs)


def test_a_link_goes_and_what_it_leads_to_stays(tmp_path):
    plan = earlier_result(tmp_path)
    (tmp_path / "scan_dseg.nii.gz").rename(tmp_path / "elsewhere")
    (tmp_path / "scan_dseg.nii.gz").symlink_to("elsewhere")
    assert "dseg" in remove_stale(plan, [])
    assert names(tmp_path) == sorted([*PLAIN, "elsewhere"])


def test_a_cortex_of_another_name(tmp_path):
    earlier_result(tmp_path)
    [plan] = plan_outputs([tmp_path / "scan.nii.gz"], tmp_path / "scan_dseg.nii.gz", report=True)
    assert set(remove_stale(plan, [])) == {
        "cortex",
        "cortex_probabilities",
        "brain_probabilities",
        "lookup",
    }
    assert (tmp_path / "scan_dseg.nii.gz").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"outputs": []}',
        b'{"outputs": {"dseg": "x", "report": {}, "picture": {"sha256": 5}}}',
    ],
)
def test_a_sidecar_that_lists_nothing(tmp_path, content):
    plan = earlier_result(tmp_path)
    plan.sidecar.write_bytes(content)
    assert remove_stale(plan, []) == ()
    assert plan.sidecar.read_bytes() == content
    assert set(names(tmp_path)) == {*PLAIN, *ROLES.values()}


def test_no_earlier_sidecar(tmp_path):
    plan = earlier_result(tmp_path)
    plan.sidecar.unlink()
    assert remove_stale(plan, []) == ()
    assert not plan.sidecar.exists()


def test_a_file_that_cannot_be_removed(tmp_path, monkeypatch):
    plan = earlier_result(tmp_path)
    unlink = Path.unlink

    def forbidden(self: Path, missing_ok: bool = False) -> None:
        if self.name == "scan_dseg.tsv":
            raise PermissionError(13, "Permission denied")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(OutputError, match=r"scan_dseg\.tsv: Permission denied"):
        remove_stale(plan, [])
