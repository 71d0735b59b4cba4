"""What is launched with which parameters: the host's side of ``kernels.cu``.

Pure functions from addresses and plans to launches, so that the host build of the kernels is driven
by the very code that drives a GPU. Addresses are those of device memory, as whole numbers.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec, PathwaySpec
    from trtseg.tiling import TilePlan

#: Threads of a sum's first and second step. The first is enough to fill any GPU; both are fixed,
#: so that sums come out the same on all of them.
WIDE = 1 << 16
NARROW = 1 << 8

#: Bytes of a partial sum: a double, and a double that says whether voxels differ.
PARTIAL_BYTES = 16

#: Bytes of the memory that sums work in.
PARTIALS_BYTES = (WIDE + NARROW) * PARTIAL_BYTES

#: Voxel types that the kernels read as they are.
VOXEL_TYPES = (
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
)

#: Numbers of a tile in its table: start (3), then first and end voxel of its box per axis (6).
ROW = 9

#: What the kernels tell of a scan, one float64 each: mean and standard deviation of its voxels,
#: whether they differ (0: all are equal), whether a logit was not finite, and how many voxels are
#: brain and cortex.
SUMMARY = ("mean", "deviation", "varied", "not_finite", "brain", "cortex")
SUMMARY_BYTES = 8 * len(SUMMARY)


@dataclass(frozen=True)
class Launch:
    """One kernel to be run.

    Attributes
    ----------
    kernel : str
        Its name in ``kernels.cu``.
    threads : int
        Threads that have work to do.
    parameters : bytes
        The kernel's parameter struct.
    """

    kernel: str
    threads: int
    parameters: bytes


def summary_address(summary: int, name: str) -> int:
    """Address of one number of a summary that lies at `summary`."""
    return summary + 8 * SUMMARY.index(name)


def statistics(*, voxels: int, dtype: str, count: int, partials: int, summary: int) -> list[Launch]:
    """Mean and standard deviation of a scan, in two passes with float64 sums.

    Parameters
    ----------
    voxels : int
        Address of `count` voxels, dense, in any order.
    dtype : str
        One of `VOXEL_TYPES`.
    count : int
    partials : int
        Address of `PARTIALS_BYTES` of memory.
    summary : int
        Address of the summary; ``mean``, ``deviation`` and ``varied`` are written.
    """
    mean = summary_address(summary, "mean")
    varied = summary_address(summary, "varied")
    deviation = summary_address(summary, "deviation")
    return [
        _launch(f"sum_{dtype}", WIDE, voxels, count, 0, partials),
        *_finished("finish_mean", partials, divisor=count, result=mean, varied=varied),
        _launch(f"squares_{dtype}", WIDE, voxels, count, mean, partials),
        *_finished("finish_deviation", partials, divisor=count, result=deviation),
    ]


def count_labels(*, labels: int, count: int, partials: int, result: int) -> list[Launch]:
    """Number of the `count` labels that are not 0, as float64 at `result`."""
    return [
        _launch("count_labels", WIDE, labels, count, partials),
        *_finished("finish_mean", partials, divisor=1, result=result),
    ]


def normalise(
    *,
    voxels: int,
    dtype: str,
    strides: Sequence[int],
    padded: int,
    plan: TilePlan,
    summary: int | None,
) -> Launch:
    """z-scores of a scan, written into its reflect-padded volume.

    Parameters
    ----------
    voxels : int
    dtype : str
        One of `VOXEL_TYPES`.
    strides : sequence of int
        Per axis, in elements.
    padded : int
        Address of ``plan.padded_shape`` float32, C order.
    plan : TilePlan
        Its shape and padding.
    summary : int or None
        Address of the summary that holds mean and deviation; None to pad the voxels as they are.
    """
    scaling = (0, 0)
    if summary is not None:
        scaling = (summary_address(summary, "mean"), summary_address(summary, "deviation"))
    return _launch(
        f"normalise_{dtype}",
        math.prod(plan.padded_shape),
        voxels,
        *scaling,
        padded,
        *plan.shape,
        *strides,
        *(before for before, _ in plan.padding),
        *plan.padded_shape,
    )


def gather(
    *,
    padded: int,
    tiles: int,
    target: int,
    plan: TilePlan,
    pathway: PathwaySpec,
    first: int,
    batch: int,
) -> Launch:
    """Input of one pathway for the tiles from `first` on; beyond the last, that one is repeated.

    Parameters
    ----------
    padded : int
    tiles : int
        Address of the plan's `tile_table`.
    target : int
        Address of (batch, 1, side, side, side) float32.
    plan : TilePlan
    pathway : PathwaySpec
    first, batch : int
    """
    side = plan.spec.input_size(pathway)
    return _launch(
        "gather",
        batch * side**3,
        padded,
        tiles,
        target,
        first,
        len(plan),
        pathway.factor,
        side,
        plan.spec.receptive_field,
        *plan.padded_shape,
    )


def scatter(
    *,
    logit: int,
    tiles: int,
    labels: int,
    probabilities: int | None,
    summary: int,
    plan: TilePlan,
    first: int,
    batch: int,
) -> Launch:
    """Labels, and probabilities where wanted, of the boxes of the tiles from `first` on.

    Parameters
    ----------
    logit : int
        Address of (batch, out, out, out) float32, the class difference.
    tiles : int
    labels : int
        Address of the scan's labels, uint8, C order.
    probabilities : int or None
        Likewise, float32.
    summary : int
        Address of the summary; ``not_finite`` is set where a logit is not finite.
    plan : TilePlan
    first, batch : int
    """
    out = plan.spec.out
    return _launch(
        "scatter",
        batch * out**3,
        logit,
        tiles,
        labels,
        probabilities or 0,
        summary_address(summary, "not_finite"),
        first,
        len(plan),
        out,
        *plan.shape,
    )


def gate(*, mask: int, labels: int, probabilities: int | None, count: int) -> Launch:
    """Zero labels and probabilities where the mask is 0."""
    return _launch("gate", count, mask, labels, probabilities or 0)


def region(*, mask: int, tiles: int, planes: int, boxes: int, plan: TilePlan) -> list[Launch]:
    """The smallest box around the mask's voxels within each tile's box.

    Parameters
    ----------
    mask : int
        Address of uint8 of the plan's shape.
    tiles : int
        Address of the `tile_table` of `plan`, which covers the whole scan.
    planes : int
        Address of `planes_bytes(plan)` of memory.
    boxes : int
        Address of (tiles, 3, 2) int32: first and end voxel per axis, equal where there is none.
    plan : TilePlan
    """
    out = plan.spec.out
    return [
        _launch("roi_planes", len(plan) * out, mask, tiles, planes, out, *plan.shape),
        _launch("roi_boxes", len(plan), tiles, planes, boxes, out),
    ]


def planes_bytes(plan: TilePlan) -> int:
    """Bytes that `region` works in."""
    return 16 * len(plan) * plan.spec.out


def tile_table(plan: TilePlan) -> NDArray[np.int32]:
    """The plan as the kernels read it, shape (tiles, `ROW`), int32."""
    return np.concatenate([plan.starts, plan.boxes.reshape(-1, 6)], axis=1)


def planned(full: TilePlan, boxes: NDArray[np.int32]) -> TilePlan:
    """The plan of a region of interest, as `trtseg.tiling.plan_tiles` makes it.

    Parameters
    ----------
    full : TilePlan
        The plan without a region.
    boxes : ndarray, shape (tiles, 3, 2), int32
        What `region` found for its tiles.
    """
    wanted = boxes[:, 0, 0] < boxes[:, 0, 1]
    return replace(full, starts=full.starts[wanted], boxes=boxes[wanted])


def input_bytes(spec: NetworkSpec, batch: int) -> dict[str, int]:
    """Bytes of each tensor of an engine: its inputs by pathway, and ``logit``; all are float32."""
    sizes = {name: 4 * batch * side**3 for name, side in spec.input_sizes().items()}
    return {**sizes, "logit": 4 * batch * spec.out**3}


def readable(voxels: NDArray[Any]) -> NDArray[Any]:
    """Voxels in a type that the kernels read: as they are, or as float32 or float64.

    Only half precision and types wider than 64 bits are converted; the former loses nothing.
    """
    if not voxels.dtype.isnative:
        voxels = voxels.astype(voxels.dtype.newbyteorder("="))
    if voxels.dtype.name in VOXEL_TYPES:
        return voxels
    return voxels.astype(np.float32 if voxels.dtype.itemsize < 4 else np.float64)


def _finished(
    kernel: str, partials: int, *, divisor: int, result: int, varied: int = 0
) -> list[Launch]:
    sums = partials + WIDE * PARTIAL_BYTES
    return [
        _launch("reduce", NARROW, partials, WIDE, sums),
        _launch(kernel, 1, sums, NARROW, divisor, result, varied),
    ]


def _launch(kernel: str, threads: int, *values: int) -> Launch:
    """A launch whose parameter struct is `threads` and the rest, 8 bytes each."""
    return Launch(kernel, threads, struct.pack(f"={1 + len(values)}q", threads, *values))
