"""What float16 does to the labels: an engine's graph evaluated on the CPU with its rounding.

    python bench/accuracy.py [SCAN ...] [--models demo] [--form transposed8] [--json FILE]

Every scan goes through both networks twice: in float32 (OpenVINO), and with float16 rounding after
every operation (`trtseg.build.half`), the brain's float32 labels being the cortex's region in both.
Without scans, the goldens of DeepMedic v0.7.0 are used, each with its own weights, and the float32
labels are checked against DeepMedic's on the way.

Prints one row per network and scan: labels equal in the mask, Dice, largest difference in
probability, and the largest activation against float16's range. The mask is the brain's labels; for
a scan that comes normalised, or without a brain, it is the whole scan. Fails if trained weights (a
model set not called ``random...``) miss 99.95 % or Dice 0.999. A tile takes a second or two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtseg import tiling
from trtseg.architecture import NETWORKS, PUBLISHED
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.build.builder import build_models
from trtseg.build.forms import FORMS, default_form, form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.half import LARGEST_HALF, HalfNetwork
from trtseg.engine import WEIGHTS, Engine, load_engine
from trtseg.modelinstall import import_folder
from trtseg.models import find_models
from trtseg.nifti import read_scan
from trtseg.normalise import z_score

DATA = Path(__file__).parent.parent / "tests" / "data"
GOLDEN = DATA / "golden"
#: Golden to (model set, whether both networks run on a raw scan).
GOLDENS = {
    "chain_crop": ("demo", True),
    "chain_random11": ("random11", True),
    "net_tiny": ("random11", False),
    "net_small": ("random11", False),
    "net_roi": ("random11", False),
}

#: What trained weights must reach.
LEAST_EQUAL, LEAST_DICE = 0.9995, 0.999

Mask = NDArray[np.bool_]


class Pair:
    """One network in float32 and with float16's rounding."""

    def __init__(self, engine: Engine, form: str) -> None:
        weights = FrozenNetwork.from_bytes(engine.read(WEIGHTS), engine.spec)
        self.engine, self.form = engine, form
        self.exact = OpenVINOBackend().load(engine)
        self.half = HalfNetwork(engine.spec, form_graph(weights, form, batch=1))

    def compare(
        self, volume: NDArray[np.float32], roi: Mask | None, mask: Mask | None
    ) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Run both over the region; gives the figures inside the mask, and the float32 labels."""
        plan = tiling.plan_tiles(volume.shape, self.engine.spec, roi)
        self.half.largest = 0.0
        exact = self.exact.run(volume, plan, probabilities=True)
        rounded = self.half.run(volume, plan, probabilities=True)
        labels = exact.labels if roi is None else exact.labels * roi
        within = labels > 0 if mask is None else mask
        if not within.any():
            within = np.ones(volume.shape, bool)
        where = within if roi is None else within & roi
        equal = exact.labels == rounded.labels
        first, second = (
            (one.labels > 0) & (True if roi is None else roi) for one in (exact, rounded)
        )
        total = int(first.sum() + second.sum())
        assert exact.probabilities is not None
        assert rounded.probabilities is not None
        return {
            "models": self.engine.models,
            "network": self.engine.net,
            "form": self.form,
            "tiles": len(plan),
            "voxels_in_mask": int(where.sum()),
            "equal_in_mask": float(equal[where].mean()),
            "differ_in_scan": int((~equal & (True if roi is None else roi)).sum()),
            "dice": 2 * int((first & second).sum()) / total if total else 1.0,
            "largest_probability_difference": float(
                np.abs(exact.probabilities - rounded.probabilities)[where].max()
            ),
            "largest_activation": self.half.largest,
            "of_float16_range": self.half.largest / LARGEST_HALF,
        }, labels


def run_chain(name: str, path: Path, pairs: dict[str, Pair]) -> list[dict[str, Any]]:
    """Both networks on a raw scan."""
    volume = z_score(read_scan(path)).data
    brain, labels = pairs["bdn"].compare(volume, None, None)
    roi = labels > 0
    if not roi.any():
        return [{"scan": name, **brain}]
    cortex, _ = pairs["cgm"].compare(volume, roi, roi)
    return [{"scan": name, **brain}, {"scan": name, **cortex}]


def run_golden(name: str, pairs: dict[str, Pair]) -> list[dict[str, Any]]:
    """A golden; its labels must be what float32 gives."""
    import nibabel

    folder = GOLDEN / name
    if GOLDENS[name][1]:
        return run_chain(name, folder / "scan.nii.gz", pairs)
    volume = np.ascontiguousarray(nibabel.load(folder / "scan.nii.gz").dataobj, np.float32)
    roi = None
    if (folder / "roi.nii.gz").exists():
        roi = np.asanyarray(nibabel.load(folder / "roi.nii.gz").dataobj) > 0.5
    whole = np.ones(volume.shape, bool)
    row, labels = pairs["cgm"].compare(volume, roi, whole)
    golden = np.asanyarray(nibabel.load(folder / "labels.nii.gz").dataobj)
    print(f"{name}: {int((labels != golden).sum())} float32 labels differ from DeepMedic's")
    return [{"scan": name, **row}]


def open_pairs(models: str, root: Path, form: str) -> dict[str, Pair]:
    """Build a model set where it is not built, and open both of its networks."""
    build_models(find_models(models), root, force=False)
    return {net: Pair(load_engine(root, models, net), form) for net in NETWORKS}


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    print(
        f"| {row['scan']} | {row['models']} {row['network'].upper()} | {row['tiles']} | "
        f"{row['equal_in_mask']:.4%} | {row['differ_in_scan']} | {row['dice']:.6f} | "
        f"{row['largest_probability_difference']:.1e} | {row['largest_activation']:.1f} "
        f"({row['of_float16_range']:.2%}) |",
        flush=True,
    )


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", type=Path, nargs="*", metavar="SCAN")
    parser.add_argument("--models", default="demo", help="model set for the scans given")
    parser.add_argument("--form", choices=FORMS, default=default_form(PUBLISHED))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(
        "| scan | network | tiles | labels equal in mask | differ in scan | Dice | "
        "largest difference of p | largest activation |\n" + "| --- " * 8 + "|"
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "engines"
        if not options.scans:
            os.environ["TRTSEG_HOME"] = name  # for the random set alone
            import_folder(DATA / "checkpoints" / "random11", unpublished=True, name="random11")
        opened: dict[str, dict[str, Pair]] = {}
        for item in options.scans or GOLDENS:
            models = options.models if isinstance(item, Path) else GOLDENS[item][0]
            if models not in opened:
                opened[models] = open_pairs(models, root, options.form)
            pairs = opened[models]
            if isinstance(item, Path):
                found = run_chain(item.name.split(".")[0], item, pairs)
            else:
                found = run_golden(item, pairs)
            for row in found:
                show(row)
            rows += found
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2) + "\n")
    trained = [row for row in rows if not row["models"].startswith("random")]
    missed = [
        f"{row['scan']} {row['network']}"
        for row in trained
        if row["equal_in_mask"] < LEAST_EQUAL or row["dice"] < LEAST_DICE
    ]
    if missed:
        sys.exit(f"below {LEAST_EQUAL:.2%} equal or Dice {LEAST_DICE}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
