from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.build.networks import (
    ARCHITECTURES,
    TINY,
    ports,
    probability,
    random_inputs,
    random_variables,
    run_graph,
)
from trtseg.architecture import PUBLISHED, NetworkSpec
from trtseg.build.freeze import freeze
from trtseg.build.graph import plain
from trtseg.build.reference import evaluate
from trtseg.build.transposed import stretch, transposed


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1, [3, 2, 1]), (2, [3, 5, 3, 1]), (3, [3, 5, 6, 3, 1]), (5, [3, 5, 6, 6, 6, 3, 1])],
)
def test_taps_are_flipped_and_convolved_with_a_box(factor: int, expected: list[int]) -> None:
    weight = np.zeros((1, 1, 3, 3, 3), np.float32)
    weight[0, 0, 1, 1] = [1, 2, 3]
    stretched = stretch(weight, factor)
    assert stretched.dtype == np.float32
    assert stretched.shape == (1, 1, factor + 2, factor + 2, factor + 2)
    # Along the other axes the only tap is the middle one: ones for the `factor` phases.
    inner = slice(1, 1 + factor)
    assert stretched[0, 0, inner, inner].reshape(-1, factor + 2).tolist() == [expected] * factor**2
    assert stretched.sum() == factor**3 * 6


def test_input_and_output_channels_are_swapped() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1, 1)
    stretched = stretch(weight, 2)
    assert stretched.shape == (3, 2, 2, 2, 2)
    assert stretched[:, :, 0, 0, 0].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("spec", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_computes_what_the_checkpoint_does(spec: NetworkSpec) -> None:
    variables = random_variables(spec, seed=3)
    inputs = random_inputs(spec, seed=3)
    logits = run_graph(transposed(freeze(variables, spec)), inputs)
    assert logits.dtype == np.float32
    assert logits.shape == (spec.out,) * 3
    expected = evaluate(variables, spec, inputs)
    np.testing.assert_allclose(probability(logits), expected, rtol=0, atol=1e-5)


def test_equals_the_published_form_on_the_published_architecture() -> None:
    frozen = freeze(random_variables(PUBLISHED, seed=5), PUBLISHED)
    inputs = random_inputs(PUBLISHED, seed=5)
    first, second = (run_graph(form(frozen), inputs) for form in (plain, transposed))
    assert first.std() > 0.5
    np.testing.assert_allclose(probability(first), probability(second), rtol=0, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("form", [plain, transposed])
def test_inputs_and_output_are_the_same_in_every_form(form, half: bool) -> None:
    frozen = freeze(random_variables(TINY), TINY)
    model = onnx.load_from_string(form(frozen, batch=4, half=half))
    onnx.checker.check_model(model, full_check=True)
    assert ports(model.graph.input) == {
        "normal": [4, 1, 15, 15, 15],
        "sub3": [4, 1, 11, 11, 11],
    }
    assert ports(model.graph.output) == {"logit": [4, 7, 7, 7]}


def test_kernels_and_strides_of_the_published_architecture() -> None:
    frozen = freeze(random_variables(PUBLISHED), PUBLISHED)
    model = onnx.load_from_string(transposed(frozen))
    found = [
        {one.name: list(one.ints) for one in node.attribute}
        for node in model.graph.node
        if node.op_type == "ConvTranspose"
    ]
    # From f + 1 on, after one cell of edge on either side of ceil(29 / f) cells.
    assert found == [
        {"kernel_shape": [5] * 3, "pads": [4] * 3 + [5] * 3, "strides": [3] * 3},
        {"kernel_shape": [7] * 3, "pads": [6] * 3 + [7] * 3, "strides": [5] * 3},
    ]
