"""The command line: options, file names, exit codes, and what a user reads."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.golden import GOLDEN, read_voxels
from tests.test_chains import compiled
from trtseg import __version__, batch
from trtseg.build.tensorrt import PORTABLE
from trtseg.chains import load_engines, load_gpu_engines
from trtseg.cli import app, main
from trtseg.errors import OutputError
from trtseg.home import checkpoints_root
from trtseg.qc import Qc

CASE = GOLDEN / "chain_random11" / "scan.nii.gz"
NOTICE = "demo weights, synthetic, not for research or clinical use"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small_scan(path: Path, *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    image = nibabel.Nifti1Image(rng.integers(0, 900, (12, 14, 16)).astype(np.int16), np.eye(4))
    nibabel.save(image, path)
    return path


@pytest.fixture
def segment(engines_root: Path):
    def call(*arguments: object, models: str = "demo") -> Result:
        return run("segment", "--models", models, "--engines", engines_root, *arguments)

    return call


@pytest.fixture
def nothing_suspect(monkeypatch) -> None:
    """Scans small enough for a test hold no plausible brain."""
    monkeypatch.setattr("trtseg.pipeline.assess", lambda *_, **__: Qc(()))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("nothing_suspect")
def test_results_go_beside_the_scan(segment, tmp_path: Path) -> None:
    scan = shutil.copy(CASE, tmp_path / "fetus.nii.gz")
    done = segment(scan, models="random11")
    assert done.exit_code == 0, done.output
    assert files(tmp_path) == [
        "fetus.nii.gz",
        "fetus_brain.nii.gz",
        "fetus_cgm.nii.gz",
        "fetus_trtseg.json",
    ]
    assert "mL" in done.stdout
    for stage in ("read", "z-score", "brain", "cortex", "check", "write"):
        assert f"{stage} " in done.stdout
    brain = nibabel.load(tmp_path / "fetus_brain.nii.gz")
    assert np.array_equal(
        np.asanyarray(brain.dataobj), read_voxels(CASE.with_name("brain_labels.nii.gz"))
    )
    scan_image = nibabel.load(CASE)
    assert np.array_equal(brain.affine, scan_image.affine)
    assert brain.header.get_data_dtype() == np.uint8
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert brain.header[field] == scan_image.header[field]


@pytest.mark.usefixtures("nothing_suspect")
def test_probabilities_and_quiet(segment, tmp_path: Path) -> None:
    done = segment(CASE, "-o", tmp_path / "new" / "folder", "--save-probabilities", "-q")
    assert done.exit_code == 0, done.output
    assert done.output == ""
    assert files(tmp_path / "new" / "folder") == [
        "scan_brain.nii.gz",
        "scan_brain_prob.nii.gz",
        "scan_cgm.nii.gz",
        "scan_cgm_prob.nii.gz",
        "scan_trtseg.json",
    ]
    maps = nibabel.load(tmp_path / "new" / "folder" / "scan_cgm_prob.nii.gz")
    assert maps.header.get_data_dtype() == np.float32


def test_one_scan_may_name_its_cortex(segment, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii")
    (tmp_path / "out").mkdir()
    old = tmp_path / "out" / "cortex.nii"
    old.write_bytes(b"an older result")
    done = segment(scan, "-o", old)
    assert done.exit_code in (0, 6), done.output
    assert files(tmp_path / "out") == ["a_brain.nii.gz", "a_trtseg.json", "cortex.nii"]
    assert nibabel.load(old).shape == (12, 14, 16)


def test_demo_weights_say_so_on_screen_and_in_the_file(segment, tmp_path: Path) -> None:
    done = segment(small_scan(tmp_path / "a.nii.gz"))
    assert NOTICE in done.stdout
    assert nibabel.load(tmp_path / "a_cgm.nii.gz").header["descrip"].item().decode() == NOTICE


def test_several_scans_and_one_that_is_bad(segment, tmp_path: Path) -> None:
    good = small_scan(tmp_path / "good.nii.gz")
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(good.read_bytes()[:-20])
    other = small_scan(tmp_path / "other.nii.gz", seed=1)
    done = segment(bad, good, other)
    assert done.exit_code == 2
    assert str(bad) in done.stderr
    assert "Traceback" not in done.output
    assert "2 of 3 scans segmented" in done.stdout
    table = done.stdout[done.stdout.index("brain mL") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["bad.nii.gz", "good.nii.gz", "other.nii.gz"]
    assert "failed, exit code 2" in table[1]
    assert {"good_cgm.nii.gz", "other_cgm.nii.gz"} <= set(files(tmp_path))
    assert "bad_cgm.nii.gz" not in files(tmp_path)


def test_two_scans_for_one_name_are_refused_before_anything_runs(segment, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one, two = small_scan(tmp_path / "a.nii"), small_scan(tmp_path / "x" / "a.nii.gz")
    done = segment(one, two, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "would both write" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_empty_mask_is_suspect(segment, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii.gz")
    mask = tmp_path / "mask.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((12, 14, 16), np.uint8), np.eye(4)), mask)
    done = segment(scan, "--mask", mask, "-o", tmp_path / "out")
    assert done.exit_code == 6
    assert "suspect: a.nii.gz: No brain was found" in done.stderr
    assert "warning" not in done.stderr
    assert json.loads((tmp_path / "out" / "a_trtseg.json").read_text("utf-8"))["suspect"] is True
    for name in ("a_brain.nii.gz", "a_cgm.nii.gz"):
        assert not np.asanyarray(nibabel.load(tmp_path / "out" / name).dataobj).any()


def test_a_mask_is_written_as_the_brain(segment, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii.gz")
    mask = np.zeros((12, 14, 16), np.float64)
    mask[3:9, 3:9, 3:9] = 0.99999997
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")
    done = segment(scan, "--mask", tmp_path / "mask.nii.gz", "--save-probabilities")
    assert done.exit_code == 6, done.output  # no brain is that small
    brain = np.asanyarray(nibabel.load(tmp_path / "a_brain.nii.gz").dataobj)
    assert np.array_equal(brain, mask > 0.5)
    assert "a_brain_prob.nii.gz" not in files(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["missing.nii.gz"], 2, "missing.nii.gz"),
        (["a.nii.gz", "--device", "gpu"], 2, "auto, cpu, cuda or cuda:N"),
        (["a.nii.gz", "--device", "cuda"], 4, "--device cpu"),
        (["a.nii.gz", "--mask", "missing.nii.gz"], 2, "missing.nii.gz"),
        (["a.nii.gz", "b.nii.gz", "--mask", "a.nii.gz"], 2, "one scan"),
        (["a.nii.gz", "b.nii.gz", "-o", "out.nii.gz"], 2, "folder"),
        (["a.nii.gz", "-o", "a.nii.gz"], 2, "overwrite"),
        (["a.nii.gz", "-o", "a.nii.gz/below"], 5, "a.nii.gz"),
        (["a.nii.gz", "--models", "nothing"], 3, "nothing"),
        (["a.nii.gz", "--threads", "0"], 2, "threads"),
        (["a.nii.gz", "--ga", "12"], 2, "18 to 45 weeks"),
        (["a.nii.gz", "--ga", "1"], 2, "age of 1 week; expected 18 to 45 weeks"),
        (["a.nii.gz", "--ga", "nan"], 2, "--ga nan; expected 18 to 45 weeks"),
        (["a.nii.gz", "--ga", "27+7"], 2, "as 27.4 (decimal) or 27+3 (weeks+days"),
        (["a.nii.gz", "--ga", "27,4"], 2, "--ga 27,4; expected 18 to 45 weeks"),
        (["a.nii.gz", "--ga", "45+1"], 2, "age of 45.1429 weeks"),
        (["a.nii.gz", "--stats", "table.xls"], 2, ".csv or .json"),
        (["a.nii.gz", "--stats", "a_trtseg.json"], 2, "would both write"),
        (["a.nii.gz", "--stats", "a.nii.gz/below.csv"], 5, "choose another --stats"),
        ([""], 2, "an empty name after "),
        (["a.nii.gz", "--mask", ""], 2, "an empty name after --mask"),
        (["a.nii.gz", "--mask="], 2, "an empty name after --mask"),
        (["a.nii.gz", "-o", ""], 2, "an empty name after -o"),
        (["a.nii.gz", "--stats", ""], 2, "an empty name after --stats"),
        (["a.nii.gz", "--log-file", ""], 2, "an empty name after --log-file"),
        (["a.nii.gz", "--engines", ""], 2, "an empty name after --engines"),
        (["a.nii.gz", "--log-file", "a.nii.gz"], 2, "overwrite"),
        (["a.nii.gz", "--log-file", "c.nii.gz"], 2, "text file"),
        (["a.nii.gz", "--log-file", "."], 5, "directory"),
        (["*.mgz"], 2, "no scan in it"),
        ([".", "--mask", "a.nii.gz"], 2, "one scan"),
        ([], 2, "SCAN"),
    ],
)
def test_bad_arguments_end_in_one_line(
    segment, tmp_path: Path, monkeypatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    small_scan(tmp_path / "a.nii.gz")
    small_scan(tmp_path / "b.nii.gz", seed=1)
    done = segment(*arguments)
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", ""),
        ("bench", "a.nii.gz", "--json", ""),
        ("bids", "", "out", "participant"),
        ("bids", "in", "", "participant"),
        ("engines", "build", "--out", ""),
        ("engines", "list", "--engines="),
        ("models", "import", ""),
    ],
)
def test_an_empty_name_is_not_the_current_folder(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: an empty name after ")


@pytest.mark.parametrize(
    ("option", "name"),
    [("--stats", "file/s.csv"), ("-o", "file/below"), ("-o", "file/below/cortex.nii")],
)
def test_what_cannot_be_written_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch, option: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = run("segment", small_scan(tmp_path / "a.nii"), "--models", "none", option, name)
    assert done.exit_code == 5, done.output
    assert f"choose another {option}\n" in done.stderr


@pytest.mark.parametrize("name", ["file/x.json", "folder"])
def test_a_benchmark_that_cannot_be_written_does_not_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    done = run("bench", "a.nii", "--models", "none", "--json", tmp_path / name)
    assert done.exit_code == 5, done.output
    assert done.stderr.endswith("choose another --json\n")


def test_what_is_complete_needs_no_writing(segment, tmp_path: Path, monkeypatch) -> None:
    asked = (small_scan(tmp_path / "a.nii"), "-o", tmp_path / "out")
    assert segment(*asked).exit_code == 6

    def refuse(path, option):
        raise OutputError(f"{option} {path}")

    monkeypatch.setattr("trtseg.files.check_writable", refuse)
    assert segment(*asked).exit_code == 5
    assert segment(*asked, "--resume").exit_code == 6


def test_typer_asks_of_no_scan_whether_it_can_be_read(segment, tmp_path: Path, monkeypatch) -> None:
    scan = small_scan(tmp_path / "a.nii")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    done = segment(scan, "--mask", scan, "-o", tmp_path / "out")
    assert done.exit_code == 6, done.output


def test_weeks_and_days(segment, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii")
    for given, weeks in (("27+3", 27.428571428571427), ("27.4", 27.4), ("30", 30.0)):
        done = segment(scan, "--ga", given)
        assert done.exit_code == 6, done.output
        sidecar = json.loads((tmp_path / "a_trtseg.json").read_text("utf-8"))
        assert sidecar["options"]["ga_weeks"] == weeks


def test_no_published_weights(tmp_path: Path) -> None:
    done = run("segment", small_scan(tmp_path / "a.nii.gz"))
    assert done.exit_code == 3
    assert "trtseg models pull" in done.stderr
    assert "--models demo" in done.stderr


def test_nothing_built_and_no_build_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    done = run("segment", small_scan(tmp_path / "a.nii.gz"), "--models", "demo")
    assert done.exit_code == 3
    assert "pip install 'trtseg[build]'" in done.stderr
    assert "trtseg engines build --models demo" in done.stderr


def test_engines_commands(engines_root: Path, tmp_path: Path) -> None:
    listed = run("engines", "list", "--engines", engines_root)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["demo", "random11"]
    verified = run("engines", "verify", "--models", "demo", "--engines", engines_root)
    assert verified.exit_code == 0
    assert verified.stdout.count("intact") == 2
    shutil.copytree(engines_root / "demo", tmp_path / "demo")
    graph = tmp_path / "demo" / "bdn" / "normal.onnx"
    damaged = bytearray(graph.read_bytes())
    damaged[1000] ^= 1
    graph.write_bytes(damaged)
    refused = run("engines", "verify", "--models", "demo", "--engines", tmp_path)
    assert refused.exit_code == 3
    assert "normal.onnx" in refused.stderr
    assert "trtseg engines build --models demo" in refused.stderr
    assert "nothing is built" in run("engines", "list").stdout


def test_engines_verify_looks_at_all_that_is_built(engines_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "engines"
    shutil.copytree(engines_root, root)
    done = run("engines", "verify", "--engines", root)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"{net.upper()}: intact  {root / name / net}"
        for name in ("demo", "random11")
        for net in ("bdn", "cgm")
    ]
    (root / "demo" / "bdn" / "weights.npz").write_bytes(b"other")
    done = run("engines", "verify", "--engines", root)
    assert done.exit_code == 3
    assert "weights.npz" in done.stderr
    assert str(root / "random11" / "cgm") in done.stdout
    empty = run("engines", "verify", "--engines", tmp_path / "empty")
    assert empty.exit_code == 3
    assert "nothing is built" in empty.stderr


def test_models_commands(tmp_path: Path) -> None:
    listed = run("models", "list")
    assert NOTICE in listed.stdout
    assert "trtseg models pull" in listed.stdout
    verified = run("models", "verify")
    assert verified.exit_code == 0
    assert [line.split()[:2] for line in verified.stdout.splitlines()] == [["intact", "demo"]] * 4
    refused = run("models", "import", tmp_path)
    assert refused.exit_code == 3
    assert "bdn.model.ckpt.index" in refused.stderr
    imported = run(
        "models", "import", GOLDEN.parent / "checkpoints" / "random11",
        "--unpublished", "--name", "own",
    )  # fmt: skip
    assert imported.exit_code == 0, imported.output
    assert "trtseg engines build --models own" in imported.stdout
    assert run("models", "verify", "--models", "own").exit_code == 0
    index = checkpoints_root() / "own" / "cgm.model.ckpt.index"
    index.write_bytes(b"other")
    damaged = run("models", "verify")
    assert damaged.exit_code == 3
    [line] = [one for one in damaged.stdout.splitlines() if not one.startswith("intact  ")]
    assert line.startswith("DAMAGED  own  cgm.model.ckpt.index  SHA-256 d9298a10d1b07358")


def test_pull_without_a_network_says_how_to_go_on(tmp_path: Path) -> None:
    # Port 9 of the loopback is closed: nothing leaves the machine.
    done = run("models", "pull", "--from", "http://127.0.0.1:9/")
    assert done.exit_code == 3
    assert "trtseg models import" in done.stderr
    assert "Traceback" not in done.output


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"trtseg {__version__}"
    assert "segment" in run("--help").stdout
    assert "--mask" in run("segment", "--help").stdout


@pytest.mark.parametrize(
    "command",
    [(), ("segment",), ("bids",), ("bench",), ("info",), ("engines", "build"), ("models", "pull")],
)
def test_help_shows_no_value_after_a_flag(command: tuple[str, ...], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(*command, "--help").stdout
    assert "Show this message" in shown
    assert "bool" not in shown.lower()
    assert "SCAN..." not in shown


def test_help_names_the_gpus_that_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(run("engines", "build", "--help").stdout.split())
    assert f"default: {', '.join(PORTABLE)} and later." in shown


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["models", "list"],
        ["info", "--json"],
        [],
        ["--help"],
        ["segment", "--help"],
        ["bids", "-h"],
        ["engines"],
        ["models", "pull", "--help"],
    ],
)
def test_stdout_that_is_full(arguments: list[str]) -> None:
    code = "import sys, trtseg.cli; trtseg.cli.main(sys.argv[1:])"
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr == (
        "error: stdout: No space left on device; expected room for what is printed; send it "
        "elsewhere, or make room\n"
    )


def test_an_error_of_another_file_is_not_taken_for_one_of_stdout(monkeypatch) -> None:
    def gather(engines):
        raise PermissionError(13, "Permission denied", "file")

    monkeypatch.setattr("trtseg.info.gather", gather)
    done = run("info")
    assert isinstance(done.exception, PermissionError)
    assert "stdout" not in done.stderr


def test_a_reader_that_has_had_enough() -> None:
    code = "import sys, trtseg.cli; trtseg.cli.main(sys.argv[1:])"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, "models", "list"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == ""


def test_main_exits_with_the_commands_code() -> None:
    with pytest.raises(SystemExit) as done:
        main(["segment", "nowhere.nii.gz", "--device", "abacus"])
    assert done.value.code == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_ends_quickly_and_leaves_nothing(
    sent: signal.Signals, engines_root: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 900, (120, 120, 120)).astype(np.int16)
    scan = tmp_path / "big.nii"
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), scan)
    code = (
        "import trtseg.cli, trtseg.chains as p, sys\n"
        "run = p.HostChain._run\n"
        "def told(*a, **k):\n"
        "    print('running', flush=True)\n"
        "    return run(*a, **k)\n"
        "p.HostChain._run = told\n"
        "trtseg.cli.main(sys.argv[1:])"
    )
    arguments = ["segment", str(scan), "--models", "demo", "--engines", str(engines_root)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert files(tmp_path) == ["big.nii"]


# Batches


def test_folders_and_what_is_done_already(segment, tmp_path: Path) -> None:
    for seed, name in enumerate(["a.nii.gz", "b.nii"]):
        small_scan(tmp_path / name, seed=seed)
    first = segment(tmp_path, "--resume")
    assert first.exit_code == 6, first.output
    assert "2 of 2 scans segmented" in first.stdout
    assert "not run again" not in first.stdout
    (tmp_path / "b_cgm.nii.gz").unlink()
    small_scan(tmp_path / "c.nii", seed=2)
    again = segment(tmp_path / "*", "--resume", "--stats", tmp_path / "all.csv")
    assert again.exit_code == 6, again.output
    assert again.stdout.count("complete and intact: not run again") == 1
    assert "3 of 3 scans segmented" in again.stdout
    assert re.search(r"^a\.nii\.gz .* suspect, done before", again.stdout, re.M)
    assert "note: passed over as results of trtseg: a_brain.nii.gz, a_cgm.nii.gz" in again.stderr
    with (tmp_path / "all.csv").open(newline="", encoding="utf-8") as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["suspect"] * 3


def test_a_quiet_batch_prints_no_table(segment, tmp_path: Path) -> None:
    done = segment(small_scan(tmp_path / "a.nii"), small_scan(tmp_path / "b.nii", seed=1), "-q")
    assert done.stdout == ""
    assert "suspect: b.nii: " in done.stderr


@pytest.mark.usefixtures("nothing_suspect")
def test_report_table_and_log(segment, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii")
    bad = tmp_path / "bad.nii"
    bad.write_bytes(b"bad")
    out = tmp_path / "out"
    done = segment(
        scan, bad, "-o", out, "--report", "--save-dseg", "--ga", "23.5",
        "--stats", out / "new" / "all.json", "--log-file", out / "new" / "a.log",
    )  # fmt: skip
    assert done.exit_code == 2, done.output
    assert files(out) == [
        "a_brain.nii.gz",
        "a_cgm.nii.gz",
        "a_dseg.nii.gz",
        "a_dseg.tsv",
        "a_report.html",
        "a_report.png",
        "a_trtseg.json",
        "new",
    ]
    assert (out / "a_report.png").read_bytes().startswith(b"\x89PNG")
    sidecar = json.loads((out / "a_trtseg.json").read_text("utf-8"))
    assert sidecar["options"]["ga_weeks"] == 23.5
    rows = json.loads((out / "new" / "all.json").read_text("utf-8"))
    assert [row["status"] for row in rows] == ["ok", "failed with exit code 2"]
    assert rows[0]["id"] == sidecar["id"]
    log = (out / "new" / "a.log").read_text("utf-8").splitlines()
    assert f"INFO segment: trtseg {__version__}, python " in log[0]
    assert log[1].endswith("INFO models demo, device cpu, precision f32, scans: 2")
    assert f"INFO scan {sidecar['id']}: ok, brain " in "\n".join(log)
    assert f"ERROR scan {rows[1]['id']}: failed, InputError, exit code 2" in log[-1]
    assert all(str(path) in done.stdout for path in (out / "a_report.html", out / "a_dseg.tsv"))


def test_an_interrupted_batch_keeps_its_table(segment, tmp_path: Path, monkeypatch) -> None:
    process = batch.process

    def second_interrupted(segmenter, reading, *arguments, **options):
        if reading.scan.name == "b.nii":
            raise KeyboardInterrupt
        return process(segmenter, reading, *arguments, **options)

    monkeypatch.setattr(batch, "process", second_interrupted)
    scans = [small_scan(tmp_path / name) for name in ("a.nii", "b.nii")]
    table, log = tmp_path / "all.json", tmp_path / "a.log"
    done = segment(*scans, "--stats", table, "--log-file", log)
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert [row["status"] for row in json.loads(table.read_text("utf-8"))] == ["suspect"]
    assert log.read_text("utf-8").endswith("ERROR interrupted\n")


def test_a_batch_whose_output_is_full_keeps_its_table(segment, tmp_path: Path, monkeypatch) -> None:
    def full(text, *, err):
        if not err:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("typer.echo", full)
    scans = [small_scan(tmp_path / name) for name in ("a.nii", "b.nii")]
    table, log = tmp_path / "all.json", tmp_path / "a.log"
    done = segment(*scans, "--stats", table, "--log-file", log)
    assert done.exit_code == 5
    assert [row["status"] for row in json.loads(table.read_text("utf-8"))] == ["suspect"]
    assert log.read_text("utf-8").endswith("ERROR ended: OutputError, exit code 5\n")


def test_a_log_of_what_fails_before_the_first_scan(tmp_path: Path) -> None:
    scan, log = small_scan(tmp_path / "a.nii"), tmp_path / "a.log"
    assert run("segment", scan, "--log-file", log).exit_code == 3
    assert log.read_text("utf-8").endswith("ERROR ended: ModelError, exit code 3\n")


# Identity

HEADER, NAME, FOLDER = "canaryHead7", "canaryName7", "canaryPlace7"


def canary_scan(path: Path) -> Path:
    """A scan with a mark in each text of its header, in its name and in its folder's."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    image = nibabel.Nifti1Image(rng.integers(0, 900, (12, 14, 16)).astype(np.int16), np.eye(4))
    for field in ("descrip", "aux_file", "db_name", "intent_name", "data_type"):
        image.header[field] = HEADER[: image.header[field].dtype.itemsize].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", HEADER.encode()))
    nibabel.save(image, path)
    stored = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert stored.count(HEADER[:10].encode()) == 6
    return path


