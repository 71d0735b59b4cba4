from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtseg.architecture import NETWORKS, PUBLISHED, NetworkSpec, PathwaySpec
from trtseg.errors import ModelError

NORMAL, SUB3, SUB5 = PUBLISHED.pathways


def small(**changes: Any) -> NetworkSpec:
    """Two pathways of four layers, receptive field 9."""
    values: dict[str, Any] = {
        "pathways": (pathway(1), pathway(2)),
        "fc_maps": (8, 8),
        "fc_residual_layers": (2,),
        "fc_dropout": (0.0, 0.5, 0.5),
        "tile": 15,
    }
    return NetworkSpec(**{**values, **changes})


def pathway(factor: int, **changes: Any) -> PathwaySpec:
    values: dict[str, Any] = {
        "feature_maps": (2, 3, 3, 4),
        "residual_layers": (4,),
        "dropout": (0.0,) * 4,
    }
    return PathwaySpec(factor, **{**values, **changes})


def test_networks_run_brain_first():
    assert NETWORKS == ("bdn", "cgm")


def test_published_numbers():
    assert PUBLISHED.receptive_field == 17
    assert PUBLISHED.margin == 8
    assert PUBLISHED.tile == 45
    assert PUBLISHED.out == 29
    assert PUBLISHED.batch == 5
    assert PUBLISHED.concat_channels == 150
    assert PUBLISHED.rolling_batches == 60
    assert PUBLISHED.input_sizes() == {"normal": 45, "sub3": 26, "sub5": 22}
    assert list(PUBLISHED.input_sizes()) == ["normal", "sub3", "sub5"]
    assert PUBLISHED.fc_maps == (250, 250)
    assert PUBLISHED.fc_dropout == (0.0, 0.5, 0.5)
    assert PUBLISHED.fc_residual_layers == (2,)
    for one in PUBLISHED.pathways:
        assert one.layers == 8
        assert one.feature_maps == (30, 30, 40, 40, 40, 40, 50, 50)
        assert one.residual_layers == (4, 6, 8)
        assert one.dropout == (0.0,) * 8


def test_training_input_sizes():
    sizes = [PUBLISHED.input_size(one, segment=25) for one in PUBLISHED.pathways]
    assert sizes == [25, 19, 18]


@pytest.mark.parametrize(
    ("one", "sides"),
    [
        (NORMAL, [23, 21, 19, 17, 15, 13, 11]),
        (SUB3, [17, 15, 13, 11, 9, 7, 5]),
        (SUB5, [16, 14, 12, 10, 8, 6, 4]),
    ],
)
def test_batch_norm_samples_of_layers_2_to_8(one, sides):
    found = [PUBLISHED.bn_samples(one, layer) for layer in range(2, 9)]
    assert found == [5 * side**3 for side in sides]


def test_batch_norm_samples_of_fc_layers():
    assert [PUBLISHED.fc_bn_samples(layer) for layer in (1, 2, 3)] == [6655, 3645, 3645]


def test_in_channels():
    assert [NORMAL.in_channels(layer) for layer in range(1, 9)] == [1, 30, 30, 40, 40, 40, 40, 50]


def test_multiply_adds_of_a_published_tile():
    # Per layer: output voxels x 27 taps x (in x out channels), the sides being 43, 41 ... 29 for
    # the normal pathway, 24 ... 10 for factor 3, 20 ... 6 for factor 5; FC on 29^3 voxels.
    pathways = 12_508_976_070 + 1_237_386_240 + 559_526_400
    fc = 29**3 * (27 * 150 * 250 + 250 * 250 + 250 * 2)
    assert fc == 26_230_369_500
    assert PUBLISHED.multiply_adds() == pathways + fc == 40_536_258_210


def test_multiply_adds_counted_by_hand_on_a_tiny_network():
    tiny = NetworkSpec(
        pathways=(PathwaySpec(1, (2,), (), (0.0,)), PathwaySpec(2, (3,), (), (0.0,))),
        fc_maps=(4,),
        fc_residual_layers=(),
        fc_dropout=(0.0, 0.0),
        tile=5,
    )
    assert tiny.input_sizes() == {"normal": 5, "sub2": 4}
    # normal 3^3 x 27 x 2, factor 2: 2^3 x 27 x 3, FC 3^3 x 27 x 5 x 4, classes 3^3 x 4 x 2
    assert tiny.multiply_adds() == 1458 + 648 + 14580 + 216


