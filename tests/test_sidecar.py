from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtseg import qc, sidecar
from trtseg.architecture import PUBLISHED
from trtseg.engine import Engine
from trtseg.errors import InputError, OutputError, UsageError
from trtseg.files import atomic_write_json
from trtseg.scan import Geometry

#: SHA-256 of b"abc" and of nothing, as FIPS 180-2 gives them.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def result(**changes: Any) -> SimpleNamespace:
    brain = np.zeros((4, 5, 6), np.uint8)
    brain[1:3, 1:4, 1:5] = 1
    values = {
        "brain": brain,
        "brain_ml": 24.0,
        "cortex_ml": 6.0,
        "times": {"read": 0.25, "z-score": 0.5, "brain": 2.0, "cortex": 1.0},
        "models": "demo",
        "device": "cpu",
        "description": "cpu, 2 threads",
        "precision": "float32",
        "notice": "demo weights",
        "warnings": ("header without orientation",),
    }
    return SimpleNamespace(**{**values, **changes})


def engine(net: str) -> Engine:
    manifest = {
        "checkpoint": {
            f"secret_{net}.model.ckpt.index": f"{net}-index",
            f"secret_{net}.model.ckpt.data-00000-of-00001": f"{net}-data",
        },
        "files": {"weights.npz": f"{net}-weights", "network.onnx": f"{net}-graph"},
        "versions": {"trtseg": "1", "tensorflow": "2"},
    }
    return Engine(Path("secret/folder"), "demo", net, PUBLISHED, manifest)


def checks(brain: np.ndarray, ga_weeks: float | None = None) -> qc.Qc:
    geometry = Geometry(np.diag([10.0, 10.0, 10.0, 1.0]), {})
    return qc.assess(brain, brain, geometry, ga_weeks=ga_weeks)


