"""Half precision evaluated on the CPU: float16 at every point where a GPU engine may round to it.

The graph that an engine is compiled from is evaluated operation by operation: sums run in float32,
and every operation's result is rounded to the type the graph gives it (to nearest, ties to even).
A library that joins operations keeps what lies between them in float32, so that an engine rounds at
some of these points; what the evaluation shows is the most that rounding does.

That holds for kernels that sum in float32. For those that sum in float16, the sums of convolutions
can be rounded after every few products as well (`PRODUCTS`).

Where an operation leaves float16's range, `fit` finds what must be kept in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.backends.base import run_tiles
from trtseg.build.graph import AS_HALF, kept_layers, read_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import NetworkOutput, Progress
    from trtseg.build.graph import Operation
    from trtseg.tiling import TilePlan

    Array = NDArray[Any]

#: Largest finite number in float16 (IEEE 754 binary16).
LARGEST_HALF = 65504.0

#: Largest value on one tile that is left in float16: other tiles may go some times further.
LARGEST_FITTING = LARGEST_HALF / 4

#: Products after which kernels that sum in float16 may round: what the smallest such instruction of
#: tensor cores since Turing adds to a sum; the other one adds 16 (NVIDIA's "PTX ISA",
#: mma.m16n8k8 and mma.m16n8k16).
PRODUCTS = 8

#: Veltkamp's constant that splits 24 bits into float16's 11 and the rest: 2 ** 13 + 1.
_SPLIT = np.float32(8193)

#: ONNX's number of the type float16, as the operator Cast names it.
_FLOAT16 = 10


@dataclass(frozen=True)
class Evaluation:
    """What a graph gives.

    Attributes
    ----------
    result : ndarray
        The graph's output.
    largest : mapping of str to float
        Operation's result to its largest absolute value before rounding, for float16 results.
    kept : mapping of str to float
        The same of the operations that are kept in float32 for their range.
    """

    result: NDArray[np.float32]
    largest: Mapping[str, float]
    kept: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """A graph none of whose float16 results leaves the range, on one tile.

    Attributes
    ----------
    wide : frozenset of str
        What is kept in float32 for it: for `trtseg.build.forms.form_graph`, whatever the batch.
    layers : mapping of str to list of str
        What that is, by `trtseg.build.graph.kept_layers`; also what is kept for its weights.
    evaluation : Evaluation
    convolutions : int
        How many convolutions are left in float16.
    """

    wide: frozenset[str]
    layers: Mapping[str, Sequence[str]]
    evaluation: Evaluation
    convolutions: int


class Evaluator:
    """Evaluates one graph that `trtseg.build.graph.Graph` wrote.

    Parameters
    ----------
    content : bytes
        A serialised ONNX model of the operators trtseg uses.
    products : int, optional
        Sums of convolutions in float16 are rounded after so many products each; default at their
        end only.

    Attributes
    ----------
    operations : tuple of Operation
    """

    def __init__(self, content: bytes, products: int | None = None) -> None:
        self._graph = read_graph(content)
        self._products = products
        self.operations = self._graph.operations
        self._last_use = {
            name: number
            for number, operation in enumerate(self._graph.operations)
            for name in operation.inputs
        }

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> Evaluation:
        """Evaluate the graph.

        Parameters
        ----------
        inputs : mapping of str to ndarray, float32
            By the graph's input names.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # infinities, as on a GPU
            return self._run({**self._graph.constants, **inputs})

    def _run(self, values: dict[str, Array]) -> Evaluation:
        largest, kept = {}, {}
        for number, operation in enumerate(self._graph.operations):
            operands = [values[name] for name in operation.inputs]
            result = self._compute(operation, operands)
            if result.dtype == np.float32 and _is_half(operation, operands):
                largest[operation.output] = float(np.abs(result).max())
                result = result.astype(np.float16)
            if operation.kept:
                kept[operation.output] = float(np.abs(result).max())
            values[operation.output] = result
            for name in operation.inputs:
                if self._last_use[name] == number:
                    values.pop(name, None)
        (output,) = self._graph.outputs
        return Evaluation(values[output], largest, kept)

    def _compute(self, operation: Operation, operands: list[Array]) -> Array:
        if operation.kind not in _CONVOLUTIONS:
            return _OPERATIONS[operation.kind](operation, operands)
        products = self._products if _is_half(operation, operands) else None
        return _CONVOLUTIONS[operation.kind](operation, operands, products)


