"""A graph form in PyTorch: the published form as a PyTorch user would run it, for comparison.

Checked against trtseg's own evaluation on the CPU by ``python bench/torch_network.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (as PyTorch's own documentation names it)

from trtseg.build.graph import Operation, read_graph


class TorchNetwork(torch.nn.Module):
    """Runs the operations of a graph that `trtseg.build.forms.form_graph` made of a plain form.

    Inputs are float32, (N, 1, n, n, n), in the graph's order; the result is the class difference,
    float32, (N, out, out, out). Between them values have the types of the graph.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        graph = read_graph(content)
        self._inputs = graph.inputs
        (self._output,) = graph.outputs
        self._operations = graph.operations
        self._numbers = {}
        for name, value in graph.constants.items():
            if value.dtype == np.int64 and not name.endswith(".repeat"):
                self._numbers[name] = value.tolist()  # shapes and axes, known when compiled
            else:
                self.register_buffer(name.replace(".", "_"), torch.from_numpy(value.copy()))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Evaluate the graph."""
        values: dict[str, Any] = dict(zip(self._inputs, inputs, strict=True))
        for operation in self._operations:
            operands = [self._value(values, name) for name in operation.inputs]
            values[operation.output] = apply(operation, operands)
        return values[self._output]

    def _value(self, values: dict[str, Any], name: str) -> Any:
        if name in values:
            return values[name]
        if name in self._numbers:
            return self._numbers[name]
        return getattr(self, name.replace(".", "_"))


def apply(operation: Operation, operands: list[Any]) -> Any:
    """One operation of a plain form."""
    first, *rest = operands
    match operation.kind:
        case "Add":
            return first + rest[0]
        case "Cast":
            return first.to(torch.float16 if operation.attributes["to"] == 10 else torch.float32)
        case "Concat":
            return torch.cat(operands, operation.attributes["axis"])
        case "Conv":
            return F.conv3d(first, *rest)
        case "Gather":
            return first.index_select(operation.attributes["axis"], rest[0])
        case "Identity":
            return first
        case "Mul":
            return first * rest[0]
        case "PRelu":
            return F.prelu(first, rest[0].flatten())
        case "Pad":
            half = len(rest[0]) // 2
            pairs = list(zip(rest[0][:half], rest[0][half:], strict=True))
            if operation.attributes["mode"] == b"edge":  # PyTorch wants the last three axes only
                return F.pad(first, [w for pair in pairs[:1:-1] for w in pair], mode="replicate")
            return F.pad(first, [width for pair in pairs[::-1] for width in pair])
        case "ReduceSum":
            return first.sum(tuple(rest[0]), keepdim=bool(operation.attributes["keepdims"]))
        case "Slice":
            where = [slice(None)] * first.dim()
            for start, end, axis in zip(*rest, strict=True):
                where[axis] = slice(start, end)
            return first[tuple(where)]
        case "Squeeze":
            return first.squeeze(tuple(rest[0]))
        case kind:
            raise ValueError(f"operator {kind}; expected one of a plain form")


def check() -> float:
    """Largest difference in logits from trtseg's evaluation, over one random tile, in float32."""
    from trtseg.architecture import PUBLISHED
    from trtseg.build.forms import form_graph
    from trtseg.build.freeze import freeze
    from trtseg.build.half import Evaluator
    from trtseg.build.variables import network_variables

    rng = np.random.default_rng(0)
    variables = {
        name: np.abs(rng.normal(0.5, 0.2, shape)).astype(np.float32)
        if "var" in name or "gBn" in name
        else rng.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in network_variables(PUBLISHED).required(PUBLISHED).items()
    }
    content = form_graph(freeze(variables, PUBLISHED), "plain", batch=1, half=False)
    inputs = {
        name: rng.standard_normal((1, 1, side, side, side)).astype(np.float32)
        for name, side in PUBLISHED.input_sizes().items()
    }
    expected = Evaluator(content).run(inputs).result
    with torch.inference_mode():
        found = TorchNetwork(content)(*map(torch.from_numpy, inputs.values())).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    difference = check()
    print(f"largest difference, as a part of the largest logit: {difference:.1e}")
    sys.exit(difference > 1e-4)