def files(folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    scan, cortex, brain = (folder / name for name in ("doe_jane.nii.gz", "doe_c.nii", "doe_b.nii"))
    scan.write_bytes(b"abc")
    cortex.write_bytes(b"")
    brain.write_bytes(b"abc")
    return {"inputs": {"scan": scan}, "outputs": {"cortex": cortex, "brain": brain}}


def describe(folder: Path, **changes: Any) -> dict[str, Any]:
    one = changes.pop("result", result())
    arguments = {
        **files(folder),
        "engines": {net: engine(net) for net in ("bdn", "cgm")},
        "qc": checks(one.brain),
        "options": {"device": "auto", "mask": None, "save_probabilities": False, "threads": 2},
        **changes,
    }
    return sidecar.describe(one, **arguments)


# What it says


def test_a_description(tmp_path):
    found = describe(tmp_path)
    assert found["versions"].pop("python").count(".") == 2
    assert {"trtseg", "numpy", "scipy", "nibabel", "openvino", "pillow"} <= set(found["versions"])
    del found["versions"]
    assert found.pop("qc") == {
        "suspect": True,
        "checks": [check.to_dict() for check in checks(result().brain).checks],
    }
    networks = {
        net: {
            "checkpoint_sha256": {"index": f"{net}-index", "data-00000-of-00001": f"{net}-data"},
            "engine_sha256": {"weights.npz": f"{net}-weights", "network.onnx": f"{net}-graph"},
            "built_with": {"trtseg": "1", "tensorflow": "2"},
        }
        for net in ("bdn", "cgm")
    }
    assert found == {
        "schema": 1,
        "id": "ba7816bf8f01",
        "ran_on": "cpu, 2 threads",
        "inputs": {"scan": {"sha256": ABC, "of": "file"}},
        "outputs": {"cortex": {"sha256": NOTHING}, "brain": {"sha256": ABC}},
        "labels": {"cortex": {"1": "Cortical Gray Matter"}, "brain": {"1": "Brain"}},
        "shape": [4, 5, 6],
        "models": {"set": "demo", "networks": networks},
        "device": "cpu",
        "precision": "float32",
        "options": {"device": "auto", "mask": None, "save_probabilities": False, "threads": 2},
        "times_s": {"read": 0.25, "z-score": 0.5, "brain": 2.0, "cortex": 1.0},
        "volumes_ml": {"brain": 24.0, "cortex": 6.0},
        "suspect": True,  # a cortex as large as the brain
        "notice": "demo weights",
        "warnings": ["header without orientation"],
        "disclaimer": "Research software, not a medical device: validated for no clinical use. "
        "Look at every result.",
    }


def test_times_that_were_taken_later(tmp_path):
    found = describe(tmp_path, times={"read": 0.25, "write": 0.125})
    assert found["times_s"] == {"read": 0.25, "write": 0.125}


def test_the_precision(tmp_path):
    assert describe(tmp_path, result=result(precision="float16"))["precision"] == "float16"


def test_a_result_nothing_is_said_against(tmp_path):
    brain = np.zeros((9, 9, 9), np.uint8)
    brain[1:-1, 1:-1, 1:-1] = 1
    good = qc.Qc(tuple(c for c in checks(brain).checks if c.verdict != "suspect"))
    assert describe(tmp_path, qc=good)["suspect"] is False


# Names


def test_no_name_and_no_place(tmp_path):
    folder = tmp_path / "ward7"
    options = {"mask": folder / "doe_mask.nii", "out": str(folder), "names": "a\\b", "models": "m"}
    text = json.dumps(describe(folder, options=options))
    for word in ("doe", "ward7", "secret", tmp_path.name, "nii"):
        assert word not in text
    assert json.loads(text)["options"] == {
        "mask": "given",
        "out": "given",
        "names": "given",
        "models": "m",
    }


def test_names_where_they_are_asked_for(tmp_path):
    folder = tmp_path / "ward7"
    options = {"mask": folder / "doe_mask.nii"}
    found = describe(folder, options=options, keep_names=True)
    assert found["inputs"]["scan"]["name"] == "doe_jane.nii.gz"
    assert found["outputs"]["cortex"]["name"] == "doe_c.nii"
    assert found["options"] == {"mask": "doe_mask.nii"}
    assert found["id"] == "ba7816bf8f01"
    assert "ward7" not in json.dumps(found)
    assert sidecar.scan_name(found) == "doe_jane.nii.gz"


def test_a_scan_without_a_name(tmp_path):
    assert sidecar.scan_name(describe(tmp_path)) == "ba7816bf8f01"


# Digests


def test_the_digest_of_an_array(tmp_path):
    array = np.frombuffer(b"abc", np.uint8).reshape(1, 3, 1)
    found = describe(tmp_path, inputs={"scan": array}, keep_names=True)
    assert found["inputs"] == {"scan": {"sha256": ABC, "of": "array of uint8"}}
    assert sidecar.scan_name(found) == "ba7816bf8f01"


def test_the_digest_of_an_array_is_that_of_its_values(tmp_path):
    array = np.arange(24, dtype="<i2").reshape(2, 3, 4)
    digests = {
        describe(tmp_path, inputs={"scan": same})["inputs"]["scan"]["sha256"]
        for same in (array, array.astype(">i2"), np.asfortranarray(array))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("given", ["scan.hdr", "scan.img", "SCAN.HDR", "SCAN.IMG"])
def test_the_digest_of_a_pair_is_of_header_and_image(tmp_path, given):
    upper = given.isupper()
    (tmp_path / ("SCAN.HDR" if upper else "scan.hdr")).write_bytes(b"ab")
    (tmp_path / ("SCAN.IMG" if upper else "scan.img")).write_bytes(b"c")
    found = describe(tmp_path, inputs={"scan": tmp_path / given})
    assert found["inputs"]["scan"]["sha256"] == ABC


def test_a_scan_that_is_gone(tmp_path):
    with pytest.raises(InputError, match=r"gone\.nii: No such file"):
        describe(tmp_path, inputs={"scan": tmp_path / "gone.nii"})


def test_a_result_that_is_gone(tmp_path):
    with pytest.raises(OutputError, match=r"gone\.nii: No such file"):
        describe(tmp_path, outputs={"cortex": tmp_path / "gone.nii"})


@pytest.mark.parametrize("name", ["scan.nii", "scan.hdr"])
def test_a_scan_that_is_no_file(tmp_path, name):
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    with pytest.raises(InputError, match="not a regular file"):
        describe(tmp_path, inputs={"scan": tmp_path / name})
    assert sidecar.failed_row(tmp_path / name, 2)["id"] == ""
    with pytest.raises(InputError, match="a folder"):
        describe(tmp_path, inputs={"scan": tmp_path})


# In two steps


def request(folder: Path, **changes: Any) -> dict[str, Any]:
    arguments = {
        "inputs": {"scan": folder / "doe_jane.nii.gz"},
        "engines": {net: engine(net) for net in ("bdn", "cgm")},
        "models": "demo",
        "device": "cpu",
        "precision": "float32",
        "options": {"reorient": False, "ga_weeks": None, "keep_names": False, "threads": 2},
        **changes,
    }
    return sidecar.request(**arguments)


def done(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """The sidecar of a finished run, and the files it lists."""
    one = result()
    outputs = files(folder)["outputs"]
    asked = request(folder, **changes)
    found = sidecar.complete(asked, one, outputs=outputs, qc=checks(one.brain))
    path = folder / "doe_trtseg.json"
    sidecar.write_sidecar(path, found)
    return path, outputs


def without_seal(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert len(content.pop("seal")) == 64
    return content


def test_two_steps_say_the_same_as_one(tmp_path):
    one = result()
    outputs = files(tmp_path)["outputs"]
    options = {"mask": None}
    asked = request(tmp_path, options=options)
    assert sidecar.complete(
        asked, one, outputs=outputs, qc=checks(one.brain), times={"read": 1.0}
    ) == describe(tmp_path, options=options, times={"read": 1.0})


def test_more_outputs(tmp_path):
    found = describe(tmp_path)
    page = tmp_path / "doe_report.html"
    page.write_bytes(b"abc")
    more = sidecar.add_outputs(found, {"report": page}, {"report": 0.5}, keep_names=True)
    assert more["outputs"] == {
        **found["outputs"],
        "report": {"sha256": ABC, "name": "doe_report.html"},
    }
    assert more["times_s"] == {**found["times_s"], "report": 0.5}
    assert "report" not in found["outputs"]
    with pytest.raises(OutputError, match=r"gone\.html"):
        sidecar.add_outputs(found, {"report": tmp_path / "gone.html"}, {})


def test_what_is_complete_is_found(tmp_path):
    path, outputs = done(tmp_path)
    found = sidecar.find_complete(path, request(tmp_path), outputs)
    assert found == without_seal(path)
    fewer = {"cortex": outputs["cortex"]}
    assert sidecar.find_complete(path, request(tmp_path), fewer) == found


def test_what_does_not_matter(tmp_path):
    path, outputs = done(tmp_path, device="cuda:0")
    options = {"reorient": False, "ga_weeks": None, "keep_names": False, "threads": 1}
    asked = request(tmp_path, device="cuda:1", options=options)
    assert sidecar.find_complete(path, asked, outputs) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cuda:0"},
        {"precision": "bf16"},
        {"models": "other"},
        {"engines": {"bdn": engine("bdn"), "cgm": engine("bdn")}},
        {"options": {"reorient": True, "ga_weeks": None, "keep_names": False}},
        {"options": {"reorient": False, "ga_weeks": 23.0, "keep_names": False}},
        {"options": {"reorient": False, "ga_weeks": None, "keep_names": True}},
    ],
)
def test_what_was_made_otherwise_is_not_complete(tmp_path, change):
    path, outputs = done(tmp_path)
    assert sidecar.find_complete(path, request(tmp_path, **change), outputs) is None


def test_another_scan_mask_or_version_is_not_complete(tmp_path):
    path, outputs = done(tmp_path)
    asked = request(tmp_path)
    scan = tmp_path / "doe_jane.nii.gz"
    other = request(tmp_path, inputs={"scan": scan, "mask": scan})
    assert sidecar.find_complete(path, other, outputs) is None
    older = {**asked, "versions": {**asked["versions"], "trtseg": "0.0.1"}}
    assert sidecar.find_complete(path, older, outputs) is None
    scan.write_bytes(b"abd")
    changed = request(tmp_path, inputs={"scan": scan})
    assert changed["id"] != asked["id"]
    assert sidecar.find_complete(path, changed, outputs) is None


def test_a_result_that_is_damaged_gone_or_not_listed_is_not_complete(tmp_path):
    path, outputs = done(tmp_path)
    asked = request(tmp_path)
    more = {**outputs, "report": outputs["brain"]}
    assert sidecar.find_complete(path, asked, more) is None
    outputs["cortex"].write_bytes(b"x")
    assert sidecar.find_complete(path, asked, outputs) is None
    outputs["cortex"].unlink()
    assert sidecar.find_complete(path, asked, outputs) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"null", b'"text"', b"\xff", b"[" * 100_000, b'{"schema": 1}'],
)
def test_a_sidecar_that_is_none(tmp_path, content):
    path, outputs = done(tmp_path)
    path.write_bytes(content)
    assert sidecar.find_complete(path, request(tmp_path), outputs) is None
    path.unlink()
    assert sidecar.find_complete(path, request(tmp_path), outputs) is None