def written(*folders: Path) -> bytes:
    """All that is in the files of these folders, as it is and decompressed; not their names."""
    content = b""
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content += path.read_bytes()
        if path.suffix == ".gz":
            content += gzip.decompress(path.read_bytes())
    return content.lower()


def run_canary(segment, tmp_path: Path, *options: str) -> bytes:
    scan = canary_scan(tmp_path / FOLDER / f"{NAME}.nii.gz")
    mask = canary_scan(tmp_path / FOLDER / f"{NAME}_m.nii.gz")
    bad = scan.with_name(f"{NAME}_bad.nii.gz")
    bad.write_bytes(scan.read_bytes()[:-3])
    out, shared = tmp_path / FOLDER / "out", tmp_path / "shared"
    asked = ["--report", "--save-probabilities", "--save-dseg", "--log-file", shared / "a.log"]
    for place, scans in ((out, [scan, bad]), (out / "masked", [scan, "--mask", mask])):
        table = shared / f"{place.name}.csv"
        done = segment(*scans, "-o", place, "--stats", table, *asked, *options)
        assert done.exit_code in (2, 6), done.output
    names = {"csv", "gz", "html", "json", "log", "png", "tsv"}
    found = [path for folder in (out, shared) for path in folder.rglob("*") if path.is_file()]
    assert {path.name.rpartition(".")[2] for path in found} == names
    return written(out, shared)


