"""Peak resident memory of `trtseg segment`, one process per case.

    python bench/memory.py [--cases small large] [--json FILE]

`large` is 512 x 512 x 512 int16, a phantom's head in a zero background; `middle` is
200 x 200 x 180 int16, the phantom reflected to that size, so that every tile is computed. Fails if
a case passes its limit (4 GiB and 1.2 GiB).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from trtseg.home import demo_folder

GIB = 1 << 30
#: Case to (shape, whether the surroundings are zero, limit in bytes).
CASES = {
    "small": ((105, 121, 102), False, 1.2 * GIB),
    "middle": ((200, 200, 180), False, 1.2 * GIB),
    "large": ((512, 512, 512), True, 4 * GIB),
}


def make_scan(path: Path, shape: tuple[int, int, int], zero: bool) -> None:
    """Write the phantom, padded on both sides to `shape`."""
    image = nibabel.load(demo_folder() / "phantom_23w.nii.gz")
    voxels = np.asanyarray(image.dataobj)
    pads = [((n - m) // 2, n - m - (n - m) // 2) for n, m in zip(shape, voxels.shape, strict=True)]
    voxels = np.pad(voxels, pads, "constant" if zero else "reflect")
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)


def measure(scan: Path, options: list[str]) -> tuple[int, float]:
    """Peak resident bytes and seconds of one run in a process of its own."""
    started = time.perf_counter()
    code = "import sys; from trtseg.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "segment", str(scan), "--models", "demo", "-q", *options]
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 6):
        sys.exit(f"trtseg segment ended with {process.returncode}")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def main() -> None:
    """Measure the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="further options of trtseg segment")
    chosen = parser.parse_args()
    rows = []
    print(f"{'case':<8} {'shape':<16} {'peak GiB':>9} {'limit':>6} {'seconds':>8}")
    for name in chosen.cases:
        shape, zero, limit = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            scan = Path(folder) / "scan.nii.gz"
            make_scan(scan, shape, zero)
            peak, seconds = measure(scan, chosen.options)
        rows.append({"case": name, "shape": shape, "peak_bytes": peak, "seconds": seconds})
        size = " x ".join(map(str, shape))
        print(
            f"{name:<8} {size:<16} {peak / GIB:9.2f} {limit / GIB:6.1f} {seconds:8.1f}", flush=True
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    over = [row["case"] for row in rows if row["peak_bytes"] > CASES[row["case"]][2]]
    if over:
        sys.exit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