@pytest.mark.parametrize("key", ["outputs", "qc", "volumes_ml", "times_s", "suspect", "versions"])
@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_sidecar_of_another_shape(tmp_path, key, value):
    path, outputs = done(tmp_path)
    sidecar.write_sidecar(path, {**without_seal(path), key: value})
    assert sidecar.find_complete(path, request(tmp_path), outputs) is None


def test_one_changed_byte_of_the_sidecar_is_enough(tmp_path):
    path, outputs = done(tmp_path)
    asked = request(tmp_path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    # Every byte of the volumes, and one in ten of all others: values, names, white space.
    volumes = content.index(b'"volumes_ml"')
    for place in {*range(volumes, volumes + 60), *range(0, len(content), 10)}:
        for byte in {content[place] ^ (1 << int(random.integers(8))), 32, 9} - {content[place]}:
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            assert sidecar.find_complete(path, asked, outputs) is None, (place, byte)
    path.write_bytes(content)
    assert sidecar.find_complete(path, asked, outputs) is not None


@pytest.mark.parametrize("seal", [None, "", "0" * 64, 5, []])
def test_a_sidecar_without_its_seal_is_not_complete(tmp_path, seal):
    path, outputs = done(tmp_path)
    content = without_seal(path)
    if seal is not None:
        content["seal"] = seal
    atomic_write_json(path, content)
    assert sidecar.find_complete(path, request(tmp_path), outputs) is None


def test_the_seal_is_the_digest_of_the_rest(tmp_path):
    path = tmp_path / "a.json"
    sidecar.write_sidecar(path, {"b": [1, 2.5], "a": "\u00e9"})
    # printf '{"a": "\\u00e9", "b": [1, 2.5]}' | sha256sum
    digest = "ae69300a3a606a0379150ff56f75996a2ac96127dd27cdc7b144ac27cace0b37"
    assert path.read_bytes() == (
        b'{\n  "a": "\\u00e9",\n  "b": [\n    1,\n    2.5\n  ],\n  "seal": "'
        + digest.encode()
        + b'"\n}\n'
    )


# Files


def test_the_sidecar_is_what_was_described(tmp_path):
    found = describe(tmp_path)
    path = tmp_path / "scan_cgm.json"
    sidecar.write_sidecar(path, found)
    assert without_seal(path) == found
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("write", [sidecar.write_sidecar, sidecar.write_stats])
def test_a_folder_that_is_not_there(tmp_path, write):
    with pytest.raises(OutputError, match=r"gone"):
        write(tmp_path / "gone" / "file.json", {} if write is sidecar.write_sidecar else [])


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("brain", ["1\tBrain\tBRAIN\t#56b4e9\tn/a"]),
        ("cortex", ["1\tCortical Gray Matter\tCGM\t#e69f00\t8"]),
        (
            "dseg",
            [
                "1\tBrain other than Cortical Gray Matter\tBRAINOTHER\t#56b4e9\tn/a",
                "2\tCortical Gray Matter\tCGM\t#e69f00\t8",
            ],
        ),
    ],
)
def test_the_lookup_table(tmp_path, kind, rows):
    path = tmp_path / "scan_dseg.tsv"
    sidecar.write_lookup(path, kind)
    header = "index\tname\tabbreviation\tcolor\tmapping"
    assert path.read_text("utf-8") == "\n".join([header, *rows]) + "\n"


