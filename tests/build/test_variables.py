from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtseg.architecture import NETWORKS, PUBLISHED, NetworkSpec, PathwaySpec
from trtseg.build.checkpoint import read_schema
from trtseg.build.variables import network_variables, numbered

INDEXES = Path(__file__).parents[1] / "data" / "published"

# Written down from the published indexes and DeepMedic's naming, not computed.
PATHWAY_WEIGHTS = [
    (30, 1, 3, 3, 3),
    (30, 30, 3, 3, 3),
    (40, 30, 3, 3, 3),
    (40, 40, 3, 3, 3),
    (40, 40, 3, 3, 3),
    (40, 40, 3, 3, 3),
    (50, 40, 3, 3, 3),
    (50, 50, 3, 3, 3),
]
FC_WEIGHTS = [(250, 150, 3, 3, 3), (250, 250, 1, 1, 1), (2, 250, 1, 1, 1)]
NORM_CHANNELS = [*[30, 30, 40, 40, 40, 40, 50] * 3, 150, 250, 250]
NORM_STEMS = ("gBn", "bBn", "aPrelu", "muBnsForRollingAverage", "varBnsForRollingAverage")


def suffixed(stem: str, index: int) -> str:
    return f"net/{stem}" + (f"_{index}" if index else "")


def pathway(factor: int, *maps: int, residuals: tuple[int, ...] = ()) -> PathwaySpec:
    return PathwaySpec(factor, maps, residuals, (0.0,) * len(maps))


def test_published_names_and_shapes() -> None:
    expected = {}
    for index, shape in enumerate([*PATHWAY_WEIGHTS * 3, *FC_WEIGHTS]):
        expected[suffixed("W", index)] = shape
    for index, channels in enumerate(NORM_CHANNELS):
        for stem in NORM_STEMS:
            rolling = stem.endswith("RollingAverage")
            expected[suffixed(stem, index)] = (60, channels) if rolling else (channels,)
    expected |= {"net/b": (1,), "net/b_1": (1,), "net/b_2": (1,), "net/b_3": (2,)}
    required = network_variables(PUBLISHED).required(PUBLISHED)
    assert required == expected
    assert len(required) == 27 + 5 * 24 + 4


@pytest.mark.parametrize("net", NETWORKS)
def test_published_indexes_hold_what_is_required_and_nothing_is_forgotten(net: str) -> None:
    schema = read_schema(INDEXES / f"{net}.model.ckpt")
    assert len(schema) == 408
    network = {name: shape for name, shape in schema.items() if name.startswith("net/")}
    assert len(network) == 199
    used = {n: shape for n, shape in network.items() if not re.match(r"net/sharedNew", n)}
    assert network_variables(PUBLISHED).required(PUBLISHED) == used


@pytest.mark.parametrize(
    ("which", "layer", "weight", "norm", "bias"),
    [
        (0, 1, "net/W", None, "net/b"),
        (0, 2, "net/W_1", "net/gBn", None),
        (0, 3, "net/W_2", "net/gBn_1", None),
        (0, 8, "net/W_7", "net/gBn_6", None),
        (1, 1, "net/W_8", None, "net/b_1"),
        (1, 2, "net/W_9", "net/gBn_7", None),
        (1, 8, "net/W_15", "net/gBn_13", None),
        (2, 1, "net/W_16", None, "net/b_2"),
        (2, 2, "net/W_17", "net/gBn_14", None),
        (2, 8, "net/W_23", "net/gBn_20", None),
        (3, 1, "net/W_24", "net/gBn_21", None),
        (3, 2, "net/W_25", "net/gBn_22", None),
        (3, 3, "net/W_26", "net/gBn_23", None),
    ],
)
def test_published_layers_take_their_own_variables(
    which: int, layer: int, weight: str, norm: str | None, bias: str | None
) -> None:
    layout = network_variables(PUBLISHED)
    found = (*layout.pathways, layout.fc)[which][layer - 1]
    assert found.weight == weight
    assert found.input_bias == bias
    assert (None if found.norm is None else found.norm_names()[0]) == norm
    assert layout.softmax_bias == "net/b_3"


def test_published_layers_know_their_training_size_residuals_and_dropout() -> None:
    layout = network_variables(PUBLISHED)
    sides = [
        [23, 21, 19, 17, 15, 13, 11],
        [17, 15, 13, 11, 9, 7, 5],
        [16, 14, 12, 10, 8, 6, 4],
    ]
    for layers, expected in zip(layout.pathways, sides, strict=True):
        assert [layer.samples for layer in layers[1:]] == [5 * side**3 for side in expected]
        assert [n for n, layer in enumerate(layers, 1) if layer.residual] == [4, 6, 8]
        assert [layer.keep for layer in layers] == [1.0] * 8
    assert [layer.samples for layer in layout.fc] == [5 * 11**3, 5 * 9**3, 5 * 9**3]
    assert [layer.residual for layer in layout.fc] == [False, True, False]
    assert [layer.keep for layer in layout.fc] == [1.0, 0.5, 0.5]


