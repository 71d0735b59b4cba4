"""Scan -> z-scored Scan, as the published system normalises it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.scan import Scan

#: Least standard deviation, as a part of the mean, that is contrast and not the rounding of the
#: mean: float64 carries 16 digits, and six of them are to be left for the z-scores.
_LEAST_CONTRAST = 1e-10


def z_score(scan: Scan) -> Scan:
    """Give the scan zero mean and unit variance over ALL its voxels, background included.

    Mean and population standard deviation are accumulated in float64 and each voxel is scaled in
    float64, then kept as float32 (source: the normalisation script published with the networks of
    Fetit et al. 2020, which stores the z-scores of a float scan as float32).

    Parameters
    ----------
    scan : Scan
        Raw voxels of any real dtype.

    Returns
    -------
    Scan
        The same geometry, data float32 in C order.

    Raises
    ------
    InputError
        A voxel is not finite, or all voxels are equal but for rounding, so that there is nothing
        to scale.
    """
    # Slabs along the first axis keep the float64 copies small beside the scan itself.
    data = scan.data
    mean = _mean(data, lambda slab: slab)
    variance = _mean(data, lambda slab: np.square(slab - mean))
    # Rounding of the mean can leave a constant image a variance just above 0.
    constant = bool(data.min() == data.max()) and bool(np.isfinite(mean))
    if not constant and not (np.isfinite(mean) and np.isfinite(variance)):
        raise InputError(
            "voxel values that are not finite, or too large to average",
            expected="a finite number in every voxel",
            action="repair or convert the scan again",
        )
    deviation = float(np.sqrt(variance))
    if constant or deviation <= _LEAST_CONTRAST * abs(mean):
        raise InputError(
            f"a constant image (every voxel is {mean:g})",
            expected="a scan with some contrast",
            action="check that the right file was given",
        )
    scores = np.empty(data.shape, np.float32)
    for index in range(data.shape[0]):
        scores[index] = (data[index].astype(np.float64) - mean) / deviation
    return replace(scan, data=scores)


def _mean(data: NDArray[Any], function: Any) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        sums = [np.sum(function(slab.astype(np.float64))) for slab in data]
        return float(np.sum(np.array(sums)) / data.size)
