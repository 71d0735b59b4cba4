"""Many scans: which are found, what is written for each, and what is not done twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

from tests.fake_segmenter import FakeSegmenter
from trtseg import batch, nifti
from trtseg.batch import Options, Outcome, Reading, find_scans, process, read_ahead
from trtseg.errors import EngineError, InputError, OutputError, UsageError
from trtseg.files import json_seal, sha256_file
from trtseg.logs import log_to
from trtseg.output import OutputPaths, plan_outputs
from trtseg.pipeline import EMPTY_BRAIN, Segmentation, Segmenter

# Which scans


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def test_files_are_taken_as_they_are(tmp_path):
    paths = touch(tmp_path, "b.nii", "a.hdr", "c.txt")
    found = find_scans([*paths, tmp_path / "missing.nii"])
    assert found.scans == (*paths, tmp_path / "missing.nii")
    assert found.passed_over == ()


def test_a_folder_stands_for_the_scans_in_it(tmp_path):
    touch(tmp_path, "b.nii", "a.NII.GZ", "c.txt", ".d.nii", "below/e.nii")
    (tmp_path / "f.nii").mkdir()
    found = find_scans([tmp_path])
    assert found.scans == (tmp_path / "a.NII.GZ", tmp_path / "b.nii")


def test_patterns(tmp_path, monkeypatch):
    touch(tmp_path, "sub-1/a.nii", "sub-2/b.nii.gz", "sub-2/deep/c.nii", "other/d.nii", "e.nii")
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "*.nii": ["e.nii"],
        "sub-?": ["a.nii", "b.nii.gz"],
        "sub-[12]/*": ["a.nii", "b.nii.gz", "c.nii"],
        "**/*.nii": ["e.nii", "d.nii", "a.nii", "c.nii"],
    }.items():
        assert names(find_scans([Path(pattern)]).scans) == expected
        assert names(find_scans([tmp_path / pattern]).scans) == expected


def test_a_name_that_looks_like_a_pattern(tmp_path):
    [scan, _] = touch(tmp_path, "a[1].nii", "a1.nii")
    assert find_scans([scan]).scans == (scan,)


def test_what_is_named_twice(tmp_path):
    [a, b] = touch(tmp_path, "a.nii", "b.nii")
    assert find_scans([b, tmp_path, tmp_path / "*.nii"]).scans == (b, a)
    assert find_scans([a, a]).scans == (a, a)  # for `plan_outputs` to refuse


MAPS = (
    *("_brain.nii.gz", "_cgm.nii.gz", "_brain_prob.nii.gz", "_cgm_prob.nii", "_dseg.nii.gz"),
    *("_label-brain_mask.nii.gz", "_label-CGM_mask.nii.gz"),
)


def test_results_beside_their_scan_are_passed_over_in_a_folder(tmp_path):
    results = touch(tmp_path, *(f"a{ending}" for ending in MAPS))
    [scan] = touch(tmp_path, "a.nii")
    found = find_scans([tmp_path])
    assert found.scans == (scan,)
    assert set(found.passed_over) == set(results)
    # Someone may have named their own scans so: named outright, they are taken.
    assert find_scans(results).scans == tuple(results)


def test_results_beside_their_sidecar_are_always_passed_over(tmp_path):
    results = touch(tmp_path, *(f"a{ending}" for ending in MAPS))
    touch(tmp_path, "a_trtseg.json")
    [scan] = touch(tmp_path, "in/a.nii")
    for arguments in ([scan, tmp_path], [scan, *results]):
        found = find_scans(arguments)
        assert found.scans == (scan,)
        assert set(found.passed_over) == set(results)
    with pytest.raises(UsageError, match="nothing to segment"):
        find_scans([tmp_path])


def test_a_brain_that_was_cut_out_by_another_program_is_a_scan(tmp_path):
    [scan] = touch(tmp_path, "a_brain.nii.gz")
    assert find_scans([tmp_path]).scans == (scan,)


@pytest.mark.parametrize("name", ["", "*.nii", "nothing*"])
def test_nothing_found(tmp_path, name):
    touch(tmp_path, "a.txt")
    with pytest.raises(UsageError, match="no scan in it"):
        find_scans([tmp_path / name])


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(batch.InputError, match="Permission denied"):
        find_scans([tmp_path])


# What is done with each


@pytest.fixture
def segmenter() -> FakeSegmenter:
    return FakeSegmenter()


def write_scan(path: Path, *, brightest: int = 100) -> Path:
    """Voxels of 4 mm with a bright ball in the middle: a plausible fetal brain of 137 mL."""
    steps = np.arange(24) - 11.5
    distance = np.sqrt(sum(np.square(g) for g in np.meshgrid(steps, steps, steps, indexing="ij")))
    values = np.where(distance < 8, 60, 10) + np.where((distance > 7) & (distance < 7.5), 40, 0)
    values = np.minimum(values, brightest).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([4.0, 4, 4, 1])), path)
    return path


def plan(scan: Path, options: Options = Options()) -> OutputPaths:  # noqa: B008 (frozen)
    [paths] = plan_outputs([scan], None, dseg=options.save_dseg, report=options.report)
    return paths


def run(segmenter: Any, scan: Path, **options: Any) -> Outcome:
    asked = Options(**options)
    return process(segmenter, Reading(segmenter, scan, plan(scan, asked), asked), asked)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_scan(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    outcome = run(segmenter, scan, ga_weeks=27.0)
    assert (outcome.status, outcome.exit_code, outcome.resumed) == ("ok", 0, False)
    assert outcome.reasons == ()
    assert outcome.error == ""
    assert files(tmp_path) == ["a.nii.gz", "a_brain.nii.gz", "a_cgm.nii.gz", "a_trtseg.json"]
    written = json.loads((tmp_path / "a_trtseg.json").read_text("utf-8"))
    assert len(written.pop("seal")) == 64
    assert written == outcome.description
    assert outcome.id == written["id"] == written["inputs"]["scan"]["sha256"][:12]
    assert list(outcome.description["times_s"]) == ["read", "check", "write"]
    assert set(written["outputs"]) == {"cortex", "brain"}
    assert written["options"] == {
        "models": None,
        "device": "auto",
        "threads": None,
        "precision": None,
        "mask": None,
        "save_probabilities": False,
        "save_dseg": False,
        "reorient": False,
        "report": False,
        "ga_weeks": 27.0,
        "keep_names": False,
    }
    row = outcome.row(keep_names=False)
    assert (row["id"], row["status"]) == (outcome.id, "ok")


def test_all_that_can_be_asked_for(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    outcome = run(segmenter, scan, report=True, save_dseg=True)
    assert files(tmp_path) == [
        "a.nii.gz",
        "a_brain.nii.gz",
        "a_cgm.nii.gz",
        "a_dseg.nii.gz",
        "a_dseg.tsv",
        "a_report.html",
        "a_report.png",
        "a_trtseg.json",
    ]
    assert set(outcome.description["outputs"]) == {
        "cortex", "brain", "dseg", "lookup", "report", "picture",
    }  # fmt: skip
    assert "report" in outcome.description["times_s"]
    page = (tmp_path / "a_report.html").read_text("utf-8")
    assert outcome.description["outputs"]["cortex"]["sha256"] in page
    assert f"scan {outcome.id}" in page


def test_a_suspect_result_is_written(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz", brightest=40)
    outcome = run(segmenter, scan)
    assert (outcome.status, outcome.exit_code) == ("suspect", 6)
    assert "No brain was found: both maps are empty." in outcome.reasons
    assert "a_cgm.nii.gz" in files(tmp_path)
    assert outcome.row(keep_names=False)["status"] == "suspect"


def test_a_scan_that_fails(segmenter, tmp_path):
    scan = tmp_path / "a.nii.gz"
    scan.write_bytes(write_scan(tmp_path / "b.nii.gz").read_bytes()[:-9])
    outcome = run(segmenter, scan)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert outcome.error.startswith(f"{scan}: truncated")
    assert len(outcome.id) == 12
    assert outcome.reasons == ()
    assert outcome.row(keep_names=False) == {"id": outcome.id, "status": "failed with exit code 2"}
    assert files(tmp_path) == ["a.nii.gz", "b.nii.gz"]


@pytest.mark.parametrize(("given", "gone"), [("a.hdr", "a.img"), ("a.img", "a.hdr")])
@pytest.mark.parametrize("role", ["scan", "mask"])
def test_a_pair_that_is_not_whole(segmenter, tmp_path, given, gone, role):
    scan, log = write_scan(tmp_path / "b.nii"), tmp_path / "a.log"
    (tmp_path / given).write_bytes(scan.read_bytes()[:348])
    with log_to(log):
        if role == "scan":
            outcome = run(segmenter, tmp_path / given)
        else:
            outcome = run(segmenter, scan, mask=tmp_path / given)
    assert outcome.error.startswith(f"{tmp_path / gone}: No such file or directory; expected ")
    reason = ": No such file or directory" if role == "scan" else ""
    assert logged(log)[-1].endswith(f" failed, InputError, exit code 2{reason}")


def test_a_scan_that_is_not_there(segmenter, tmp_path):
    outcome = run(segmenter, tmp_path / "a.nii.gz")
    assert (outcome.status, outcome.exit_code, outcome.id) == ("failed", 2, "")
    assert "No such file" in outcome.error
    assert segmenter.runs == 0


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), 4), (EngineError("x"), 3), (OutputError("x"), 5)]
)
def test_errors_become_outcomes(segmenter, tmp_path, error, code):
    segmenter.error = error
    assert run(segmenter, write_scan(tmp_path / "a.nii.gz")).exit_code == code


def test_an_interrupt_is_none(segmenter, tmp_path):
    segmenter.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(segmenter, write_scan(tmp_path / "a.nii.gz"))


def test_a_scan_that_changes_meanwhile_gives_no_result(segmenter, tmp_path, monkeypatch):
    scan = write_scan(tmp_path / "a.nii.gz")
    segment = segmenter.segment

    def change(*args: Any, **options: Any) -> Segmentation:
        result = segment(*args, **options)
        write_scan(scan, brightest=99)
        return result

    monkeypatch.setattr(segmenter, "segment", change)
    outcome = run(segmenter, scan)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert "changed while it was segmented" in outcome.error
    assert files(tmp_path) == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("form", "value", "reason"),
    [(1, 7, "a constant image"), (0, 8, "a header without orientation")],
)
def test_an_error_of_the_voxels_or_the_header_names_the_scan(
    engines_root, tmp_path, form, value, reason
):
    scan, log = tmp_path / "doe.nii.gz", tmp_path / "a.log"
    values = np.full((8, 8, 8), 7, np.int16)
    values[0, 0, 0] = value
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.set_sform(np.eye(4), code=form)
    nibabel.save(image, scan)
    with log_to(log), Segmenter("demo", engines=engines_root, device="cpu") as real:
        outcome = run(real, scan, reorient=True)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert outcome.error.startswith(f"{scan}: {reason} (")
    assert outcome.error.count(str(scan)) == 1
    assert logged(log)[-1] == (
        f"ERROR scan {outcome.id}: failed, InputError, exit code 2: {reason}"
    )


# What an earlier run left

ALL = {"report": True, "save_dseg": True}
PLAIN = ["a.nii.gz", "a_brain.nii.gz", "a_cgm.nii.gz", "a_trtseg.json"]


def test_nothing_of_an_earlier_run_contradicts_the_sidecar(segmenter, tmp_path):
    scan, log = write_scan(tmp_path / "a.nii.gz"), tmp_path / "logs" / "a.log"
    run(segmenter, scan, **ALL)
    (tmp_path / "a_report.html").write_bytes(b"with my notes")
    before = files(tmp_path)
    with log_to(log):
        outcome = run(segmenter, scan, mask=tmp_path / "a_dseg.nii.gz")
    assert files(tmp_path) == sorted(
        [
            *PLAIN,
            "a_dseg.nii.gz",
            "a_report.html",
            "logs",
        ]  # a mask that was read, and an edited file
    )
    assert set(outcome.description["outputs"]) == {"brain", "cortex"}
    line = f"INFO scan {outcome.id}: removed of an earlier result: lookup, picture"
    assert line in logged(log)
    assert set(before) - set(files(tmp_path)) == {"a_dseg.tsv", "a_report.png"}


def test_a_scan_that_fails_leaves_what_was_there(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan, **ALL)
    before = files(tmp_path)
    segmenter.error = EngineError("x")
    assert run(segmenter, scan).status == "failed"
    assert files(tmp_path) == before


def struck(segmenter: Any, scan: Path, point: int, *, after: bool) -> int:
    """Run with an interrupt at one change of a name, or none; give how many changes it came to."""
    changes = 0

    def watched(change: Any) -> Any:
        def changed(*args: Any, **options: Any) -> None:
            nonlocal changes
            changes += 1
            now = changes == point
            if now and not after:
                raise KeyboardInterrupt
            try:
                change(*args, **options)
            finally:
                if now:
                    raise KeyboardInterrupt

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        with contextlib.suppress(KeyboardInterrupt):
            run(segmenter, scan)
    return changes


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_leaves_no_sidecar_of_files_that_are_gone(segmenter, tmp_path, after):
    first = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, first, **ALL)
    roles = plan(first, Options(**ALL)).results()

    def vouched(folder: Path) -> set[str] | None:
        """Roles an intact sidecar lists, each as it says; None for one that is not intact."""
        found = json.loads((folder / "a_trtseg.json").read_text("utf-8"))
        if found.pop("seal", None) != json_seal(found):
            return None
        for role, listed in found["outputs"].items():
            assert sha256_file(folder / roles[role].name) == listed["sha256"], role
        return set(found["outputs"])

    def there(folder: Path) -> set[str]:
        return {role for role, path in roles.items() if (folder / path.name).exists()}

    with tempfile.TemporaryDirectory() as name:
        whole = Path(shutil.copytree(tmp_path, Path(name) / "x"))
        total = struck(segmenter, whole / "a.nii.gz", 0, after=after)
        assert files(whole) == PLAIN
    assert total == 4 + 4 + 4  # maps and sidecars; their temporary files; what is removed
    states = []
    for point in range(1, total + 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(shutil.copytree(tmp_path, Path(name) / "x"))
            struck(segmenter, folder / "a.nii.gz", point, after=after)
            states.append(vouched(folder))
            if states[-1] is None:
                assert not run(segmenter, folder / "a.nii.gz", resume=True).resumed
                assert files(folder) == PLAIN
            assert vouched(folder) == there(folder)
    assert states[0] == set(roles)
    assert None in states
    assert states[-1] == {"brain", "cortex"}


# Reading ahead


def test_the_next_scan_is_read_meanwhile(segmenter, tmp_path):
    scans = [write_scan(tmp_path / f"{name}.nii.gz") for name in "abc"]
    readings = read_ahead(segmenter, [(scan, plan(scan)) for scan in scans], Options())
    first = next(readings)
    assert first.scan == scans[0]
    # The second is read by now or soon, though nobody asked for it; then it may go.
    second = readings.gi_frame.f_locals["following"]
    assert second.image().shape == (24, 24, 24)
    scans[1].unlink()
    assert next(readings) is second
    assert [one.scan for one in readings] == scans[2:]


def test_a_scan_is_ready_once_it_is_read(segmenter, tmp_path, monkeypatch):
    scan, go = write_scan(tmp_path / "a.nii.gz"), threading.Event()
    read = nifti.read_scan

    def slowly(path: Path) -> Any:
        go.wait()
        return read(path)

    monkeypatch.setattr(nifti, "read_scan", slowly)
    reading = Reading(segmenter, scan, plan(scan), Options())
    assert reading.ready() is None
    go.set()
    image = reading.image()
    assert reading.ready() is image


def test_the_segmenter_may_ask_for_the_scan_that_follows(segmenter, tmp_path, monkeypatch):
    scans = [write_scan(tmp_path / f"{name}.nii.gz") for name in "abc"]
    plans = [(scan, plan(scan)) for scan in scans]
    asked: list[Any] = []
    segment = segmenter.segment

    def watched(read: Any, *, following: Any, **options: Any) -> Segmentation:
        asked.append((read, following))
        return segment(read, **options)

    monkeypatch.setattr(segmenter, "segment", watched)
    for reading in read_ahead(segmenter, plans, Options()):
        assert process(segmenter, reading, Options()).status == "ok"
    reads, following = zip(*asked, strict=True)
    assert following[2] is None
    for read, ready in zip(reads[1:], following, strict=False):
        # The very array, by which the device knows what it holds already.
        assert ready().data is read().data


def test_no_scan_to_read(segmenter):
    assert list(read_ahead(segmenter, [], Options())) == []


def test_what_cannot_be_read_fails_where_it_is_waited_for(segmenter, tmp_path):
    scan = tmp_path / "a.nii.gz"
    scan.write_bytes(b"bad")
    reading = Reading(segmenter, scan, plan(scan), Options())
    assert len(reading.asked()["id"]) == 12
    assert reading.done() is None
    for _ in range(2):
        with pytest.raises(InputError, match="gzip"):
            reading.image()
        assert reading.ready() is None


def test_what_is_complete_is_not_read(segmenter, tmp_path, monkeypatch):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan)
    monkeypatch.setattr(nifti, "read_scan", None)
    options = Options(resume=True)
    reading = Reading(segmenter, scan, plan(scan), options)
    assert process(segmenter, reading, options).resumed
    assert reading.ready() is None


# What is done already


def test_what_is_complete_is_not_run_again(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz", brightest=40)
    first = run(segmenter, scan, report=True)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = run(segmenter, scan, report=True, resume=True, threads=1)
    assert segmenter.runs == 1
    assert again.resumed
    assert (again.status, again.exit_code) == ("suspect", 6)
    assert again.row(keep_names=False) == first.row(keep_names=False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_without_resume_everything_is_run_again(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan)
    assert not run(segmenter, scan).resumed
    assert segmenter.runs == 2


@pytest.mark.parametrize(
    "spoil", ["a_cgm.nii.gz", "a_brain.nii.gz", "a_report.html", "a_report.png", "a_trtseg.json"]
)
@pytest.mark.parametrize("gone", [False, True])
def test_what_is_not_intact_is_run_again(segmenter, tmp_path, spoil, gone):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan, report=True)
    content = (tmp_path / spoil).read_bytes()
    if gone:
        (tmp_path / spoil).unlink()
    else:
        (tmp_path / spoil).write_bytes(content[:-2])
    again = run(segmenter, scan, report=True, resume=True)
    assert not again.resumed
    assert segmenter.runs == 2
    assert run(segmenter, scan, report=True, resume=True).resumed


@pytest.mark.parametrize(
    "options", [{"report": True}, {"save_dseg": True}, {"ga_weeks": 24.0}, {"keep_names": True}]
)
def test_what_was_asked_otherwise_is_run_again(segmenter, tmp_path, options):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan)
    assert not run(segmenter, scan, resume=True, **options).resumed
    assert run(segmenter, scan, resume=True, **options).resumed


def test_another_scan_of_the_same_name_is_run(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan)
    write_scan(scan, brightest=90)
    assert not run(segmenter, scan, resume=True).resumed


def test_other_networks_run_again(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    run(segmenter, scan)
    other = FakeSegmenter()
    other.engines["cgm"].manifest["files"]["weights.npz"] = "3" * 64  # type: ignore[index]
    assert not run(other, scan, resume=True).resumed


@pytest.mark.parametrize("stage", ["save", "write_report", "write_sidecar"])
def test_a_run_that_was_cut_short_is_not_complete(segmenter, tmp_path, monkeypatch, stage):
    scan = write_scan(tmp_path / "a.nii.gz")

    def cut(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch, stage, cut)
        with pytest.raises(KeyboardInterrupt):
            run(segmenter, scan, report=True)
    assert not (tmp_path / "a_trtseg.json").exists()
    assert not run(segmenter, scan, report=True, resume=True).resumed
    assert run(segmenter, scan, report=True, resume=True).resumed


# The log


def logged(path: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in path.read_text("utf-8").splitlines()]


def test_the_log_of_a_scan(segmenter, tmp_path):
    scan = write_scan(tmp_path / "doe.nii.gz", brightest=40)
    path = tmp_path / "a.log"
    with log_to(path):
        name = run(segmenter, scan).id
        run(segmenter, scan, resume=True)
    lines = logged(path)
    assert lines[0] == f"INFO scan {name}: started"
    assert f"WARNING scan {name}: {EMPTY_BRAIN}" in lines
    assert f"WARNING scan {name}: suspect: No brain was found: both maps are empty." in lines
    assert lines[-2:] == [
        f"INFO scan {name}: suspect, brain 0.0 mL, cortex 0.0 mL",
        f"INFO scan {name}: complete, not run again",
    ]
    stages = [line.split(":")[0] for line in lines if line.endswith(" s")]
    assert stages == ["INFO check", "INFO write"]
    assert "doe" not in path.read_text("utf-8")


def test_the_log_of_scans_that_fail(segmenter, tmp_path):
    scan = tmp_path / "doe.nii.gz"
    scan.write_bytes(b"doe, jane")
    path = tmp_path / "a.log"
    with log_to(path):
        name = run(segmenter, scan).id
        run(segmenter, tmp_path / "gone.nii")
        segmenter.error = MemoryError()
        run(segmenter, scan)
        segmenter.error = EngineError(f"{tmp_path}: damaged")
        run(segmenter, scan)
    assert [line for line in logged(path) if line.startswith("ERROR")] == [
        f"ERROR scan {name}: failed, InputError, exit code 2: truncated or damaged gzip data",
        "ERROR scan unreadable: failed, InputError, exit code 2: No such file or directory",
        f"ERROR scan {name}: failed, MemoryError, exit code 4: out of memory",
        f"ERROR scan {name}: failed, EngineError, exit code 3",
    ]
    for word in ("doe", "gone", tmp_path.name):
        assert word not in path.read_text("utf-8")


def test_the_log_with_names(segmenter, tmp_path):
    scan = write_scan(tmp_path / "doe.nii.gz")
    with log_to(tmp_path / "a.log", names=True):
        name = run(segmenter, scan, keep_names=True).id
    assert logged(tmp_path / "a.log")[0] == f"DEBUG scan {name}: file name 'doe.nii.gz'"
    assert tmp_path.name not in (tmp_path / "a.log").read_text("utf-8")


def test_a_mask_is_read_and_its_name_is_not_kept(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    mask = write_scan(tmp_path / "doe_mask.nii.gz")
    outcome = run(segmenter, scan, mask=mask)
    assert outcome.description["options"]["mask"] == "given"
    assert (
        outcome.description["inputs"]["mask"]["sha256"]
        == outcome.description["inputs"]["scan"]["sha256"]
    )
    assert run(segmenter, scan, mask=mask, resume=True).resumed
    assert not run(segmenter, scan, resume=True).resumed


def test_no_row_holds_a_name_unless_asked(tmp_path):
    outcome = Outcome(tmp_path / "doe.nii", "", SimpleNamespace(), "failed", 2)  # type: ignore[arg-type]
    assert outcome.row(keep_names=False)["id"] == ""
    assert outcome.row(keep_names=True)["id"] == "doe.nii"
