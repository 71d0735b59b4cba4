from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from trtseg.architecture import NetworkSpec, PathwaySpec
from trtseg.backends.base import logistic, run_tiles
from trtseg.tiling import plan_tiles

SPEC = NetworkSpec(
    pathways=(PathwaySpec(1, (1,), (), (0.0,)), PathwaySpec(3, (1,), (), (0.0,))),
    fc_maps=(1,),
    fc_residual_layers=(),
    fc_dropout=(0.0, 0.0),
    tile=5,
)
# Results of 3: along the first axis tiles start at 0, 3 and 4, so that the last one overlaps.
SHAPE = (7, 3, 3)
VOLUME = np.zeros(SHAPE, np.float32)

Inputs = dict[str, NDArray[np.float32]]


class Answers:
    """Gives each tile one class difference for all of it."""

    def __init__(self, *logits: float) -> None:
        self.logits = iter(logits)
        self.asked: list[dict[str, tuple[int, ...]]] = []

    def __call__(self, inputs: Inputs) -> list[NDArray[np.float32]]:
        self.asked.append({name: one.shape for name, one in inputs.items()})
        return [np.full((3, 3, 3), next(self.logits), np.float32) for _ in inputs["normal"]]


def test_later_tiles_go_over_earlier_ones() -> None:
    plan = plan_tiles(SHAPE, SPEC)
    found = run_tiles(VOLUME, plan, Answers(2, 1, -1), batch=2, probabilities=True)
    assert found.labels.dtype == np.uint8
    assert found.probabilities is not None
    assert found.probabilities.dtype == np.float32
    np.testing.assert_array_equal(found.labels[:, 0, 0], [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(
        found.probabilities[:, 2, 2], [0.88079708] * 3 + [0.73105858] + [0.26894142] * 3, rtol=1e-6
    )


def test_tiles_are_asked_for_in_batches_and_counted() -> None:
    answers, told = Answers(1, 1, 1), []
    found = run_tiles(VOLUME, plan_tiles(SHAPE, SPEC), answers, batch=2, progress=told.append)
    assert answers.asked == [
        {"normal": (tiles, 1, 5, 5, 5), "sub3": (tiles, 1, 3, 3, 3)} for tiles in (2, 1)
    ]
    assert told == [2, 1]
    assert found.probabilities is None


def test_a_tie_is_class_0() -> None:
    found = run_tiles(VOLUME, plan_tiles(SHAPE, SPEC), Answers(0, 0, 0), batch=3)
    assert not found.labels.any()


def test_without_tiles_nothing_is_asked_for() -> None:
    plan = plan_tiles(SHAPE, SPEC, np.zeros(SHAPE, bool))
    found = run_tiles(VOLUME, plan, Answers(), batch=2, probabilities=True)
    assert found.probabilities is not None
    assert not found.labels.any()
    assert not found.probabilities.any()


def test_every_tile_must_be_answered() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_tiles(VOLUME, plan_tiles(SHAPE, SPEC), lambda _: [], batch=2)


def test_logistic_is_float32_and_silent_at_both_ends() -> None:
    logits = np.array([0.0, 1.0986123, -1.0986123, 200.0, -200.0], np.float32)
    found = logistic(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:3], [0.5, 0.75, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(found[3:], [1.0, 0.0])
