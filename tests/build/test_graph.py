from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from tests.build.networks import (
    ARCHITECTURES,
    ONE_LAYER,
    TINY,
    ports,
    probability,
    random_inputs,
    random_variables,
    run_graph,
)
from trtseg.architecture import PUBLISHED, NetworkSpec
from trtseg.build import graph
from trtseg.build.freeze import freeze
from trtseg.build.graph import Graph, GraphContent, kept_layers, read_graph
from trtseg.build.reference import evaluate
from trtseg.errors import EngineError, MissingExtraError


def test_inputs_and_output_of_the_published_architecture() -> None:
    frozen = freeze(random_variables(PUBLISHED), PUBLISHED)
    model = onnx.load_from_string(graph.plain(frozen))
    onnx.checker.check_model(model, full_check=True)
    assert ports(model.graph.input) == {
        "normal": ["N", 1, 45, 45, 45],
        "sub3": ["N", 1, 26, 26, 26],
        "sub5": ["N", 1, 22, 22, 22],
    }
    assert [port.name for port in model.graph.input] == ["normal", "sub3", "sub5"]
    assert ports(model.graph.output) == {"logit": ["N", 29, 29, 29]}


def test_only_standard_operators_of_one_version() -> None:
    model = onnx.load_from_string(graph.plain(freeze(random_variables(TINY), TINY)))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}
    assert model.ir_version == 8
    assert not model.metadata_props


def test_the_same_weights_give_the_same_bytes() -> None:
    first = graph.plain(freeze(random_variables(TINY), TINY))
    assert graph.plain(freeze(random_variables(TINY), TINY)) == first
    assert graph.plain(freeze(random_variables(TINY, seed=1), TINY)) != first


@pytest.mark.parametrize("spec", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_graphs_compute_what_the_checkpoint_does(spec: NetworkSpec) -> None:
    variables = random_variables(spec, seed=3)
    inputs = random_inputs(spec, seed=3)
    logits = run_graph(graph.plain(freeze(variables, spec)), inputs)
    expected = evaluate(variables, spec, inputs)
    assert logits.dtype == np.float32
    assert logits.shape == (spec.out,) * 3
    np.testing.assert_allclose(probability(logits), expected, rtol=0, atol=1e-5)
    if expected.size > 1:
        assert expected.std() > 0.02


def test_version_is_that_of_the_package() -> None:
    assert graph.version() == onnx.__version__


def test_without_onnx_the_pip_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze(random_variables(TINY), TINY)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for attempt in (lambda: graph.plain(frozen), graph.version):
        with pytest.raises(MissingExtraError) as caught:
            attempt()
        assert caught.value.action == "pip install 'trtseg[build]'"


def chain(scale: float = 0.1, wide: tuple[str, ...] = ()) -> bytes:
    """In half precision: x times a scale, plus a shift, plus x."""
    graph = Graph(half=True, wide=wide)
    x = graph.narrow(graph.add_input("x", (2,)))
    scaled = graph.node("Mul", [x, graph.constant("scale", np.array([scale]))], label="a.1")
    shifted = graph.node("Add", [scaled, graph.constant("shift", np.array([0.1]))], label="a.1")
    total = graph.node("Add", [shifted, x], label="a.2")
    graph.add_output("y", graph.widen(total))
    return graph.serialise()


def links(content: GraphContent) -> list[tuple[str, ...]]:
    return [(one.output, *one.inputs) for one in content.operations]


def types(content: GraphContent) -> dict[str, str]:
    return {name: str(value.dtype) for name, value in content.constants.items()}


def test_a_graph_of_half_precision_is_cast_at_its_ends() -> None:
    content = read_graph(chain())
    assert links(content) == [
        ("cast_0", "x"),
        ("mul_1", "cast_0", "scale"),
        ("add_2", "mul_1", "shift"),
        ("add_3", "add_2", "cast_0"),
        ("cast_4", "add_3"),
        ("y", "cast_4"),
    ]
    assert types(content) == {"scale": "float16", "shift": "float16"}
    assert kept_layers(content.operations) == {}


def test_an_operation_kept_in_float32_is_cast_around() -> None:
    content = read_graph(chain(wide=("mul_1",)))
    assert links(content) == [
        ("cast_0", "x"),
        ("cast_0.float32", "cast_0"),
        ("mul_1", "cast_0.float32", "scale.float32"),
        ("mul_1.float16", "mul_1"),
        ("add_2", "mul_1.float16", "shift"),
        ("add_3", "add_2", "cast_0"),
        ("cast_4", "add_3"),
        ("y", "cast_4"),
    ]
    assert types(content) == {"scale.float32": "float32", "shift": "float16"}
    # As it was, not by way of float16.
    assert content.constants["scale.float32"].tolist() == [np.float32(0.1)]
    assert kept_layers(content.operations) == {"a.1": ["activation"]}


def test_what_reads_a_result_beyond_float16_is_kept_too() -> None:
    content = read_graph(chain(wide=("mul_1", "mul_1.float16", "add_3")))
    assert links(content) == [
        ("cast_0", "x"),
        ("cast_0.float32", "cast_0"),
        ("mul_1", "cast_0.float32", "scale.float32"),
        ("add_2", "mul_1", "shift.float32"),
        ("add_3", "add_2", "cast_0.float32"),
        ("cast_4", "add_3"),
        ("y", "cast_4"),
    ]
    assert types(content) == {"scale.float32": "float32", "shift.float32": "float32"}
    assert kept_layers(content.operations) == {"a.1": ["activation"], "a.2": ["sum"]}


def test_what_reads_a_weight_beyond_float16_is_kept() -> None:
    content = read_graph(chain(scale=65520.0))
    assert kept_layers(content.operations) == {"a.1": ["activation"]}
    assert types(content) == {"scale.float32": "float32", "shift": "float16"}
    assert content.constants["scale.float32"].tolist() == [65520.0]
    # Rounds to 65504.
    assert kept_layers(read_graph(chain(scale=65519.0)).operations) == {}


def test_a_constant_is_stored_as_each_of_its_readers_needs_it() -> None:
    graph = Graph(half=True, wide=["add_2"])
    one = graph.constant("one", np.ones(1))
    x = graph.narrow(graph.add_input("x", (2,)))
    graph.add_output("y", graph.widen(graph.node("Add", [graph.node("Add", [x, one]), one])))
    content = read_graph(graph.serialise())
    assert types(content) == {"one.float32": "float32", "one": "float16"}
    assert [one.kept for one in content.operations if one.kind == "Add"] == ["", "activation"]


def test_names_that_are_no_results_in_half_precision_change_nothing() -> None:
    expected = chain()
    for name in ("unheard_1", "cast_0", "cast_4", "y", "x"):
        assert chain(wide=(name,)) == expected


def test_kept_results_do_not_change_a_graph_in_float32() -> None:
    network = freeze(random_variables(ONE_LAYER), ONE_LAYER)
    assert graph.plain(network, wide=["conv_0", "conv_0.float16"]) == graph.plain(network)


def test_a_weight_beyond_float32_is_refused() -> None:
    with pytest.raises(EngineError, match=r"big: a weight of 1e\+39.*3\.4.*float32"):
        Graph(half=True).constant("big", np.array([1e39]))
