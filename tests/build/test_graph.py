from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from tests.build.networks import (
    ARCHITECTURES,
    TINY,
    probability,
    random_inputs,
    random_variables,
    run_graph,
)
from trtseg.architecture import PUBLISHED, NetworkSpec
from trtseg.build import graph
from trtseg.build.freeze import freeze
from trtseg.build.reference import evaluate
from trtseg.errors import MissingExtraError


def shape_of(port: onnx.ValueInfoProto) -> list[str | int]:
    tensor = port.type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.FLOAT
    return [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]


def test_inputs_and_output_of_the_published_architecture() -> None:
    frozen = freeze(random_variables(PUBLISHED), PUBLISHED)
    model = onnx.load_from_string(graph.plain(frozen))
    onnx.checker.check_model(model, full_check=True)
    assert {port.name: shape_of(port) for port in model.graph.input} == {
        "normal": ["N", 1, 45, 45, 45],
        "sub3": ["N", 1, 26, 26, 26],
        "sub5": ["N", 1, 22, 22, 22],
    }
    assert [port.name for port in model.graph.input] == ["normal", "sub3", "sub5"]
    assert {port.name: shape_of(port) for port in model.graph.output} == {
        "logit": ["N", 29, 29, 29]
    }


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
