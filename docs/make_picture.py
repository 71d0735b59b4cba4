"""Draw docs/demo.png: the middle slices of the demo scan's report, in radiological convention.

Run after ``make demo``: ``.venv/bin/python docs/make_picture.py``.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from trtseg.nifti import read_scan
from trtseg.report import draw

ROOT = Path(__file__).resolve().parent.parent
SCAN = ROOT / "trtseg" / "demo" / "phantom_23w.nii.gz"
RESULTS = ROOT / "demo-output"
GAP = 8


def main() -> None:
    """Cut the middle panel of each plane out of the report's picture, and set them in a row."""
    scan = read_scan(SCAN)
    brain, cortex = (
        read_scan(RESULTS / f"phantom_23w_{name}.nii.gz").data.astype(np.uint8)
        for name in ("brain", "cgm")
    )
    picture = draw(scan.data, brain, cortex, scan.geometry, title="")
    whole = Image.open(io.BytesIO(picture.png))
    cut = []
    for plane in ("Sagittal", "Coronal", "Axial"):
        row = [panel for panel in picture.panels if panel.plane == plane]
        one = row[len(row) // 2]
        right, bottom = one.left + one.width, one.top + one.height
        cut.append(whole.crop((one.left, one.top, right, bottom)))
    width = sum(one.width for one in cut) + GAP * (len(cut) + 1)
    height = max(one.height for one in cut) + 2 * GAP
    image = Image.new("RGB", (width, height))
    left = GAP
    for one in cut:
        image.paste(one, (left, (height - one.height) // 2))
        left += one.width + GAP
    image.save(ROOT / "docs" / "demo.png")


if __name__ == "__main__":
    main()