# Tables


def row(folder: Path, **changes: Any) -> dict[str, Any]:
    return sidecar.stats_row(describe(folder, **changes))


def test_a_row(tmp_path):
    found = row(tmp_path)
    assert re.fullmatch(r"[\w.]+", found.pop("trtseg"))
    assert found == {
        "id": "ba7816bf8f01",
        "status": "suspect",
        "brain_ml": 24.0,
        "cortex_ml": 6.0,
        "qc_brain_found": "ok",
        "qc_components": "not judged",
        "qc_largest_component": "ok",
        "qc_border": "ok",
        "qc_brain_volume": "ok",
        "qc_cortex_volume": "ok",
        "qc_cortex_fraction": "suspect",
        "qc_voxel_size": "not judged",
        "qc_voxel_shape": "ok",
        "time_read_s": 0.25,
        "time_z_score_s": 0.5,
        "time_brain_s": 2.0,
        "time_cortex_s": 1.0,
        "models": "demo",
        "device": "cpu",
        "precision": "float32",
        "notice": "demo weights",
    }


def test_a_row_with_the_name(tmp_path):
    assert row(tmp_path, keep_names=True)["id"] == "doe_jane.nii.gz"


def test_the_row_of_a_scan_that_failed(tmp_path):
    scan = files(tmp_path)["inputs"]["scan"]
    assert sidecar.failed_row(scan, 2) == {
        "id": "ba7816bf8f01",
        "status": "failed with exit code 2",
    }
    assert sidecar.failed_row(scan, 2, keep_names=True)["id"] == "doe_jane.nii.gz"
    assert sidecar.failed_row(tmp_path / "gone.nii", 2)["id"] == ""
    assert sidecar.failed_row(tmp_path / "gone.hdr", 2)["id"] == ""