def test_no_file_names_the_person_or_the_place(segment, tmp_path: Path) -> None:
    content = run_canary(segment, tmp_path)
    assert b"canary" not in content
    assert tmp_path.name.lower().encode() not in content


def test_only_the_name_where_it_is_asked_for(segment, tmp_path: Path) -> None:
    content = run_canary(segment, tmp_path, "--keep-names")
    assert NAME.lower().encode() + b".nii.gz" in content
    assert HEADER[:10].lower().encode() not in content
    assert FOLDER.lower().encode() not in content
    assert tmp_path.name.lower().encode() not in content


def test_no_name_in_the_log_of_a_build(engines_root: Path, tmp_path: Path, monkeypatch) -> None:
    def build(models, root, *, force, report):
        report("BDN: folding the weights")
        shutil.copytree(engines_root / "demo", root / "demo")
        return list(load_engines("demo", root).values())

    monkeypatch.setattr("trtseg.build.builder.build_models", build)
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path / FOLDER))
    log = tmp_path / "shared" / "a.log"
    done = run("engines", "build", "--models", "demo", "--log-file", log)
    assert done.exit_code == 0, done.output
    text = log.read_text("utf-8")
    for words in (f"engines build: trtseg {__version__}", "BDN: folding the weights",
                  "Building demo: ", "CGM: fc.onnx, SHA-256 "):  # fmt: skip
        assert words in text
    assert FOLDER not in text
    pulled = run("models", "pull", "--from", "http://127.0.0.1:9/", "--log-file", log)
    assert pulled.exit_code == 3
    text = log.read_text("utf-8")
    assert text.endswith("ERROR ended: DownloadError, exit code 3\n")
    assert FOLDER not in text
    assert "127.0.0.1" not in text