def test_even_factors_round_the_subsampled_size_up():
    spec = small(pathways=(pathway(1), pathway(2), pathway(4)), fc_maps=(12, 12))
    assert spec.receptive_field == 9
    assert spec.out == 7
    assert spec.input_sizes() == {"normal": 15, "sub2": 12, "sub4": 10}


def test_specs_are_values():
    assert NetworkSpec() == PUBLISHED
    assert hash(NetworkSpec()) == hash(PUBLISHED)
    with pytest.raises(FrozenInstanceError):
        PUBLISHED.tile = 50  # type: ignore[misc]


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    layers = draw(st.integers(1, 4))
    maps = st.lists(st.integers(1, 6), min_size=layers, max_size=layers)
    rates = st.floats(0, 0.9)
    factors = [1, *draw(st.lists(st.integers(2, 7), unique=True, max_size=3))]
    pathways = []
    for factor in factors:
        feature_maps = sorted(draw(maps))
        residuals = draw(st.sets(st.integers(2, layers))) if layers > 1 else set()
        dropout = draw(st.lists(rates, min_size=layers, max_size=layers))
        pathways.append(
            PathwaySpec(factor, tuple(feature_maps), tuple(sorted(residuals)), tuple(dropout))
        )
    fc_maps = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    fc_dropout = draw(st.lists(rates, min_size=len(fc_maps) + 1, max_size=len(fc_maps) + 1))
    return NetworkSpec(
        pathways=tuple(pathways),
        fc_maps=fc_maps,
        fc_kernel=draw(st.sampled_from([1, 3, 5])),
        fc_residual_layers=(),
        fc_dropout=tuple(fc_dropout),
        rolling_batches=draw(st.integers(1, 60)),
        tile=draw(st.integers(9, 30)),
        batch=draw(st.integers(1, 5)),
    )


@given(spec=specs())
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_dict_round_trip_through_json(spec):
    again = NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_dict_round_trip_of_the_published_spec():
    data = json.loads(json.dumps(PUBLISHED.to_dict()))
    assert data["pathways"][1] == {
        "factor": 3,
        "feature_maps": [30, 30, 40, 40, 40, 40, 50, 50],
        "residual_layers": [4, 6, 8],
        "dropout": [0.0] * 8,
    }
    assert NetworkSpec.from_dict(data) == PUBLISHED


@pytest.mark.parametrize("name", sorted(PUBLISHED.to_dict()))
def test_from_dict_refuses_a_missing_field(name):
    data = PUBLISHED.to_dict()
    del data[name]
    with pytest.raises(ModelError, match=f"cannot be read .*{name}"):
        NetworkSpec.from_dict(data)


@pytest.mark.parametrize("name", ["factor", "feature_maps", "residual_layers", "dropout"])
def test_from_dict_refuses_a_pathway_without_a_field(name):
    data = json.loads(json.dumps(PUBLISHED.to_dict()))
    del data["pathways"][2][name]
    with pytest.raises(ModelError, match=f"cannot be read .*{name}"):
        NetworkSpec.from_dict(data)


def test_from_dict_refuses_an_unknown_field():
    with pytest.raises(ModelError, match="stride"):
        NetworkSpec.from_dict({**PUBLISHED.to_dict(), "stride": 2})


def test_from_dict_refuses_an_unknown_field_of_a_pathway():
    data = json.loads(json.dumps(PUBLISHED.to_dict()))
    data["pathways"][0]["stride"] = 2
    with pytest.raises(ModelError, match="stride"):
        NetworkSpec.from_dict(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": "45"},
        {"tile": None},
        {"pathways": 3},
        {"pathways": [3]},
        {"fc_maps": 250},
        {"fc_maps": ["many", "more"]},
        {"fc_dropout": ["a", "b", "c"]},
    ],
)
def test_from_dict_refuses_values_of_another_kind(changes):
    with pytest.raises(ModelError) as caught:
        NetworkSpec.from_dict({**PUBLISHED.to_dict(), **changes})
    assert "trtseg engines build" in str(caught.value)


@pytest.mark.parametrize("data", [None, 3, "text", [], ["tile"]])
def test_from_dict_refuses_what_is_no_mapping(data):
    with pytest.raises(ModelError, match="cannot be read"):
        NetworkSpec.from_dict(data)