def test_a_table_as_csv(tmp_path):
    path = tmp_path / "stats.CSV"
    rows = [
        {"id": "ba7816bf8f01", "status": "failed with exit code 2"},
        {"id": "e3b0c44298fc", "status": "ok", "brain_ml": 24.5, "notice": 'a, "b"'},
    ]
    sidecar.write_stats(path, rows)
    assert path.read_bytes() == (
        b"id,status,brain_ml,notice\r\n"
        b"ba7816bf8f01,failed with exit code 2,,\r\n"
        b'e3b0c44298fc,ok,24.5,"a, ""b"""\r\n'
    )


def test_a_table_as_json(tmp_path):
    path = tmp_path / "stats.json"
    rows = [{"id": "ba7816bf8f01", "brain_ml": 24.5}, {"id": "=1", "status": "ok"}]
    sidecar.write_stats(path, rows)
    assert json.loads(path.read_text("utf-8")) == rows


@pytest.mark.parametrize(("name", "content"), [("a.csv", b"\r\n"), ("a.json", b"[]\n")])
def test_a_table_of_nothing(tmp_path, name, content):
    sidecar.write_stats(tmp_path / name, [])
    assert (tmp_path / name).read_bytes() == content


def test_real_rows_in_a_table(tmp_path):
    path = tmp_path / "stats.csv"
    sidecar.write_stats(path, [row(tmp_path), sidecar.failed_row(tmp_path / "gone.nii", 3)])
    first, second = csv.DictReader(io.StringIO(path.read_text("utf-8"), newline=""))
    assert first["brain_ml"] == "24.0"
    assert first["qc_cortex_fraction"] == "suspect"
    assert second["status"] == "failed with exit code 3"
    assert second["brain_ml"] == ""


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_text_that_a_spreadsheet_would_run(tmp_path, text):
    path = tmp_path / "stats.csv"
    sidecar.write_stats(path, [{"id": text, "value": -1.5}])
    with path.open(newline="", encoding="utf-8") as stream:
        [found] = csv.DictReader(stream)
    assert found == {"id": "'" + text, "value": "-1.5"}


# Python 3.10 writes no NUL into a table, and no file name holds one.
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_text_survives_the_table(tmp_path, text):
    path = tmp_path / "stats.csv"
    sidecar.write_stats(path, [{"first": "1", "id": text, "last": "2"}])
    with path.open(newline="", encoding="utf-8") as stream:
        [found] = csv.DictReader(stream)
    assert list(found) == ["first", "id", "last"]
    assert found["id"] in (text, "'" + text)
    assert not found["id"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


@pytest.mark.parametrize("name", ["stats.csv", "stats.json"])
def test_a_name_that_is_no_text(tmp_path, name):
    scan = tmp_path / os.fsdecode(b"doe\xff.nii")
    sidecar.write_stats(tmp_path / name, [sidecar.failed_row(scan, 2, keep_names=True)])
    assert rb"doe\udcff.nii" in (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", ["stats", "stats.txt", "stats.csv.gz"])
def test_a_table_of_another_kind(tmp_path, name):
    for act in (sidecar.check_stats_path, lambda path: sidecar.write_stats(path, [])):
        with pytest.raises(UsageError, match=r"ending in \.csv or \.json"):
            act(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_table_in_a_folder_that_is_gone(tmp_path):
    with pytest.raises(OutputError, match="choose another --stats, or make room"):
        sidecar.write_stats(tmp_path / "gone" / "a.csv", [])


def test_a_table_that_is_a_folder(tmp_path):
    (tmp_path / "stats.csv").mkdir()
    with pytest.raises(UsageError, match="name of a file"):
        sidecar.check_stats_path(tmp_path / "stats.csv")
