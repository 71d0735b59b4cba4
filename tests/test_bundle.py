"""The offline bundle: packed, installed and run where no network can be reached.

Packing fetches 200 MB of wheels, so this runs on demand: TRTSEG_SLOW=1 pytest tests/test_bundle.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import GOLDEN

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TRTSEG_SLOW" not in os.environ, reason="TRTSEG_SLOW is not set"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to cut the network"),
]


def run(*command: object, offline: bool = False, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        ["unshare", "-rn", *words] if offline else words,
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "HOME": environment.get("TRTSEG_HOME", "/"),
            **environment,
        },
    )
    assert done.returncode in (0, 6), done.stdout + done.stderr
    return done.stdout


def test_the_bundle_installs_and_segments_without_a_network(
    engines_root: Path, tmp_path: Path
) -> None:
    home = str(engines_root.parent)
    run(sys.executable, ROOT / "scripts" / "bundle", "--out", tmp_path, TRTSEG_HOME=home)
    (archive,) = tmp_path.glob("*.tar.gz")
    run("tar", "xf", archive, "-C", tmp_path)
    (install,) = tmp_path.glob("*/install.sh")
    box = tmp_path / "box"
    run("sh", install, box, offline=True, PYTHON=sys.executable)
    scan = GOLDEN / "chain_random11" / "scan.nii.gz"
    run(box / "trtseg", "segment", scan, "--models", "demo", "-o", tmp_path / "out", offline=True)
    assert (tmp_path / "out" / "scan_cgm.nii.gz").is_file()
    assert {path.name for path in (box / "home" / "engines").iterdir()} == {"demo", "random11"}