def fit(build: Callable[[frozenset[str]], bytes], inputs: Mapping[str, NDArray[np.float32]]) -> Fit:
    """Find what a graph must keep in float32 for all else to stay well within float16's range.

    Parameters
    ----------
    build : callable
        Gives the graph that keeps certain results in float32 (`trtseg.build.graph.Graph`'s `wide`).
    inputs : mapping of str to ndarray, float32
        The tile it is evaluated on.

    Returns
    -------
    Fit
        The caller judges whether its result is finite and enough of it in float16.
    """
    wide: frozenset[str] = frozenset()
    while True:
        evaluator = Evaluator(build(wide))
        evaluation = evaluator.run(inputs)
        # What is infinite follows from an overflow elsewhere: it may be finite without that.
        beyond = {
            name
            for name, largest in evaluation.largest.items()
            if LARGEST_FITTING < largest < np.inf and name not in wide
        }
        if not beyond:
            break
        if not wide:
            every = frozenset(one.output for one in evaluator.operations)
            beyond |= _beyond(Evaluator(build(every)).run(inputs))
        wide |= beyond
    left = [one for one in evaluator.operations if one.output in evaluation.largest]
    return Fit(
        wide,
        kept_layers(evaluator.operations),
        evaluation,
        sum(one.kind.startswith("Conv") for one in left),
    )


def _beyond(evaluation: Evaluation) -> set[str]:
    """What leaves float16's range when it is kept in float32, with the casts of it."""
    found = {name for name, largest in evaluation.kept.items() if not largest <= LARGEST_FITTING}
    return found | {name + AS_HALF for name in found}


