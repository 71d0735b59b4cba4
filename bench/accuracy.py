"""What float16 does to the labels: an engine's graph evaluated on the CPU with its rounding.

    python bench/accuracy.py [SCAN ...] [--models demo] [--form transposed8] [--float16-sums]
        [--json FILE]

Every scan goes through both networks twice: in float32 (OpenVINO), and with float16 rounding after
every operation (`trtseg.build.half`), the brain's float32 labels being the cortex's region in both.
Operations sum in float32; with ``--float16-sums`` every scan goes through a third time, the sums of
convolutions being rounded to float16 after every 8 products, as kernels may that sum in float16.
Without scans, the goldens of DeepMedic v0.7.0 are used, each with its own weights, and the float32
labels are checked against DeepMedic's on the way.

Prints one row per network, scan and kind of sums: labels equal in the mask, Dice, largest
difference in probability, and the largest activation against float16's range. The mask is the
brain's labels; for a scan that comes normalised, or without a brain, it is the whole scan. Fails if
trained weights (a model set not called ``random...``) miss 99.95 % or Dice 0.999. A tile takes a
second or two, and with float16 sums some three more.
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
from trtseg.backends.base import NetworkOutput
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.build.builder import build_models
from trtseg.build.forms import FORMS, default_form, form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.half import LARGEST_HALF, PRODUCTS, HalfNetwork
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

#: In what sums are kept, to the products after which they are rounded.
SUMS = {"float32": None, "float16": PRODUCTS}

#: What trained weights must reach.
LEAST_EQUAL, LEAST_DICE = 0.9995, 0.999

Mask = NDArray[np.bool_]


class Pair:
    """One network in float32 and with float16's rounding, for each of the kinds of sums."""

    def __init__(self, engine: Engine, form: str, sums: list[str]) -> None:
        weights = FrozenNetwork.from_bytes(engine.read(WEIGHTS), engine.spec)
        content = form_graph(weights, form, batch=1)
        self.engine, self.form = engine, form
        self.exact = OpenVINOBackend().load(engine)
        self.halves = {name: HalfNetwork(engine.spec, content, SUMS[name]) for name in sums}

    def compare(
        self, name: str, volume: NDArray[np.float32], roi: Mask | None, mask: Mask | None
    ) -> tuple[list[dict[str, Any]], NDArray[np.uint8]]:
        """Run all over the region; gives the figures inside the mask, and the float32 labels."""
        plan = tiling.plan_tiles(volume.shape, self.engine.spec, roi)
        exact = self.exact.run(volume, plan, probabilities=True)
        labels = exact.labels if roi is None else exact.labels * roi
        within = labels > 0 if mask is None else mask
        if not within.any():
            within = np.ones(volume.shape, bool)
        rows = []
        for sums, half in self.halves.items():
            half.largest = 0.0
            row = {
                "scan": name,
                "models": self.engine.models,
                "network": self.engine.net,
                "form": self.form,
                "sums": sums,
                "tiles": len(plan),
                **differences(exact, half.run(volume, plan, probabilities=True), roi, within),
                "largest_activation": half.largest,
                "of_float16_range": half.largest / LARGEST_HALF,
            }
            show(row)
            rows.append(row)
        return rows, labels


def differences(
    exact: NetworkOutput, rounded: NetworkOutput, roi: Mask | None, within: Mask
) -> dict[str, Any]:
    """How far one network's results are from another's inside a mask, and inside the region."""
    region = np.ones(within.shape, bool) if roi is None else roi
    where = within & region
    equal = exact.labels == rounded.labels
    first, second = ((one.labels > 0) & region for one in (exact, rounded))
    total = int(first.sum() + second.sum())
    assert exact.probabilities is not None
    assert rounded.probabilities is not None
    return {
        "voxels_in_mask": int(where.sum()),
        "equal_in_mask": float(equal[where].mean()),
        "differ_in_scan": int((~equal & region).sum()),
        "dice": 2 * int((first & second).sum()) / total if total else 1.0,
        "largest_probability_difference": float(
            np.abs(exact.probabilities - rounded.probabilities)[where].max()
        ),
    }


def run_chain(name: str, path: Path, pairs: dict[str, Pair]) -> list[dict[str, Any]]:
    """Both networks on a raw scan."""
    volume = z_score(read_scan(path)).data
    brain, labels = pairs["bdn"].compare(name, volume, None, None)
    roi = labels > 0
    if not roi.any():
        return brain
    cortex, _ = pairs["cgm"].compare(name, volume, roi, roi)
    return brain + cortex


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
    rows, labels = pairs["cgm"].compare(name, volume, roi, whole)
    golden = np.asanyarray(nibabel.load(folder / "labels.nii.gz").dataobj)
    print(f"{name}: {int((labels != golden).sum())} float32 labels differ from DeepMedic's")
    return rows


def open_pairs(models: str, root: Path, form: str, sums: list[str]) -> dict[str, Pair]:
    """Build a model set where it is not built, and open both of its networks."""
    build_models(find_models(models), root, force=False)
    return {net: Pair(load_engine(root, models, net), form, sums) for net in NETWORKS}


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    print(
        f"| {row['scan']} | {row['models']} {row['network'].upper()} | {row['sums']} | "
        f"{row['tiles']} | "
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
    parser.add_argument("--float16-sums", action="store_true", help="with these sums as well")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sums = list(SUMS) if options.float16_sums else ["float32"]
    print(
        "| scan | network | sums | tiles | labels equal in mask | differ in scan | Dice | "
        "largest difference of p | largest activation |\n" + "| --- " * 9 + "|"
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
                opened[models] = open_pairs(models, root, options.form, sums)
            pairs = opened[models]
            if isinstance(item, Path):
                rows += run_chain(item.name.split(".")[0], item, pairs)
            else:
                rows += run_golden(item, pairs)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2) + "\n")
    trained = [row for row in rows if not row["models"].startswith("random")]
    missed = [
        f"{row['scan']} {row['network']} ({row['sums']} sums)"
        for row in trained
        if row["equal_in_mask"] < LEAST_EQUAL or row["dice"] < LEAST_DICE
    ]
    if missed:
        sys.exit(f"below {LEAST_EQUAL:.2%} equal or Dice {LEAST_DICE}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
