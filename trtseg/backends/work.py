"""How much the CPU form computes over a plan of tiles.

Counted are the multiply-adds that are executed, which is less than the published system executes,
since tiles share work; and the bytes that layers read and write of their activations, weights
excluded.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from trtseg import tiling
from trtseg.architecture import KERNEL, NetworkSpec, PathwaySpec
from trtseg.backends.base import Work
from trtseg.phases import axis_variants, cell_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.tiling import TilePlan


def executed(
    plan: TilePlan, tiles: NDArray[np.intp], *, block_voxels: int, value_bytes: int
) -> Work:
    """What one network of the CPU form executes.

    Parameters
    ----------
    plan : TilePlan
    tiles : ndarray of int
        Indices of the tiles that are computed, the others sharing an answer.
    block_voxels : int
        See `trtseg.tiling.group_tiles`.
    value_bytes : int
        Bytes of a value.
    """
    spec = plan.spec
    sub = [_pathway(pathway, [spec.input_size(pathway)] * 3) for pathway in spec.pathways[1:]]
    parts = [one * len(tiles) for one in sub]
    for block in tiling.group_tiles(plan, tiles, max_voxels=block_voxels):
        sides = block.region[:, 1] - block.region[:, 0] + spec.receptive_field - 1
        parts.append(_pathway(spec.pathways[0], sides.tolist()))
    boxes = plan.boxes[tiles] - plan.starts[tiles][:, :, None]
    parts += [_fc(spec, box) for box in boxes]
    total = sum(parts, start=Work(0, 0))
    return Work(total.multiply_adds, value_bytes * total.bytes)


def _pathway(pathway: PathwaySpec, sides: list[int]) -> Work:
    """Multiply-adds of a pathway, and the values its layers read and write."""
    multiply_adds = moved = 0
    for layer, maps in enumerate(pathway.feature_maps, 1):
        channels = pathway.in_channels(layer)
        moved += channels * int(np.prod(sides))
        sides = [side - KERNEL + 1 for side in sides]
        voxels = int(np.prod(sides))
        multiply_adds += voxels * KERNEL**3 * channels * maps
        moved += voxels * maps
    return Work(multiply_adds, moved)


def _fc(spec: NetworkSpec, box: NDArray[np.signedinteger]) -> Work:
    """Multiply-adds of the FC layers over a box, and the values they read and write."""
    lengths = box[:, 1] - box[:, 0]
    voxels = int(np.prod(lengths))
    first = spec.fc_maps[0]
    normal = spec.pathways[0].feature_maps[-1]
    multiply_adds = voxels * spec.fc_kernel**3 * normal * first
    moved = int(np.prod(lengths + spec.fc_kernel - 1)) * normal + voxels * first
    for pathway in spec.pathways[1:]:
        variants, _ = axis_variants(pathway.factor, spec.fc_kernel)
        taps = [max(one) - min(one) + 1 for one in variants]
        kernels = sum(int(np.prod(t)) for t in itertools.product(taps, repeat=3))
        ranges = [cell_range(low, high, pathway.factor) for low, high in box.tolist()]
        cells = int(np.prod([end - begin for begin, end in ranges]))
        multiply_adds += cells * kernels * pathway.feature_maps[-1] * first
        # Every variant's result on the cells, and a row of it for every voxel, added in place.
        moved += cells * (pathway.feature_maps[-1] + len(variants) ** 3 * first)
        moved += 2 * voxels * first
    for source, target in itertools.pairwise([*spec.fc_maps, 1]):
        multiply_adds += voxels * source * target
        moved += voxels * (source + target)
    return Work(multiply_adds, moved)
