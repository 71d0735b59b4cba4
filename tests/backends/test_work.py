from __future__ import annotations

import numpy as np
import pytest

from trtseg import tiling
from trtseg.architecture import PUBLISHED, NetworkSpec, PathwaySpec
from trtseg.backends.base import Work
from trtseg.backends.work import executed

#: Two 3 x 3 x 3 layers of 2 and 3 maps, and on a grid 3 times coarser as many of 1 and 2; FC layers
#: of 4 and 5 maps, the first 3 x 3 x 3.
SPEC = NetworkSpec(
    pathways=(
        PathwaySpec(1, (2, 3), (), (0.0, 0.0)),
        PathwaySpec(3, (1, 2), (), (0.0, 0.0)),
    ),
    fc_maps=(4, 5),
    fc_residual_layers=(),
    fc_dropout=(0.0, 0.0, 0.0),
    tile=7,
    batch=3,
)


def test_one_tile_counted_by_hand():
    # A 7^3 tile has 3^3 results; its coarse input is 5^3 (1 cell, one on each side, and 2 for the
    # layers); the reach of the first FC layer is repeated, not computed.
    plan = tiling.plan_tiles((3, 3, 3), SPEC)
    assert len(plan) == 1
    found = executed(plan, np.arange(1), block_voxels=10**6, value_bytes=4)
    normal = 5**3 * 27 * 1 * 2 + 3**3 * 27 * 2 * 3
    side = SPEC.input_sizes()["sub3"]
    sub = (side - 2) ** 3 * 27 * 1 * 1 + (side - 4) ** 3 * 27 * 1 * 2
    # The 3 voxels of a cell have 3 variants an axis, of 2, 1 and 2 taps: 5^3 taps a cell in all; a
    # box of 3 voxels is 1 cell.
    first = 3**3 * 27 * 3 * 4 + 5**3 * 2 * 4
    rest = 3**3 * (4 * 5 + 5 * 1)
    assert found.multiply_adds == normal + sub + first + rest


def test_tiles_that_share_an_answer_are_not_counted():
    plan = tiling.plan_tiles((40, 40, 40), PUBLISHED)
    all_tiles = np.arange(len(plan))
    whole = executed(plan, all_tiles, block_voxels=48**3, value_bytes=4)
    assert executed(plan, all_tiles[:0], block_voxels=48**3, value_bytes=4) == Work(0, 0)
    some = executed(plan, all_tiles[:3], block_voxels=48**3, value_bytes=4)
    assert 0 < some.multiply_adds < whole.multiply_adds


def test_larger_blocks_share_more():
    plan = tiling.plan_tiles((60, 60, 60), PUBLISHED)
    tiles = np.arange(len(plan))
    alone = executed(plan, tiles, block_voxels=1, value_bytes=4)
    shared = executed(plan, tiles, block_voxels=80**3, value_bytes=4)
    assert shared.multiply_adds < alone.multiply_adds
    assert shared.bytes < alone.bytes


def test_bytes_go_with_the_size_of_a_value():
    plan = tiling.plan_tiles((20, 20, 20), PUBLISHED)
    four, two = (
        executed(plan, np.arange(len(plan)), block_voxels=48**3, value_bytes=n) for n in (4, 2)
    )
    assert four.multiply_adds == two.multiply_adds
    assert four.bytes == 2 * two.bytes


@pytest.mark.parametrize(("times", "total"), [(0, Work(0, 0)), (3, Work(6, 15))])
def test_sums(times, total):
    assert Work(2, 5) * times == total
    assert sum([Work(2, 5)] * times, start=Work(0, 0)) == total