# What is here


def test_info(engines_root: Path) -> None:
    shown = run("info", "--engines", engines_root)
    assert shown.exit_code == 0, shown.output
    assert f"trtseg  {__version__}" in shown.stdout
    assert "trtseg models pull" in shown.stdout
    found = json.loads(run("info", "--json", "--engines", engines_root).stdout)
    assert found["versions"]["trtseg"] == __version__
    assert [one["name"] for one in found["engines"]] == ["demo", "random11"]


# GPUs


@pytest.fixture
def compiled_root(engines_root: Path, tmp_path: Path) -> Path:
    """An engines folder with the random networks compiled for a double of a GPU."""
    root = Path(shutil.copytree(engines_root, tmp_path / "engines"))
    compiled(root, "random11")
    return root


COMPILED = "tensorrt_rtx 9.8.7, plain, batches 1, 4, compute capability 8.6"


def test_engines_list_says_what_is_compiled(compiled_root: Path) -> None:
    done = run("engines", "list", "--engines", compiled_root)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"demo  {compiled_root / 'demo'}",
        f"random11  {compiled_root / 'random11'}",
        f"  BDN for GPUs: {COMPILED}",
        f"  CGM for GPUs: {COMPILED}",
    ]


def test_engines_list_says_what_is_wrong(compiled_root: Path) -> None:
    folder = compiled_root / "random11" / "cgm" / "cuda"
    (folder / "b4.engine").unlink()
    done = run("engines", "list", "--engines", compiled_root)
    assert done.exit_code == 0, done.output
    assert f"  CGM for GPUs: {folder / 'b4.engine'}: No such file or directory" in done.stdout
    weights = compiled_root / "demo" / "bdn" / "weights.npz"
    weights.write_bytes(b"other")
    done = run("engines", "list", "--engines", compiled_root)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"demo  {weights}: ")
    assert "trtseg engines build --models demo\n" in done.stdout.splitlines(keepends=True)[0]