def test_norm_names_are_scale_shift_slope_mean_variance() -> None:
    assert network_variables(PUBLISHED).pathways[0][2].norm_names() == (
        "net/gBn_1",
        "net/bBn_1",
        "net/aPrelu_1",
        "net/muBnsForRollingAverage_1",
        "net/varBnsForRollingAverage_1",
    )


def test_only_the_first_variable_of_a_stem_has_no_number() -> None:
    assert [numbered("W", index) for index in (0, 1, 12)] == ["net/W", "net/W_1", "net/W_12"]


def test_numbering_of_two_pathways_of_three_layers_and_three_hidden_layers() -> None:
    spec = NetworkSpec(
        pathways=(pathway(1, 2, 3, 4), pathway(4, 5, 6, 7, residuals=(3,))),
        fc_maps=(12, 13, 14),
        fc_kernel=1,
        fc_residual_layers=(3,),
        fc_dropout=(0.25, 0.0, 0.0, 0.5),
        rolling_batches=9,
        train_segment=10,
        train_batch=2,
        tile=11,
    )
    layout = network_variables(spec)
    required = layout.required(spec)
    weights = {name: shape for name, shape in required.items() if "/W" in name}
    assert weights == {
        "net/W": (2, 1, 3, 3, 3),
        "net/W_1": (3, 2, 3, 3, 3),
        "net/W_2": (4, 3, 3, 3, 3),
        "net/W_3": (5, 1, 3, 3, 3),
        "net/W_4": (6, 5, 3, 3, 3),
        "net/W_5": (7, 6, 3, 3, 3),
        "net/W_6": (12, 11, 1, 1, 1),
        "net/W_7": (13, 12, 1, 1, 1),
        "net/W_8": (14, 13, 1, 1, 1),
        "net/W_9": (2, 14, 1, 1, 1),
    }
    slopes = {name: shape for name, shape in required.items() if "aPrelu" in name}
    assert slopes == {
        "net/aPrelu": (2,),
        "net/aPrelu_1": (3,),
        "net/aPrelu_2": (5,),
        "net/aPrelu_3": (6,),
        "net/aPrelu_4": (11,),
        "net/aPrelu_5": (12,),
        "net/aPrelu_6": (13,),
        "net/aPrelu_7": (14,),
    }
    assert required["net/muBnsForRollingAverage_4"] == (9, 11)
    biases = {name: shape for name, shape in required.items() if name.split("_")[0] == "net/b"}
    assert biases == {
        "net/b": (1,),
        "net/b_1": (1,),
        "net/b_2": (2,),
    }
    # Receptive field 7: a training segment of 10 gives results of 4, the subsampled pathway (1
    # result per axis) an input of 7.
    assert [layer.samples for layer in layout.pathways[0][1:]] == [2 * 8**3, 2 * 6**3]
    assert [layer.samples for layer in layout.pathways[1][1:]] == [2 * 5**3, 2 * 3**3]
    assert [layer.samples for layer in layout.fc] == [2 * 4**3] * 4
    assert [layer.keep for layer in layout.fc] == [0.75, 1.0, 1.0, 0.5]
    assert [layer.residual for layer in layout.fc] == [False, False, True, False]
    assert [layer.residual for layer in layout.pathways[1]] == [False, False, True]


def test_without_subsampled_pathways_fc_follows_the_normal_one() -> None:
    spec = NetworkSpec(
        pathways=(pathway(1, 3),),
        fc_maps=(4,),
        fc_residual_layers=(),
        fc_dropout=(0.0, 0.0),
        rolling_batches=2,
        train_segment=5,
        tile=5,
    )
    assert network_variables(spec).required(spec) == {
        "net/W": (3, 1, 3, 3, 3),
        "net/b": (1,),
        "net/W_1": (4, 3, 3, 3, 3),
        "net/gBn": (3,),
        "net/bBn": (3,),
        "net/aPrelu": (3,),
        "net/muBnsForRollingAverage": (2, 3),
        "net/varBnsForRollingAverage": (2, 3),
        "net/W_2": (2, 4, 1, 1, 1),
        "net/gBn_1": (4,),
        "net/bBn_1": (4,),
        "net/aPrelu_1": (4,),
        "net/muBnsForRollingAverage_1": (2, 4),
        "net/varBnsForRollingAverage_1": (2, 4),
        "net/b_1": (2,),
    }