def test_from_dict_refuses_what_a_spec_refuses():
    with pytest.raises(ModelError, match="receptive field, 17"):
        NetworkSpec.from_dict({**PUBLISHED.to_dict(), "tile": 16})


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"pathways": ()}, "no normal pathway"),
    ({"pathways": (pathway(3),)}, "no normal pathway"),
    ({"pathways": (pathway(3), pathway(1))}, "no normal pathway"),
    ({"pathways": (pathway(1), pathway(1))}, r"subsampling factors \[1\]"),
    ({"pathways": (pathway(1), pathway(3), pathway(3))}, r"subsampling factors \[3, 3\]"),
    ({"pathways": (pathway(1), pathway(0))}, r"subsampling factors \[0\]"),
    ({"pathways": (pathway(1), pathway(-3))}, r"subsampling factors \[-3\]"),
    (
        {"pathways": (pathway(1), PathwaySpec(3, (2, 3, 3), (), (0.0,) * 3))},
        r"sub3 has 3 layers.*normal pathway \(4\)",
    ),
    ({"pathways": (PathwaySpec(1, (), (), ()),)}, "normal has 0 layers"),
    ({"pathways": (pathway(1, dropout=(0.0,) * 3),)}, "normal has 3 dropout rates"),
    (
        {"pathways": (pathway(1), pathway(2, dropout=(0.0,) * 5))},
        "sub2 has 5 dropout rates",
    ),
    ({"pathways": (pathway(1, feature_maps=(2, 0, 3, 4)),)}, "normal has 0 feature maps"),
    ({"pathways": (pathway(1, residual_layers=(1,)),)}, "normal residual layer 1"),
    ({"pathways": (pathway(1, residual_layers=(5,)),)}, "normal residual layer 5"),
    (
        {"pathways": (pathway(1, feature_maps=(2, 4, 4, 3)),)},
        "residual layer 4 has 3 feature maps.*at least the 4",
    ),
    (
        {"pathways": (pathway(1, feature_maps=(2, 4, 3, 3)),)},
        "residual layer 4 has 3 feature maps.*at least the 4",
    ),
    ({"classes": 3}, "3 classes, 1 channels"),
    ({"channels": 2}, "2 classes, 2 channels"),
    ({"fc_maps": (), "fc_residual_layers": (), "fc_dropout": (0.0,)}, "no hidden FC layer"),
    ({"fc_kernel": 2}, "first FC kernel 2"),
    ({"fc_kernel": 0}, "first FC kernel 0"),
    ({"fc_kernel": -1}, "first FC kernel -1"),
    ({"fc_dropout": (0.0, 0.5)}, "2 FC dropout rates.*3: one per FC layer"),
    ({"fc_maps": (8, 0)}, "FC has 0 feature maps"),
    ({"fc_residual_layers": (1,)}, "FC residual layer 1"),
    ({"fc_residual_layers": (3,)}, "FC residual layer 3"),
    ({"fc_maps": (8, 7)}, "FC residual layer 2 has 7 feature maps.*at least the 8"),
    ({"fc_dropout": (0.0, 1.0, 0.5)}, "dropout rate 1.0"),
    ({"fc_dropout": (0.0, 0.5, -0.5)}, "dropout rate -0.5"),
    ({"fc_dropout": (0.0, 0.5, float("nan"))}, "dropout rate nan"),
    (
        {"pathways": (pathway(1), pathway(2, dropout=(0.0, 0.0, 0.0, 1.5)))},
        "dropout rate 1.5",
    ),
    ({"tile": 8}, "inference segment 8, training segment 25.*receptive field, 9"),
    ({"train_segment": 8}, "inference segment 15, training segment 8.*receptive field, 9"),
    ({"rolling_batches": 0}, "below 1"),
    ({"batch": 0}, "below 1"),
    ({"train_batch": 0}, "below 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        small(**changes)
    assert str(caught.value).startswith("architecture: ")
    assert caught.value.expected


def test_what_is_just_allowed():
    assert small(tile=9).out == 1
    assert small(train_segment=9).fc_bn_samples(2) == 5
    assert replace(small(), fc_dropout=(0.0, 0.0, 0.999)).fc_dropout[2] == 0.999
    assert small(pathways=(pathway(1, residual_layers=(2, 3, 4)),), fc_maps=(4, 4)).margin == 4
    # layer 4 adds the input of layer 3, which has the 2 maps of layer 2, not the 4 of layer 3
    assert small(pathways=(pathway(1, feature_maps=(2, 2, 4, 3)),)).concat_channels == 3