def test_engines_verify_looks_at_what_is_compiled(compiled_root: Path) -> None:
    asked = ("engines", "verify", "--models", "random11", "--engines", compiled_root)
    done = run(*asked, "--device", "cpu")
    assert done.exit_code == 0, done.output
    folder = compiled_root / "random11" / "bdn"
    assert f"BDN: intact  {folder}\n" in done.stdout
    assert f"BDN: intact  {folder / 'cuda'} ({COMPILED})\n" in done.stdout
    assert "loaded: cpu, " in done.stdout
    path = folder / "cuda" / "ceiling.engine"
    path.write_bytes(b"other")
    done = run(*asked)
    assert done.exit_code == 3
    assert "damaged or foreign" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "auto"), "device 'auto'; expected cpu or cuda"),
        (("--batch", "4"), "--batch without --device cuda"),
        (("--force", "--form", "plain"), "--form, --force without --device cuda"),
        (("--device", "cuda", "--library", "cudnn"), "library 'cudnn'; expected tensorrt_rtx or"),
        (("--device", "cuda", "--form", "fast"), "graph form 'fast'; expected plain or"),
    ],
)
def test_engines_build_options_that_mean_nothing(engines_root, tmp_path, options, said) -> None:
    root = shutil.copytree(engines_root / "demo", tmp_path / "demo").parent
    done = run("engines", "build", "--models", "demo", "--out", root, *options)
    assert done.exit_code == 2, done.output
    assert said in done.stderr


