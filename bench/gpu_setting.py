"""What the parts of ``gpu_check.py`` share: the scan, its tiles, and the networks on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtseg import tiling
from trtseg.architecture import NETWORKS, PUBLISHED, NetworkSpec
from trtseg.backends.tensorrt_library import Library, open_library
from trtseg.chains import load_engines, load_gpu_engines
from trtseg.engine import Engine
from trtseg.errors import EngineError
from trtseg.gpu_engine import GpuEngine
from trtseg.home import demo_folder, engines_root
from trtseg.modelconfig import read_config
from trtseg.models import find_models
from trtseg.nifti import read_scan

SHAPE = (200, 200, 180)
FRACTION = 0.3


@dataclass(frozen=True)
class Setting:
    """What is measured, and how.

    Attributes
    ----------
    models : str
    library : str or None
        Which one was asked for.
    capability : str
        Compute capability of the GPU, such as ``8.9``.
    batch : int
        Tiles of a batch, where that is free to choose.
    runs : int
        Warm runs.
    limit : float
        Seconds that a part may take.
    folder : Path
        For what one part leaves to another; only its owner can write it.
    """

    models: str
    library: str | None
    capability: str
    batch: int
    runs: int
    limit: float
    folder: Path

    def specs(self) -> dict[str, NetworkSpec]:
        """Architectures by network; nothing need be built."""
        models = find_models(self.models)
        configs = {net: models.config(net) for net in NETWORKS}
        return {
            net: PUBLISHED if config is None else read_config(config)
            for net, config in configs.items()
        }

    def tiles(self) -> dict[str, int]:
        """Tiles that BDN runs over the scan, and CGM inside the box."""
        specs = self.specs()
        return {
            "bdn": len(tiling.plan_tiles(SHAPE, specs["bdn"])),
            "cgm": len(tiling.plan_tiles(SHAPE, specs["cgm"], box(SHAPE, FRACTION))),
        }

    def frozen(self) -> dict[str, Engine]:
        """The built networks."""
        return load_engines(self.models, engines_root())

    def compiled(self) -> dict[str, GpuEngine]:
        """The compiled networks."""
        return load_gpu_engines(self.frozen(), engines_root())

    def opened_library(self) -> Library:
        """The library asked for, else what compiled the networks, else the first installed."""
        return open_library(self.library or self._compiled_by())

    def _compiled_by(self) -> str | None:
        try:
            return str(self.compiled()["bdn"].manifest["library"]["name"])
        except EngineError:
            return None


def phantom() -> NDArray[Any]:
    """Voxels of the bundled scan on the grid that is measured, in Fortran order like a file's."""
    return fitted(read_scan(demo_folder() / "phantom_23w.nii.gz").data, SHAPE)


def fitted(voxels: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    """A scan on a larger grid, reflected at its borders."""
    pads = [((n - m) // 2, n - m - (n - m) // 2) for n, m in zip(shape, voxels.shape, strict=True)]
    return np.asfortranarray(np.pad(voxels, pads, "reflect"))


def box(shape: tuple[int, int, int], fraction: float) -> NDArray[np.bool_]:
    """A centred box of about that part of the volume."""
    mask = np.zeros(shape, bool)
    sides = [round(n * fraction ** (1 / 3)) for n in shape]
    where = tuple(
        slice((n - side) // 2, (n - side) // 2 + side) for n, side in zip(shape, sides, strict=True)
    )
    mask[where] = True
    return mask
