"""The same scan gives the same labels, however often and in how many processes it is segmented."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.faults.counts import ROOT, count
from tests.golden import GOLDEN, read_voxels
from trtseg.errors import EXIT_OK, EXIT_SUSPECT
from trtseg.pipeline import Segmenter

SCAN = GOLDEN / "chain_random11" / "scan.nii.gz"


def digest(*maps: np.ndarray) -> str:
    return hashlib.sha256(b"".join(labels.tobytes() for labels in maps)).hexdigest()


def test_runs_in_one_process(engines_root: Path) -> None:
    digests = set()
    with Segmenter("random11", engines=engines_root, threads=2) as segmenter:
        for _ in range(count(2, 20)):
            result = segmenter.segment(SCAN, probabilities=True)
            assert 0 < result.cortex.sum() < result.brain.sum() < result.brain.size
            assert result.brain_probabilities is not None
            assert result.cortex_probabilities is not None
            digests.add(digest(result.brain, result.cortex))
    print(f"digests of the label maps: {digests}")
    assert len(digests) == 1


def test_runs_of_the_command_line(engines_root: Path, tmp_path: Path) -> None:
    digests = set()
    for number in range(count(2, 20)):
        out = tmp_path / str(number)
        arguments = ["segment", SCAN, "--models", "random11", "--engines", engines_root, "-o", out]
        done = subprocess.run(
            [sys.executable, "-c", "from trtseg.cli import main; main()", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
        )
        # Random weights find no plausible brain.
        assert done.returncode in (EXIT_OK, EXIT_SUSPECT), done.stderr
        digests.add(
            tuple(
                hashlib.sha256((out / f"scan_{name}.nii.gz").read_bytes()).hexdigest()
                for name in ("brain", "cgm")
            )
        )
        assert read_voxels(out / "scan_cgm.nii.gz").any()
    print(f"digests of the files: {digests}")
    assert len(digests) == 1