class HalfNetwork:
    """A graph form run over volumes tile by tile; see `trtseg.backends.base.Network`.

    Parameters
    ----------
    spec : NetworkSpec
    content : bytes
        The graph, of any batch.
    products : int, optional
        As for `Evaluator`.

    Attributes
    ----------
    largest : float
        Largest absolute value of a float16 tensor so far, before rounding.
    """

    def __init__(self, spec: NetworkSpec, content: bytes, products: int | None = None) -> None:
        self.spec = spec
        self.largest = 0.0
        self._evaluator = Evaluator(content, products)

    def run(
        self,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Run the planned tiles over a z-scored volume of shape ``plan.shape``."""
        return run_tiles(
            volume,
            plan,
            lambda inputs: [self.tile_logits(inputs)],
            batch=1,
            probabilities=probabilities,
            progress=progress,
        )

    def tile_logits(self, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Class difference of one tile, float32 (out, out, out); inputs are (1, 1, n, n, n)."""
        evaluation = self._evaluator.run(inputs)
        # What overflows may turn to NaN later on; the overflow itself is a number.
        self.largest = float(np.fmax.reduce([self.largest, *evaluation.largest.values()]))
        result: NDArray[np.float32] = evaluation.result[0]
        return result


def _is_half(operation: Operation, operands: list[Array]) -> bool:
    """Whether the graph types the operation's result as float16."""
    if operation.kind == "Cast":
        return bool(operation.attributes["to"] == _FLOAT16)
    return bool(operands[0].dtype == np.float16)


def _wide(operands: Sequence[Array]) -> list[Array]:
    return [operand.astype(np.float32, copy=False) for operand in operands]


def _convolve(_: Operation, operands: list[Array], products: int | None) -> Array:
    values, weight, bias = _wide(operands)
    return _correlate(values, weight, products) + bias[:, None, None, None]


def _correlate(values: Array, weight: Array, products: int | None) -> Array:
    """Valid cross-correlation: (N, C, i, j, k) with (out, C, a, b, c)."""
    kernel = weight.shape[2:]
    # Tap by tap, channels within: the order in which kernels for channels-last tensors sum.
    matrix = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    side = [n - k + 1 for n, k in zip(values.shape[2:], kernel, strict=True)]
    result = np.empty((len(values), len(weight), *side), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(values, kernel, axis=(2, 3, 4))
    for tile, plane in np.ndindex(len(values), side[0]):
        # (C, j, k, taps) to (taps * C, j * k): one product with the matrix of all taps.
        columns = windows[tile, :, plane].transpose(3, 4, 5, 0, 1, 2).reshape(matrix.shape[1], -1)
        sums = matrix @ columns if products is None else _half_sums(matrix, columns, products)
        result[tile, :, plane] = sums.reshape(len(weight), *side[1:])
    return result


def _half_sums(matrix: Array, columns: Array, products: int) -> Array:
    """A matrix product whose sums are rounded to float16's 11 bits after so many products each.

    To nearest, by Veltkamp's splitting, which takes a quarter of the time of casts there and back.
    Float16's range is left aside: `fit` sees to it that results keep well within it.
    """
    total = np.zeros((len(matrix), columns.shape[1]), np.float32)
    for first in range(0, matrix.shape[1], products):
        part = slice(first, first + products)
        total += matrix[:, part] @ columns[part]
        scaled = _SPLIT * total
        total = scaled - (scaled - total)
    return total


def _convolve_transposed(
    operation: Operation, operands: list[Array], products: int | None
) -> Array:
    values, weight = _wide(operands)
    (factor, _, _), pads = (operation.attributes[name] for name in ("strides", "pads"))
    side, cells = weight.shape[2:], values.shape[2:]
    whole = [(n - 1) * factor + k for n, k in zip(cells, side, strict=True)]
    result = np.empty((len(values), weight.shape[1], *whole), np.float32)
    outer = (slice(None), slice(None))
    # Every phase of the result is a convolution of its own, with each factor-th tap.
    for phase in np.ndindex(factor, factor, factor):
        every = tuple(slice(p, None, factor) for p in phase)
        taps = weight[outer + every].swapaxes(0, 1)[:, :, ::-1, ::-1, ::-1]
        around = [(0, 0), (0, 0), *((k - 1, k - 1) for k in taps.shape[2:])]
        result[outer + every] = _correlate(np.pad(values, around), taps, products)
    inside = tuple(slice(pads[axis], whole[axis] - pads[axis + 3]) for axis in range(3))
    return np.ascontiguousarray(result[outer + inside])


def _parametric_relu(_: Operation, operands: list[Array]) -> Array:
    values, slope = _wide(operands)
    return np.where(values < 0, values * slope, values)


def _multiply(_: Operation, operands: list[Array]) -> Array:
    first, second = _wide(operands)
    return np.asarray(first * second)


def _add(_: Operation, operands: list[Array]) -> Array:
    first, second = _wide(operands)
    return np.asarray(first + second)


def _sum(operation: Operation, operands: list[Array]) -> Array:
    values, axes = operands
    keep = bool(operation.attributes["keepdims"])
    return np.asarray(_wide([values])[0].sum(axis=tuple(axes.tolist()), keepdims=keep))


def _pad(operation: Operation, operands: list[Array]) -> Array:
    values, pads = operands
    widths = list(zip(*pads.reshape(2, -1).tolist(), strict=True))
    if operation.attributes["mode"] == b"edge":
        return np.pad(values, widths, "edge")
    return np.pad(values, widths)


def _slice(_: Operation, operands: list[Array]) -> Array:
    values, starts, ends, axes = operands
    where = [slice(None)] * values.ndim
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        where[axis] = slice(start, end)
    return values[tuple(where)]


#: What each operator computes, in float32 where it computes at all.
_OPERATIONS: dict[str, Callable[[Operation, list[Array]], Array]] = {
    "Add": _add,
    "Cast": lambda _, operands: operands[0].astype(np.float32),
    "Concat": lambda operation, operands: np.concatenate(operands, operation.attributes["axis"]),
    "Gather": lambda operation, operands: operands[0].take(
        operands[1], axis=operation.attributes["axis"]
    ),
    "Identity": lambda _, operands: operands[0],
    "Mul": _multiply,
    "PRelu": _parametric_relu,
    "Pad": _pad,
    "ReduceSum": _sum,
    "Slice": _slice,
    "Squeeze": lambda _, operands: operands[0].squeeze(tuple(operands[1].tolist())),
}

#: The same of what sums products, with how many of them to sum before each rounding.
_CONVOLUTIONS: dict[str, Callable[[Operation, list[Array], int | None], Array]] = {
    "Conv": _convolve,
    "ConvTranspose": _convolve_transposed,
}
