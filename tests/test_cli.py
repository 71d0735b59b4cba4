"""The command line: options, file names, exit codes, and what a user reads."""

from __future__ import annotations

import gzip
import os
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
from trtseg import __version__
from trtseg.cli import app, main

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


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_results_go_beside_the_scan(segment, tmp_path: Path) -> None:
    scan = shutil.copy(CASE, tmp_path / "fetus.nii.gz")
    done = segment(scan, models="random11")
    assert done.exit_code == 0, done.output
    assert files(tmp_path) == ["fetus.nii.gz", "fetus_brain.nii.gz", "fetus_cgm.nii.gz"]
    assert "mL" in done.stdout
    for stage in ("read", "z-score", "brain", "cortex", "write"):
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


def test_probabilities_and_quiet(segment, tmp_path: Path) -> None:
    done = segment(CASE, "-o", tmp_path / "new" / "folder", "--save-probabilities", "-q")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert files(tmp_path / "new" / "folder") == [
        "scan_brain.nii.gz",
        "scan_brain_prob.nii.gz",
        "scan_cgm.nii.gz",
        "scan_cgm_prob.nii.gz",
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
    assert files(tmp_path / "out") == ["a_brain.nii.gz", "cortex.nii"]
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
    assert "no brain was found" in done.stderr
    for name in ("a_brain.nii.gz", "a_cgm.nii.gz"):
        assert not np.asanyarray(nibabel.load(tmp_path / "out" / name).dataobj).any()


def test_a_mask_is_written_as_the_brain(segment, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii.gz")
    mask = np.zeros((12, 14, 16), np.float64)
    mask[3:9, 3:9, 3:9] = 0.99999997
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")
    done = segment(scan, "--mask", tmp_path / "mask.nii.gz", "--save-probabilities")
    assert done.exit_code == 0, done.output
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


def test_models_commands(tmp_path: Path) -> None:
    listed = run("models", "list")
    assert NOTICE in listed.stdout
    assert "trtseg models pull" in listed.stdout
    verified = run("models", "verify")
    assert verified.exit_code == 0
    assert verified.stdout.count("demo") == 4
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


def test_main_exits_with_the_commands_code() -> None:
    with pytest.raises(SystemExit) as done:
        main(["segment", "nowhere.nii.gz", "--device", "abacus"])
    assert done.value.code == 2


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_ends_quickly_and_leaves_nothing(engines_root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 900, (120, 120, 120)).astype(np.int16)
    scan = tmp_path / "big.nii"
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), scan)
    code = (
        "import trtseg.cli, trtseg.pipeline as p, sys\n"
        "run = p.Segmenter._run\n"
        "def told(*a, **k):\n"
        "    print('running', flush=True)\n"
        "    return run(*a, **k)\n"
        "p.Segmenter._run = told\n"
        "trtseg.cli.main(sys.argv[1:])"
    )
    arguments = ["segment", str(scan), "--models", "demo", "--engines", str(engines_root)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert files(tmp_path) == ["big.nii"]


def test_results_hold_no_name_of_the_scan(segment, tmp_path: Path) -> None:
    done = segment(small_scan(tmp_path / "canary-jane-doe.nii.gz"))
    assert done.exit_code in (0, 6)
    for path in tmp_path.glob("*_cgm.nii.gz"):
        content = path.read_bytes()
        assert b"jane" not in content
        assert b"jane" not in gzip.decompress(content)
