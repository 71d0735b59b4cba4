"""Cost against scan size and against brain fraction, plotted to docs/scaling.png.

    python bench/scaling.py [--models demo] [--json FILE] [--plot docs/scaling.png]

Sizes: the phantom reflected to cubes of 80, 110, 140 and 170 voxels, both networks end to end.
Fractions: the cortex network alone on the phantom, in balls that cover 2 to 60 % of it. Needs the
bench extra.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from trtseg.backends import PRECISIONS
from trtseg.home import demo_folder
from trtseg.pipeline import Segmenter

SIDES = (80, 110, 140, 170)
FRACTIONS = (0.02, 0.1, 0.3, 0.6)


def cube(voxels: NDArray[Any], side: int) -> NDArray[Any]:
    """The phantom cut or reflected to a cube, its centre kept."""
    for axis, n in enumerate(voxels.shape):
        if n >= side:
            low = (n - side) // 2
            voxels = np.take(voxels, np.arange(low, low + side), axis=axis)
        else:
            pads = [(0, 0)] * 3
            pads[axis] = ((side - n) // 2, side - n - (side - n) // 2)
            voxels = np.pad(voxels, pads, "reflect")
    return voxels


def ball(shape: tuple[int, ...], fraction: float) -> NDArray[np.bool_]:
    """The central ball-like region (in units of each axis) that covers a fraction of the voxels."""
    grids = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    radius = sum(grid**2 for grid in grids)
    return np.asarray(radius <= np.quantile(radius, fraction))


def measure(models: str) -> dict[str, list[dict[str, float]]]:
    """Seconds of every case in every precision; each case runs once to warm up, then counts."""
    image = nibabel.load(demo_folder() / "phantom_23w.nii.gz")
    voxels = np.asanyarray(image.dataobj)
    rows: dict[str, list[dict[str, Any]]] = {"size": [], "fraction": []}
    for precision in PRECISIONS:
        with Segmenter(models, device="cpu", precision=precision) as segmenter:
            for side in SIDES:
                scan = cube(voxels, side)
                result = segmenter.segment(scan, image.affine)
                rows["size"].append(
                    {
                        "precision": precision,
                        "side": side,
                        "seconds": sum(result.times.values()),
                        "bdn": result.times["brain"],
                        "cgm": result.times["cortex"],
                        "brain_fraction": float(result.brain.mean()),
                    }
                )
                print(rows["size"][-1], flush=True)
            for fraction in FRACTIONS:
                mask = ball(voxels.shape, fraction)
                started = time.perf_counter()
                segmenter.segment(voxels, image.affine, mask=mask)
                rows["fraction"].append(
                    {
                        "precision": precision,
                        "fraction": fraction,
                        "seconds": time.perf_counter() - started,
                    }
                )
                print(rows["fraction"][-1], flush=True)
    return rows


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two panels, one line per precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for precision, style in zip(PRECISIONS, ("o-", "s--"), strict=True):
        sizes = [row for row in rows["size"] if row["precision"] == precision]
        left.plot(
            [row["side"] ** 3 / 1e6 for row in sizes],
            [row["seconds"] for row in sizes],
            style,
            label=precision,
        )
        parts = [row for row in rows["fraction"] if row["precision"] == precision]
        right.plot(
            [100 * row["fraction"] for row in parts],
            [row["seconds"] for row in parts],
            style,
            label=precision,
        )
    left.set(xlabel="scan size, million voxels", ylabel="seconds, both networks", ylim=(0, None))
    right.set(xlabel="brain, % of 1.3 million voxels", ylabel="seconds, cortex", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="demo")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, default=Path("docs/scaling.png"))
    options = parser.parse_args()
    rows = measure(options.models)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
