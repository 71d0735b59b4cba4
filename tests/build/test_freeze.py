from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.build.networks import TINY, Arrays, probability, random_inputs, random_variables
from trtseg.architecture import PUBLISHED, NetworkSpec, PathwaySpec
from trtseg.build.freeze import FrozenLayer, FrozenNetwork, freeze
from trtseg.build.reference import evaluate
from trtseg.errors import EngineError

Array = NDArray[np.float64]
RATES = st.sampled_from([0.0, 0.25, 0.5])


@st.composite
def pathways(draw: st.DrawFn, factor: int, layers: int) -> PathwaySpec:
    # Maps that never decrease leave every layer free to have a residual.
    maps = sorted(draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers)))
    residuals = draw(st.sets(st.integers(2, layers))) if layers > 1 else set()
    rates = draw(st.lists(RATES, min_size=layers, max_size=layers))
    return PathwaySpec(factor, tuple(maps), tuple(sorted(residuals)), tuple(rates))


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    layers = draw(st.integers(1, 5))
    factors = draw(st.lists(st.integers(2, 5), max_size=2, unique=True))
    chosen = tuple(draw(pathways(factor, layers)) for factor in (1, *factors))
    joined = sum(pathway.feature_maps[-1] for pathway in chosen)
    hidden = draw(st.integers(1, 3))
    first = draw(st.integers(1, 4))
    maps = [first, *(joined + draw(st.integers(0, 2)) for _ in range(hidden - 1))]
    maps[1:] = sorted(maps[1:])
    possible = [n for n in range(2, hidden + 1) if maps[n - 1] >= ([joined, *maps])[n - 2]]
    residuals = draw(st.sets(st.sampled_from(possible))) if possible else set()
    field = 1 + 2 * layers
    return NetworkSpec(
        pathways=chosen,
        fc_maps=tuple(maps),
        fc_kernel=draw(st.sampled_from([1, 3])),
        fc_residual_layers=tuple(sorted(residuals)),
        fc_dropout=tuple(draw(st.lists(RATES, min_size=hidden + 1, max_size=hidden + 1))),
        rolling_batches=draw(st.integers(1, 3)),
        train_segment=field + draw(st.integers(0, 3)),
        train_batch=draw(st.integers(2, 4)),
        tile=field + draw(st.integers(0, 4)),
    )


def single(
    layers: int, residuals: tuple[int, ...], fc: tuple[int, ...], fc_residuals: tuple[int, ...]
) -> NetworkSpec:
    """One pathway of two maps per layer."""
    return NetworkSpec(
        pathways=(PathwaySpec(1, (2,) * layers, residuals, (0.25,) * layers),),
        fc_maps=fc,
        fc_kernel=3,
        fc_residual_layers=fc_residuals,
        fc_dropout=(0.5,) * (len(fc) + 1),
        rolling_batches=2,
        train_segment=2 * layers + 2,
        train_batch=2,
        tile=2 * layers + 3,
    )


def run_folded(network: FrozenNetwork, inputs: Arrays) -> Array:
    """Logits of one tile from the folded layers, by their definition."""
    spec = network.spec
    maps = []
    for pathway, layers in zip(spec.pathways, network.pathways, strict=True):
        features = run_layers(layers, inputs[pathway.name].astype(np.float64))
        index = np.arange(spec.out) // pathway.factor
        maps.append(features[np.ix_(range(len(features)), index, index, index)])
    edge = spec.fc_kernel // 2
    joined = np.pad(np.concatenate(maps), [(0, 0), *[(edge, edge)] * 3], "edge")
    return run_layers(network.fc, joined)[0]


