from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.build.networks import (
    ARCHITECTURES,
    TINY,
    enlarge,
    probability,
    random_inputs,
    random_variables,
    run_graph,
)
from tests.golden import golden_scan, read_golden
from trtseg import tiling
from trtseg.architecture import NetworkSpec
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.build.forms import FORMS, form_graph
from trtseg.build.freeze import FrozenNetwork, freeze
from trtseg.build.graph import Graph, kept_layers, plain, read_graph
from trtseg.build.half import LARGEST_HALF, Evaluator, Fit, HalfNetwork, fit
from trtseg.build.parts import parts
from trtseg.engine import load_engine
from trtseg.nifti import read_scan
from trtseg.normalise import z_score


def half_graph(shape: tuple[int, ...]) -> tuple[Graph, str]:
    graph = Graph(half=True)
    return graph, graph.narrow(graph.add_input("x", shape))


def run_half(graph: Graph, result: str, x: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    graph.add_output("y", graph.widen(result))
    evaluation = Evaluator(graph.serialise()).run({"x": x.astype(np.float32)})
    assert evaluation.result.dtype == np.float32
    return evaluation.result, dict(evaluation.largest)


def test_inputs_are_rounded_to_nearest_ties_to_even() -> None:
    graph, x = half_graph((6,))
    result, largest = run_half(graph, x, np.array([0.1, 2049, 2051, -65519, 65520, 1e-8]))
    assert result.tolist() == [0.0999755859375, 2048, 2052, -65504, np.inf, 0]
    assert list(largest.values()) == [65520.0]


def test_every_operation_rounds_its_result() -> None:
    graph, x = half_graph((1,))
    one = graph.constant("one", np.ones(1))
    total = graph.node("Add", [graph.node("Add", [x, one]), one])
    result, _ = run_half(graph, total, np.array([2048.0]))
    assert result.tolist() == [2048]


def test_a_convolution_rounds_its_sum_once() -> None:
    graph, x = half_graph((1, 3, 1, 1, 1))
    weight = graph.constant("w", np.ones((1, 3, 1, 1, 1)))
    bias = graph.constant("b", np.zeros(1))
    result, _ = run_half(
        graph,
        graph.node("Conv", [x, weight, bias], kernel_shape=[1, 1, 1]),
        np.array([2048.0, 1, 1]).reshape(1, 3, 1, 1, 1),
    )
    assert result.tolist() == [[[[[2050]]]]]


def convolved(x: np.ndarray, weight: np.ndarray, products: int | None) -> np.ndarray:
    """One convolution in float16 of (C, i, j, k) with (out, C, a, b, c)."""
    graph, name = half_graph((1, *x.shape))
    operands = [graph.constant("w", weight), graph.constant("b", np.zeros(len(weight)))]
    kernel = list(weight.shape[2:])
    result = graph.node("Conv", [name, *operands], kernel_shape=kernel)
    graph.add_output("y", graph.widen(result))
    evaluator = Evaluator(graph.serialise(), products)
    return evaluator.run({"x": x[None].astype(np.float32)}).result[0]


# From 2048 on, float16 has even numbers only. 2048 and seven times 0.625 is 2052.375.
@pytest.mark.parametrize(("products", "expected"), [(None, 2052), (1, 2048), (2, 2054), (4, 2052)])
def test_a_sum_in_float16_is_rounded_after_so_many_products(
    products: int | None, expected: float
) -> None:
    x = np.array([2048, *[0.625] * 7]).reshape(8, 1, 1, 1)
    assert convolved(x, np.ones((1, 8, 1, 1, 1)), products).item() == expected


def test_a_sum_goes_tap_by_tap_through_all_channels() -> None:
    x = np.array([[2048, 0.75], [-2047, 0.25]]).reshape(2, 2, 1, 1)
    # 1 + 1; channel by channel it would be 2048 - 2046.75.
    assert convolved(x, np.ones((1, 2, 2, 1, 1)), 2).item() == 2


def test_a_sum_in_float16_is_rounded_as_a_cast_does() -> None:
    rng = np.random.default_rng(5)
    x, weight = (
        rng.standard_normal(shape).astype(np.float16).astype(np.float32)
        for shape in ((24, 3, 4, 5), (7, 24))
    )
    total = np.zeros((7, 60), np.float32)
    for first in range(0, 24, 5):
        total += weight[:, first : first + 5] @ x.reshape(24, -1)[first : first + 5]
        total = total.astype(np.float16).astype(np.float32)
    found = convolved(x, weight.reshape(7, 24, 1, 1, 1), 5)
    np.testing.assert_array_equal(found, total.reshape(7, 3, 4, 5))


@pytest.mark.parametrize("form", FORMS)
def test_sums_in_float16_are_further_from_float32(form: str) -> None:
    frozen = freeze(random_variables(TINY, seed=4), TINY)
    inputs = {name: tile[None] for name, tile in random_inputs(TINY, seed=4).items()}
    exact = Evaluator(form_graph(frozen, form, half=False)).run(inputs).result
    content = form_graph(frozen, form)
    squares = []
    for products in (None, 8, 1):
        network = HalfNetwork(TINY, content, products)
        squares.append(np.square(network.tile_logits(inputs) - exact[0]).mean())
    assert 0 < squares[0] < squares[1] < squares[2] < 1e-4


def test_sums_in_float32_stay_so() -> None:
    graph = Graph(half=True, wide=["conv_1"])
    x = graph.narrow(graph.add_input("x", (1, 3, 1, 1, 1)))
    operands = [graph.constant("w", np.ones((1, 3, 1, 1, 1))), graph.constant("b", np.zeros(1))]
    result = graph.node("Conv", [x, *operands], kernel_shape=[1, 1, 1])
    graph.add_output("y", graph.widen(result))
    evaluation = Evaluator(graph.serialise(), 1).run(
        {"x": np.float32([2048, 1, 1]).reshape(1, 3, 1, 1, 1)}
    )
    assert evaluation.result.item() == 2050
    assert set(evaluation.kept) == {"conv_1"}


def test_what_leaves_the_range_is_infinite_and_told() -> None:
    graph, x = half_graph((2,))
    result, largest = run_half(graph, graph.node("Mul", [x, x]), np.array([-300.0, 2.0]))
    assert result.tolist() == [np.inf, 4]
    assert max(largest.values()) == 90000.0 > LARGEST_HALF


def test_what_is_kept_in_float32_is_not_rounded() -> None:
    graph = Graph(half=True, wide=["mul_1", "mul_1.float16"])
    x = graph.narrow(graph.add_input("x", (2,)))
    square = graph.node("Mul", [x, x])
    small = graph.node("Mul", [square, graph.constant("c", np.full(1, 0.1))])
    result, largest = run_half(graph, small, np.array([-300.0, 3.0]))
    np.testing.assert_array_equal(result, np.float32([90000, 9]) * np.float32(0.1))
    assert largest == {"cast_0": 300.0}
    assert Evaluator(graph.serialise()).run({"x": np.float32([-300, 3])}).kept == {
        "mul_1": 90000.0,
        "mul_2": 9000.0,
    }


def fit_tiny(network: FrozenNetwork, form: str) -> Fit:
    inputs = {name: tile[None] for name, tile in random_inputs(TINY, seed=4).items()}
    return fit(lambda wide: form_graph(network, form, batch=1, wide=wide), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_within_the_range_nothing_is_kept_in_float32(form: str) -> None:
    fitted = fit_tiny(freeze(random_variables(TINY, seed=4), TINY), form)
    assert (fitted.wide, fitted.layers) == (frozenset(), {})
    assert fitted.convolutions == {"plain": 10, "transposed": 11}[form.rstrip("8")]


#: Name and number of the layer enlarged, by how much, and what is kept in float32 in either form.
SECOND = ["activation", "convolution"]
PARTED = {"fc.1.normal": ["convolution"], "fc.1.sub3": ["convolution"], "fc.1": ["sum"]}
LARGE = {
    "an activation": (
        ("sub3", 3, 5e4),
        {"sub3.3": ["convolution"], "sub3.4": SECOND},
        {"sub3.3": ["convolution"], "sub3.4": SECOND},
    ),
    "weights": (
        ("fc", 1, 1e6),
        {"fc.1": ["convolution"], "fc.2": SECOND},
        {**PARTED, "fc.2": SECOND},
    ),
    # The last layer is in float32 at any rate.
    "before the last layer": (
        ("fc", 2, 5e4),
        {"fc.2": ["convolution", "sum"]},
        {"fc.2": ["convolution", "sum"]},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layer", "plainly", "parted"), LARGE.values(), ids=LARGE)
def test_only_what_leaves_the_range_is_kept_in_float32(
    layer: tuple[str, int, float],
    plainly: dict[str, list[str]],
    parted: dict[str, list[str]],
    form: str,
) -> None:
    network = enlarge(freeze(random_variables(TINY, seed=4), TINY), *layer)
    fitted = fit_tiny(network, form)
    assert fitted.layers == (parted if form.startswith("transposed") else plainly)
    assert max(fitted.evaluation.largest.values()) < 100
    assert max(fitted.evaluation.kept.values()) > LARGEST_HALF
    expected = run_graph(plain(network), random_inputs(TINY, seed=4))
    # As near as float16 is without such a layer.
    difference = np.abs(probability(fitted.evaluation.result[0]) - probability(expected))
    assert 1e-5 < difference.max() < 5e-3
    # The same for any batch, and by the library that runs graphs.
    content = form_graph(network, form, batch=2, wide=fitted.wide)
    assert kept_layers(read_graph(content).operations) == fitted.layers
    logits = run_graph(form_graph(network, form, wide=fitted.wide), random_inputs(TINY, seed=4))
    np.testing.assert_allclose(probability(logits), probability(expected), rtol=0, atol=5e-3)


def test_what_leaves_the_range_by_rounding_behind_an_overflow_is_kept_too() -> None:
    def build(wide: frozenset[str]) -> bytes:
        graph = Graph(half=True, wide=wide)
        value = graph.narrow(graph.add_input("x", (1,)))
        # 131072, then 1; then 1.0004885, in float16 1.0009765625: 16375.996, or 16383.984375.
        for number, factor in enumerate((2.0**17, 2.0**-17, 1.0004885, 16368.0)):
            constant = graph.constant(f"c{number}", np.full(1, factor))
            value = graph.node("Mul", [value, constant])
        graph.add_output("y", graph.widen(value))
        return graph.serialise()

    fitted = fit(build, {"x": np.ones(1, np.float32)})
    assert fitted.wide == {"mul_1", "mul_1.float16", "mul_4"}
    assert fitted.evaluation.result.tolist() == [16383.984375]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_float32_graph_gives_what_openvino_does(spec: NetworkSpec, form: str) -> None:
    frozen = freeze(random_variables(spec, seed=4), spec)
    inputs = random_inputs(spec, seed=4)
    evaluation = Evaluator(form_graph(frozen, form, half=False)).run(
        {name: tile[None] for name, tile in inputs.items()}
    )
    expected = run_graph(plain(frozen), inputs)
    np.testing.assert_allclose(evaluation.result[0], expected, rtol=0, atol=1e-5)
    assert evaluation.largest == {}


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_near_float32_but_not_it(form: str) -> None:
    frozen = freeze(random_variables(TINY, seed=4), TINY)
    inputs = {name: tile[None] for name, tile in random_inputs(TINY, seed=4).items()}
    exact, rounded = (
        Evaluator(form_graph(frozen, form, half=half)).run(inputs) for half in (False, True)
    )
    difference = np.abs(probability(exact.result) - probability(rounded.result)).max()
    assert 1e-5 < difference < 5e-3
    # One entry per rounded tensor; z-scores of the input among them.
    assert min(rounded.largest.values()) > 0.1
    assert 3 < max(rounded.largest.values()) < 100


def test_a_batch_is_each_of_its_tiles() -> None:
    frozen = freeze(random_variables(TINY, seed=4), TINY)
    evaluator = Evaluator(form_graph(frozen, "transposed8"))
    tiles = [random_inputs(TINY, seed=seed) for seed in (1, 2)]
    both = evaluator.run({name: np.stack([t[name] for t in tiles]) for name in tiles[0]}).result
    for row, tile in zip(both, tiles, strict=True):
        alone = evaluator.run({name: one[None] for name, one in tile.items()}).result[0]
        np.testing.assert_allclose(row, alone, rtol=0, atol=1e-6)


def test_a_volume_is_stitched_as_every_backend_does() -> None:
    frozen = freeze(random_variables(TINY, seed=4), TINY)
    volume = np.random.default_rng(0).standard_normal((17, 9, 12)).astype(np.float32)
    plan = tiling.plan_tiles(volume.shape, TINY)
    told: list[int] = []
    network = HalfNetwork(TINY, form_graph(frozen, "plain", half=False))
    output = network.run(volume, plan, probabilities=True, progress=told.append)
    expected = (
        OpenVINOBackend(threads=1)
        .compile(TINY, parts(frozen))
        .run(volume, plan, probabilities=True)
    )
    assert output.probabilities is not None
    assert expected.probabilities is not None
    np.testing.assert_allclose(output.probabilities, expected.probabilities, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(output.labels, expected.labels)
    assert 0 < output.labels.sum() < output.labels.size
    assert sum(told) == len(plan) == 12
    assert network.run(volume, plan).probabilities is None


@pytest.mark.parametrize("net", ["bdn", "cgm"])
def test_one_golden_tile_with_trained_weights(net: str, engines_root: Path) -> None:
    engine = load_engine(engines_root, "demo", net)
    frozen = FrozenNetwork.from_bytes(engine.read("weights.npz"), engine.spec)
    volume = z_score(read_scan(golden_scan("chain_crop"))).data
    plan = tiling.plan_tiles(volume.shape, engine.spec)
    # A tile's voxels that no later tile overwrites.
    start, box = plan.starts[20:21], plan.boxes[20]
    network = HalfNetwork(engine.spec, form_graph(frozen, "transposed8"))
    logits = network.tile_logits(tiling.gather(tiling.pad(volume, plan), start, engine.spec))
    labels = logits[tuple(slice(a, b) for a, b in box - start[0][:, None])] > 0
    where = tuple(slice(a, b) for a, b in box)
    expected = read_golden("chain_crop", {"bdn": "brain_", "cgm": "cgm_"}[net]).labels[where] > 0
    brain = read_golden("chain_crop", "brain_").labels[where] > 0
    assert brain.sum() == 21253
    assert (labels == expected)[brain].mean() >= 0.9995
    labels &= brain
    assert 2 * (labels & expected).sum() / (labels.sum() + expected.sum()) >= 0.999
    assert 10 < network.largest < LARGEST_HALF / 100