def test_engines_build_for_gpus(compiled_root: Path, monkeypatch) -> None:
    asked: list[dict] = []

    def build(models, root, *, report, **options):
        report("BDN: compiling")
        asked.append({"models": models.name, "root": root, **options})
        engines = load_gpu_engines(load_engines("random11", root), root)
        for one in engines.values():
            one.manifest["float16_on_cpu"] = {"labels_equal": 0.99987}
        return list(engines.values())

    monkeypatch.setattr("trtseg.build.tensorrt.build_gpu_models", build)
    monkeypatch.setattr(
        "trtseg.build.builder.build_models",
        lambda models, root, *, force, report: list(load_engines("random11", root).values()),
    )
    done = run(
        "engines", "build", "--models", "demo", "--device", "cuda", "--out", compiled_root,
        "--batch", "2", "--batch", "8", "--form", "plain", "--compute-capability", "7.5", "--force",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert asked == [
        {
            "models": "demo",
            "root": compiled_root,
            "force": True,
            "form": "plain",
            "batches": (2, 8),
            "compute_capabilities": ("7.5",),
        }
    ]
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"Compiling demo: \d+\.\d s", lines[0])
    assert lines[1:3] == [
        f"BDN: {compiled_root / 'random11' / 'bdn' / 'cuda'}",
        f"  {COMPILED}; float16 rounding keeps 99.987% of a tile's labels",
    ]


def test_why_auto_is_the_cpu(segment, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("trtseg.cuda.device.DRIVER", "libnone.so.1")
    scan = small_scan(tmp_path / "a.nii")
    note = "note: running on the CPU: the NVIDIA driver is missing (libnone.so.1 cannot be loaded)"
    assert note in segment(scan).stderr.splitlines()
    for quieter in (("--quiet",), ("--device", "cpu"), ("--precision", "f32")):
        assert "note:" not in segment(scan, *quieter).stderr
    done = segment(scan, "--device", "cuda")
    assert done.exit_code == 4
    assert "driver is missing" in done.stderr


def test_nothing_is_compiled_unasked(segment, tmp_path: Path, monkeypatch) -> None:
    class Opened:
        device, precision = "cuda:0", "f16"

        def close(self) -> None:
            pass

    monkeypatch.setattr("trtseg.chains.open_gpu", lambda index: Opened())
    done = segment(small_scan(tmp_path / "a.nii"), "--device", "cuda")
    assert done.exit_code == 3
    assert "compile it: trtseg engines build --models demo --device cuda" in done.stderr