def run_layers(layers: Sequence[FrozenLayer], features: Array) -> Array:
    before = features
    for layer in layers:
        values = features
        if layer.scale is not None:
            values = values * layer.scale[:, None, None, None]
        if layer.shift is not None:
            values = values + layer.shift[:, None, None, None]
        if layer.slope is not None:
            values = np.where(values > 0, values, values * layer.slope[:, None, None, None])
        windows = np.lib.stride_tricks.sliding_window_view(
            values, layer.weight.shape[2:], axis=(1, 2, 3)
        )
        result = np.einsum("ircztuv,oituv->orcz", windows, layer.weight)
        if layer.bias is not None:
            result = result + layer.bias[:, None, None, None]
        if layer.residual:
            lost = (before.shape[1] - result.shape[1]) // 2
            inner = slice(lost, lost + result.shape[1])
            result[: len(before)] += before[:, inner, inner, inner]
        before, features = features, result
    return features


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(specs(), st.integers(0, 99))
@example(single(1, (), (3,), ()), 0)
@example(single(5, (2, 3, 4), (3, 3), (2,)), 1)
@example(single(5, (2, 3, 4, 5), (2, 2, 2), (2, 3)), 2)
@example(single(4, (3,), (2, 4, 3), (3,)), 3)
@example(TINY, 4)
def test_folded_layers_compute_what_the_checkpoint_does(spec: NetworkSpec, seed: int) -> None:
    variables = random_variables(spec, seed)
    inputs = random_inputs(spec, seed)
    found = run_folded(freeze(variables, spec), inputs)
    np.testing.assert_allclose(
        probability(found), evaluate(variables, spec, inputs), rtol=0, atol=1e-4
    )


def test_what_stays_unfolded_in_the_published_architecture() -> None:
    network = freeze(random_variables(PUBLISHED), PUBLISHED)
    # Layer 3 is tapped by layer 4's residual, layer 5 holds it; and so on.
    for layers in network.pathways:
        assert [n for n, layer in enumerate(layers, 1) if layer.scale is not None] == [3, 5, 7]
        assert [n for n, layer in enumerate(layers, 1) if layer.shift is not None] == [3, 5, 7]
        assert [n for n, layer in enumerate(layers, 1) if layer.slope is None] == [1]
        assert [n for n, layer in enumerate(layers, 1) if layer.residual] == [4, 6, 8]
    # FC layer 1 follows the concatenation, layer 3 the residual sum.
    assert [n for n, layer in enumerate(network.fc, 1) if layer.scale is not None] == [1, 3]
    assert [n for n, layer in enumerate(network.fc, 1) if layer.shift is not None] == [1, 3]
    assert [layer.slope is None for layer in network.fc] == [False, False, False]
    assert [layer.residual for layer in network.fc] == [False, True, False]
    # The classification layer yields one value: class 1 - class 0.
    assert network.fc[2].weight.shape == (1, 250, 1, 1, 1)
    assert network.pathways[2][7].weight.shape == (50, 50, 3, 3, 3)
    for layer in (*(one for layers in network.pathways for one in layers), *network.fc):
        arrays = [getattr(layer, f.name) for f in fields(layer) if f.name != "residual"]
        assert {array.dtype for array in arrays if array is not None} == {np.dtype("float32")}


def test_folding_by_hand() -> None:
    spec = NetworkSpec(
        pathways=(PathwaySpec(1, (1, 1), (), (0.0, 0.5)),),
        fc_maps=(1,),
        fc_kernel=1,
        fc_residual_layers=(),
        fc_dropout=(0.0, 0.0),
        rolling_batches=1,
        train_segment=5,
        train_batch=2,
        tile=5,
    )
    variables = random_variables(spec)
    n = 2 * 3**3  # batch norm of layer 2 sees 3 voxels per axis
    variables |= {
        "net/W": np.full((1, 1, 3, 3, 3), 2, np.float32),
        "net/b": np.array([0.5], np.float32),
        "net/gBn": np.array([6], np.float32),
        "net/bBn": np.array([1], np.float32),
        "net/muBnsForRollingAverage": np.array([[4]], np.float32),
        "net/varBnsForRollingAverage": np.array([[9 * (n - 1) / n]], np.float32),  # deviation 3
        "net/aPrelu": np.array([0.25], np.float32),
        "net/W_1": np.full((1, 1, 3, 3, 3), 8, np.float32),
        "net/W_3": np.reshape([1.5, -2.0], (2, 1, 1, 1, 1)).astype(np.float32),
        "net/b_1": np.array([0.25, 4], np.float32),
    }
    network = freeze(variables, spec)
    first, second = network.pathways[0]
    np.testing.assert_allclose(first.weight, 4, rtol=1e-6)  # 2 * 6 / 3
    # Input bias: 0.5 * 27 * 2 = 27. Batch norm: 27 * 2 + (1 - 4 * 2) = 47.
    np.testing.assert_allclose(first.bias, [47], rtol=1e-6)
    assert first.scale is first.shift is first.slope is None
    np.testing.assert_array_equal(second.slope, [0.25])
    assert second.scale is second.shift is None
    last = network.fc[-1]
    assert last.weight.item() == -3.5
    assert last.bias is not None
    assert last.bias.item() == 3.75


