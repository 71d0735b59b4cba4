"""Draw docs/demo.png: the demo scan with its brain and cortex outlines. Needs matplotlib.

Run after ``make demo``: ``.venv/bin/python docs/make_picture.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCAN = ROOT / "trtseg" / "demo" / "phantom_23w.nii.gz"
RESULTS = ROOT / "demo-output"


def main() -> None:
    """Draw three orthogonal slices through the middle of the brain."""
    scan = nibabel.as_closest_canonical(nibabel.load(SCAN)).get_fdata()
    brain, cortex = (
        np.asanyarray(
            nibabel.as_closest_canonical(
                nibabel.load(RESULTS / f"phantom_23w_{name}.nii.gz")
            ).dataobj
        )
        for name in ("brain", "cgm")
    )
    centre = [round(float(c)) for c in np.argwhere(brain).mean(axis=0)]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), facecolor="black")
    names = ("sagittal", "coronal", "axial")
    for axis, (panel, name) in enumerate(zip(axes, names, strict=True)):
        planes = [np.take(v, centre[axis], axis=axis).T for v in (scan, brain, cortex)]
        panel.imshow(planes[0], cmap="gray", origin="lower", vmax=np.percentile(scan, 99.5))
        panel.contour(planes[1], levels=[0.5], colors=["#35c8ff"], linewidths=0.9)
        panel.contour(planes[2], levels=[0.5], colors=["#ffb000"], linewidths=0.7)
        panel.set_title(name, color="white", fontsize=9)
        panel.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.9, wspace=0.02)
    figure.savefig(ROOT / "docs" / "demo.png", dpi=110)


if __name__ == "__main__":
    main()
