from __future__ import annotations

import onnx
import pytest

from tests.build.networks import ARCHITECTURES, random_variables
from trtseg.architecture import PUBLISHED
from trtseg.build.freeze import freeze
from trtseg.build.parts import parts


def ports(values) -> dict[str, tuple[str, list[int | str]]]:
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT32: "int32"}
    return {
        value.name: (
            kinds[value.type.tensor_type.elem_type],
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


@pytest.fixture(scope="module")
def published() -> dict[str, bytes]:
    return parts(freeze(random_variables(PUBLISHED, 0), PUBLISHED))


def graph_of(content: bytes) -> onnx.GraphProto:
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def test_inputs_and_outputs_are_literal(published: dict[str, bytes]) -> None:
    assert set(published) == {"normal.onnx", "sub.onnx", "fc.onnx"}
    normal, sub, fc = (graph_of(published[name]) for name in ("normal.onnx", "sub.onnx", "fc.onnx"))
    assert ports(normal.input) == {"normal": ("float32", [1, 1, "i", "j", "k"])}
    assert [value.name for value in normal.output] == ["features"]
    assert ports(sub.input) == {
        "sub3": ("float32", ["N", 1, 26, 26, 26]),
        "sub5": ("float32", ["N", 1, 22, 22, 22]),
    }
    assert [value.name for value in sub.output] == ["sub3.features", "sub5.features"]
    assert ports(fc.input) == {
        "normal": ("float32", [1, 50, "normal.i", "normal.j", "normal.k"]),
        "sub3": ("float32", [1, 50, "sub3.i", "sub3.j", "sub3.k"]),
        "sub5": ("float32", [1, 50, "sub5.i", "sub5.j", "sub5.k"]),
        "sub3.variant": ("int32", ["sub3.voxels"]),
        "sub3.cell": ("int32", ["sub3.voxels"]),
        "sub5.variant": ("int32", ["sub5.voxels"]),
        "sub5.cell": ("int32", ["sub5.voxels"]),
    }
    assert [value.name for value in fc.output] == ["logit"]


def test_the_first_fc_layer_convolves_125_taps_a_cell(published: dict[str, bytes]) -> None:
    fc = graph_of(published["fc.onnx"])
    shapes = {tensor.name: list(tensor.dims) for tensor in fc.initializer}
    assert shapes["fc.1.weight"] == [250, 50, 3, 3, 3]
    for name in ("sub3", "sub5"):
        taps = [
            dims[2] * dims[3] * dims[4]
            for key, dims in shapes.items()
            if key.startswith(f"{name}.variant.") and key.endswith(".weight")
        ]
        assert len(taps) == 27
        assert sum(taps) == 125


def test_the_same_weights_give_the_same_bytes(published: dict[str, bytes]) -> None:
    assert parts(freeze(random_variables(PUBLISHED, 0), PUBLISHED)) == published


def test_without_subsampled_pathways_there_is_no_graph_of_them() -> None:
    spec = ARCHITECTURES["no-subsampled"]
    assert len(spec.pathways) == 1
    assert set(parts(freeze(random_variables(spec, 0), spec))) == {"normal.onnx", "fc.onnx"}