def test_serialising_repeats_to_the_byte() -> None:
    variables = random_variables(TINY)
    content = freeze(variables, TINY).to_bytes()
    assert freeze(dict(reversed(variables.items())), TINY).to_bytes() == content
    again = FrozenNetwork.from_bytes(content, TINY)
    assert again.to_bytes() == content
    assert again.spec == TINY
    inputs = random_inputs(TINY)
    expected = run_folded(freeze(variables, TINY), inputs)
    np.testing.assert_array_equal(run_folded(again, inputs), expected)


def test_serialised_weights_are_plain_arrays() -> None:
    content = freeze(random_variables(TINY), TINY).to_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = dict(archive.items())
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    assert arrays["normal.1.weight"].shape == (2, 1, 3, 3, 3)
    assert arrays["sub3.4.slope"].shape == (3,)
    assert arrays["fc.1.scale"].shape == (8,)
    assert arrays["fc.3.weight"].shape == (1, 8, 1, 1, 1)


def test_truncated_weights_are_refused() -> None:
    content = freeze(random_variables(TINY), TINY).to_bytes()
    for kept in [0, 1, 3, 4, 5, *range(100, len(content), 499), len(content) - 1]:
        with pytest.raises(EngineError, match="folded weights that cannot be read"):
            FrozenNetwork.from_bytes(content[:kept], TINY)


@pytest.mark.parametrize("mask", [0x01, 0x08, 0x80])
def test_flipped_bytes_are_refused_or_harmless(mask: int) -> None:
    spec = single(2, (2,), (3,), ())
    content = freeze(random_variables(spec), spec).to_bytes()
    # The archive's directory lies at the end: every byte of it, and samples of the rest.
    directory = content.index(b"PK\x01\x02")
    offsets = [*range(0, directory, 11), *range(directory, len(content))]
    refused = 0
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= mask
        try:
            network = FrozenNetwork.from_bytes(bytes(damaged), spec)
        except EngineError:
            refused += 1
        else:  # some bytes, such as a member's date, carry no meaning
            assert network.to_bytes() == content
    assert refused > 0.5 * len(offsets)


def test_a_damaged_array_header_is_refused() -> None:
    # Of a large member, numpy reads the header before zipfile compares the checksum.
    content = freeze(random_variables(TINY), TINY).to_bytes()
    header = b"'shape': (8, 8, 3, 3, 3), }"
    assert content.count(header) == 1
    for damaged in (header.replace(b")", b"("), header.replace(b":", b" ")):
        with pytest.raises(EngineError, match="folded weights that cannot be read"):
            FrozenNetwork.from_bytes(content.replace(header, damaged), TINY)


def one_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones(3, np.float32))
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"weights", one_array(), b"PK\x05\x06" + bytes(18)],
    ids=["empty", "text", "one-array", "empty-archive"],
)
def test_content_that_is_no_archive_of_weights_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="folded weights that cannot be read"):
        FrozenNetwork.from_bytes(content, TINY)


def resaved(content: bytes, **changes: NDArray[np.generic] | None) -> bytes:
    """The archive with arrays replaced, added, or (None) left out."""
    with np.load(io.BytesIO(content)) as archive:
        arrays = dict(archive.items()) | changes
    stream = io.BytesIO()
    np.savez(stream, **{name: array for name, array in arrays.items() if array is not None})
    return stream.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"normal.2.weight": None},
        {"normal.2.slope": None},
        {"fc.1.scale": None},
        {"fc.1.shift": None},
        {"fc.1.scale": np.ones(7, np.float32)},
        {"normal.1.weight": np.ones((2, 1, 3, 3, 1), np.float32)},
        {"sub3.2.weight": np.ones((3, 2, 3, 3, 3), np.float64)},
        {"fc.4.weight": np.ones((1, 8, 1, 1, 1), np.float32)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_weights_of_another_layout_are_refused(changes: dict[str, NDArray[np.generic]]) -> None:
    content = freeze(random_variables(TINY), TINY).to_bytes()
    with pytest.raises(EngineError, match="folded weights that cannot be read"):
        FrozenNetwork.from_bytes(resaved(content, **changes), TINY)


def test_weights_of_another_architecture_are_refused() -> None:
    content = freeze(random_variables(TINY), TINY).to_bytes()
    for other in (single(4, (4,), (8, 8), (2,)), PUBLISHED):
        with pytest.raises(EngineError, match="folded weights that cannot be read"):
            FrozenNetwork.from_bytes(content, other)
