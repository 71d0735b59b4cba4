"""Multiply-adds that trtseg's CPU form executes, counted from the plan it follows."""

from __future__ import annotations

import itertools

import numpy as np

from trtseg import tiling
from trtseg.architecture import KERNEL, NetworkSpec, PathwaySpec
from trtseg.backends.openvino import BLOCK_VOXELS
from trtseg.phases import axis_variants, cell_range
from trtseg.tiling import TilePlan


def executed(plan: TilePlan) -> int:
    """Multiply-adds of one network over one plan (no tile being constant)."""
    spec = plan.spec
    total = len(plan) * sum(_pathway(p, [spec.input_size(p)] * 3) for p in spec.pathways[1:])
    for block in tiling.group_tiles(plan, np.arange(len(plan)), max_voxels=BLOCK_VOXELS):
        sides = block.region[:, 1] - block.region[:, 0] + spec.receptive_field - 1
        total += _pathway(spec.pathways[0], sides.tolist())
    for start, box in zip(plan.starts, plan.boxes, strict=True):
        total += _fc(spec, box - start[:, None])
    return total


def _pathway(pathway: PathwaySpec, sides: list[int]) -> int:
    total = 0
    for layer, maps in enumerate(pathway.feature_maps, 1):
        sides = [side - KERNEL + 1 for side in sides]
        total += int(np.prod(sides)) * KERNEL**3 * pathway.in_channels(layer) * maps
    return total


def _fc(spec: NetworkSpec, box: np.ndarray) -> int:
    voxels = int(np.prod(box[:, 1] - box[:, 0]))
    first = spec.fc_maps[0]
    total = voxels * spec.fc_kernel**3 * spec.pathways[0].feature_maps[-1] * first
    for pathway in spec.pathways[1:]:
        variants, _ = axis_variants(pathway.factor, spec.fc_kernel)
        taps = [max(one) - min(one) + 1 for one in variants]
        kernels = sum(int(np.prod(t)) for t in itertools.product(taps, repeat=3))
        ranges = [cell_range(low, high, pathway.factor) for low, high in box.tolist()]
        cells = int(np.prod([end - begin for begin, end in ranges]))
        total += cells * kernels * pathway.feature_maps[-1] * first
    channels = [*spec.fc_maps, 1]
    return total + voxels * sum(a * b for a, b in itertools.pairwise(channels))
