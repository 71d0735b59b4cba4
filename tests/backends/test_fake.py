from __future__ import annotations

from pathlib import Path

import numpy as np

from trtseg.architecture import NetworkSpec, PathwaySpec
from trtseg.backends.fake import FakeBackend, FakeNetwork
from trtseg.engine import Engine
from trtseg.tiling import plan_tiles

SPEC = NetworkSpec(
    pathways=(PathwaySpec(1, (1,), (), (0.0,)), PathwaySpec(3, (1,), (), (0.0,))),
    fc_maps=(1,),
    fc_residual_layers=(),
    fc_dropout=(0.0, 0.0),
    tile=5,
    batch=3,
)
# Four voxels of an axis of four: tiles start at 0 and 1, so two along each axis.
SHAPE = (4, 4, 4)


def volume(*values: float) -> np.ndarray:
    """The values along the third axis, everywhere."""
    return np.broadcast_to(np.array(values, np.float32), SHAPE).copy()


def test_labels_are_a_threshold():
    plan = plan_tiles(SHAPE, SPEC)
    output = FakeNetwork(SPEC, threshold=1.5).run(volume(-3, 1, 1.5, 2), plan)
    assert output.labels.dtype == np.uint8
    assert output.probabilities is None
    np.testing.assert_array_equal(output.labels, volume(0, 0, 0, 1))


def test_probability_is_the_logistic_of_the_distance_from_the_threshold():
    plan = plan_tiles(SHAPE, SPEC)
    output = FakeNetwork(SPEC, 1.5).run(volume(-0.5, 0.5, 1.5, 2.5), plan, probabilities=True)
    assert output.probabilities is not None
    assert output.probabilities.dtype == np.float32
    expected = volume(0.11920292, 0.26894142, 0.5, 0.73105858)
    np.testing.assert_allclose(output.probabilities, expected, rtol=1e-6)
    np.testing.assert_array_equal(output.labels, volume(0, 0, 0, 1))  # a tie is class 0


def test_probability_of_extreme_values():
    plan = plan_tiles(SHAPE, SPEC)
    output = FakeNetwork(SPEC).run(volume(-1000, -90, 90, 1000), plan, probabilities=True)
    assert output.probabilities is not None
    np.testing.assert_allclose(output.probabilities, volume(0, 0, 1, 1), atol=1e-30)


def test_nothing_where_no_tile_is_planned():
    roi = np.zeros(SHAPE, bool)
    roi[0, 0, 0] = True  # the first tile alone: voxels 0 to 2 of each axis
    plan = plan_tiles(SHAPE, SPEC, roi)
    output = FakeNetwork(SPEC).run(volume(1, 1, 1, 1), plan, probabilities=True)
    assert output.probabilities is not None
    inside = np.zeros(SHAPE, bool)
    inside[:3, :3, :3] = True
    np.testing.assert_array_equal(output.labels, inside)
    np.testing.assert_array_equal(output.probabilities > 0, inside)


def test_progress_counts_every_tile():
    done: list[int] = []
    FakeNetwork(SPEC).run(volume(1, 1, 1, 1), plan_tiles(SHAPE, SPEC), progress=done.append)
    assert done == [3, 3, 2]


def test_the_volume_is_left_alone():
    data = volume(-1, 0, 1, 2)
    data.flags.writeable = False
    output = FakeNetwork(SPEC).run(data, plan_tiles(SHAPE, SPEC), probabilities=True)
    assert output.labels.flags.writeable
    np.testing.assert_array_equal(data, volume(-1, 0, 1, 2))


def test_backend_loads_the_engines_architecture():
    backend = FakeBackend()
    network = backend.load(Engine(Path("nowhere"), "tiny", "bdn", SPEC, {}))
    assert backend.device == "fake"
    assert network.spec is SPEC
    np.testing.assert_array_equal(
        network.run(volume(-1, 0, 1, 2), plan_tiles(SHAPE, SPEC)).labels, volume(0, 0, 1, 1)
    )
    backend.close()
