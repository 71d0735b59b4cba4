"""The golden outputs of DeepMedic v0.7.0, and how to compare with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
#: Cases of one network, the cortex's of random11; the others hold both.
NETWORK_CASES = ("net_tiny", "net_small", "net_roi")
DEMO_SCAN = Path(__file__).parent.parent / "trtseg" / "demo" / "phantom_23w.nii.gz"


@dataclass(frozen=True)
class Golden:
    """One map of DeepMedic v0.7.0: labels, and the probability of class 1 times 65535."""

    labels: NDArray[np.uint8]
    scaled: NDArray[np.uint16]

    @property
    def undecided(self) -> NDArray[np.bool_]:
        """Voxels within 2.5e-5 of probability 0.5, where float32 rounding decides the label."""
        return np.abs(self.scaled.astype(np.float64) - 32767.5) <= 1.6

    def compare(
        self, labels: NDArray[np.uint8], probabilities: NDArray[np.float32], where: str
    ) -> None:
        """Assert parity: no label differs outside the band, probabilities agree to 1e-4."""
        band = self.undecided
        differing = int(((labels != self.labels) & ~band).sum())
        largest = float(np.abs(probabilities - self.scaled / 65535.0).max())
        print(f"{where}: {differing} labels differ, {band.sum()} excluded, p within {largest:.1e}")
        assert differing == 0
        assert largest < 1e-4


def read_voxels(path: Path) -> NDArray[np.generic]:
    """Voxels of a golden file."""
    return np.asanyarray(nibabel.load(path).dataobj)


def read_golden(case: str, name: str = "") -> Golden:
    """The golden maps called `name` ("brain_", "cgm_" or "") of a case."""
    folder = GOLDEN / case
    return Golden(
        labels=read_voxels(folder / f"{name}labels.nii.gz").astype(np.uint8),
        scaled=read_voxels(folder / f"{name}prob_u16.nii.gz").astype(np.uint16),
    )


def network_case(case: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The normalised scan of a case of one network, and its region, all of the scan if none."""
    folder = GOLDEN / case
    volume = np.ascontiguousarray(read_voxels(folder / "scan.nii.gz"), np.float32)
    if not (folder / "roi.nii.gz").exists():
        return volume, np.ones(volume.shape, bool)
    roi = read_voxels(folder / "roi.nii.gz") > 0.5
    assert 0 < roi.sum() < roi.size
    return volume, roi


def golden_scan(case: str) -> Path:
    """The scan of a case; chain_23w's is the phantom that ships with the package."""
    return DEMO_SCAN if case == "chain_23w" else GOLDEN / case / "scan.nii.gz"
