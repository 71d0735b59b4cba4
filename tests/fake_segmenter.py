"""A double of `trtseg.Segmenter` that takes its labels from the voxels' values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trtseg.architecture import NETWORKS, PUBLISHED
from trtseg.engine import Engine
from trtseg.pipeline import EMPTY_BRAIN, Segmentation
from trtseg.scan import Scan


class FakeSegmenter:
    """Calls voxels over 50 brain and those over 75 cortex.

    Attributes
    ----------
    runs : int
        Scans it was given.
    error : BaseException or None
        What it raises instead of reading them.
    """

    models, device, precision, description, note = "fake", "cpu", "f32", "double", ""

    def __init__(self, *args: Any, **options: Any) -> None:
        manifest: dict[str, Any] = {
            "checkpoint": {"bdn.model.ckpt.index": "1" * 64},
            "files": {"weights.npz": "2" * 64},
            "versions": {"trtseg": "1"},
        }
        self.engines = {
            net: Engine(Path("secret/folder"), "fake", net, PUBLISHED, manifest) for net in NETWORKS
        }
        self.runs = 0
        self.error: BaseException | None = None

    def __enter__(self) -> FakeSegmenter:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def segment(
        self, read: Callable[[], Scan], *, ga_weeks: float | None, **options: Any
    ) -> Segmentation:
        self.runs += 1
        if self.error is not None:
            raise self.error
        scan = read()
        brain = (scan.data > 50).astype(np.uint8)
        cortex = (scan.data > 75).astype(np.uint8)
        return Segmentation(
            cortex=cortex,
            brain=brain,
            geometry=scan.geometry,
            brain_ml=int(brain.sum()) * scan.geometry.voxel_volume_ml,
            cortex_ml=int(cortex.sum()) * scan.geometry.voxel_volume_ml,
            times={"read": 0.25},
            cortex_probabilities=None,
            brain_probabilities=None,
            models=self.models,
            device=self.device,
            precision=self.precision,
            notice="fake weights",
            warnings=() if brain.any() else (EMPTY_BRAIN,),
            ga_weeks=ga_weeks,
            description=self.description,
        )
