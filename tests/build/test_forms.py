from __future__ import annotations

import numpy as np
import pytest

from tests.build.networks import (
    ARCHITECTURES,
    TINY,
    enlarge,
    random_inputs,
    random_variables,
    run_graph,
)
from trtseg.architecture import PUBLISHED, NetworkSpec
from trtseg.build import forms
from trtseg.build.forms import FORMS, cost, default_form, form_graph, pad_channels
from trtseg.build.freeze import FrozenNetwork, freeze
from trtseg.build.graph import kept_layers, plain, read_graph
from trtseg.errors import UsageError


def frozen(spec: NetworkSpec, seed: int = 2) -> FrozenNetwork:
    return freeze(random_variables(spec, seed), spec)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_form_computes_the_same(spec: NetworkSpec, form: str) -> None:
    network, inputs = frozen(spec), random_inputs(spec, seed=2)
    expected = run_graph(plain(network), inputs)
    logits = run_graph(form_graph(network, form, half=False), inputs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_channels_of_the_published_architecture_padded() -> None:
    padded = pad_channels(frozen(PUBLISHED)).spec
    assert [one.feature_maps for one in padded.pathways] == [(32, 32, 40, 40, 40, 40, 56, 56)] * 3
    assert padded.fc_maps == (256, 256)
    assert padded.concat_channels == 168
    assert padded.input_sizes() == {"normal": 45, "sub3": 26, "sub5": 22}
    assert padded.out == 29


def test_padding_by_one_changes_nothing() -> None:
    network = frozen(TINY)
    assert pad_channels(network, 1) is network


def test_residual_channels_stay_where_the_padded_tap_has_them() -> None:
    # 4 + 4 channels joined, padded to 16: the second pathway's begin at 8, not at 4.
    network = frozen(TINY)
    padded = pad_channels(network)
    second = padded.fc[1].weight
    assert second.shape == (16, 8, 1, 1, 1)
    used = np.flatnonzero(np.abs(second).sum(axis=(1, 2, 3, 4)))
    assert used.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    np.testing.assert_array_equal(second[used], network.fc[1].weight)


def test_cost_of_the_published_architecture() -> None:
    # The plain form's multiply-adds but for the second class, which is folded away.
    assert cost(PUBLISHED, "plain").multiply_adds == PUBLISHED.multiply_adds() - 29**3 * 250
    # First FC layer: 27 taps on 150 channels; or 27 on 50, 125 on 12^3 and 343 on 8^3 cells.
    saved = 29**3 * 27 * 150 * 250 - 250 * 50 * (29**3 * 27 + 12**3 * 125 + 8**3 * 343)
    difference = (
        cost(PUBLISHED, "plain").multiply_adds - cost(PUBLISHED, "transposed").multiply_adds
    )
    assert difference == saved
    assert cost(PUBLISHED, "plain").bytes < cost(PUBLISHED, "transposed").bytes


@pytest.mark.parametrize("operations_per_byte", [100, 164, 300])
def test_the_default_is_the_form_that_the_estimate_prefers(
    operations_per_byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "OPERATIONS_PER_BYTE", operations_per_byte)
    assert default_form(PUBLISHED) == "transposed8"
    assert cost(PUBLISHED, "transposed8").time < cost(PUBLISHED, "plain8").time


def test_without_subsampled_pathways_the_plain_form_is_cheaper() -> None:
    assert default_form(ARCHITECTURES["no-subsampled"]) == "plain8"


def test_an_unknown_form_is_refused() -> None:
    for attempt in (
        lambda: form_graph(frozen(TINY), "planar"),
        lambda: cost(TINY, "planar"),
        lambda: forms.check_form("planar"),
    ):
        with pytest.raises(UsageError, match=r"graph form 'planar'.*plain or transposed"):
            attempt()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_but_for_the_last_layer(form: str) -> None:
    content = read_graph(form_graph(frozen(TINY), form, batch=4))
    kinds = {name: value.dtype for name, value in content.constants.items()}
    wide = {name for name, kind in kinds.items() if kind == np.float32}
    assert wide == {"fc.3.weight", "fc.3.bias", "fc.3.scale", "fc.3.shift", "fc.3.slope"}
    assert {kind for name, kind in kinds.items() if name.endswith(".weight")} == {
        np.dtype(np.float16),
        np.dtype(np.float32),
    }
    casts = [one.inputs[0] for one in content.operations if one.kind == "Cast"]
    assert casts[:1] == ["normal"]
    assert set(casts[:-1]) == {"normal", "sub3"}


@pytest.mark.parametrize("form", FORMS)
def test_what_reads_a_weight_beyond_float16_is_in_float32(form: str) -> None:
    network = enlarge(frozen(TINY), "normal", 1, 1e6)
    content = read_graph(form_graph(network, form))
    assert kept_layers(content.operations) == {"normal.1": ["convolution"]}
    weight = content.constants["normal.1.weight.float32"]
    assert weight.dtype == np.float32
    assert np.abs(weight).max() > 65504
    assert "normal.1.weight" not in content.constants
    assert content.constants["normal.2.weight"].dtype == np.float16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_all_kept_in_float32_is_float32_but_for_the_inputs(spec: NetworkSpec, form: str) -> None:
    network = frozen(spec)
    results = [one.output for one in read_graph(form_graph(network, form)).operations]
    content = form_graph(network, form, wide=results)
    inputs = {
        name: tile.astype(np.float16).astype(np.float32)
        for name, tile in random_inputs(spec, seed=2).items()
    }
    logits = run_graph(content, inputs)
    np.testing.assert_allclose(logits, run_graph(plain(network), inputs), rtol=0, atol=1e-5)
    kinds = {value.dtype for value in read_graph(content).constants.values()}
    assert np.float16 not in kinds
