"""Checkpoint variables -> folded weights: the one source every graph form is derived from.

What is folded, exactly up to rounding (all arithmetic in float64, stored as float32):

- the input bias of a pathway into the bias of its first convolution;
- dropout's factor into the weights that follow it;
- batch norm into the convolution before it, wherever no residual tap or sum needs the raw tensor
  in between; elsewhere it stays a scale and a shift per channel;
- the two classes into one: the classification layer yields the difference of the class scores
  (class 1 - class 0), whose sign is the decision (a tie is class 0) and whose logistic is the
  probability of class 1.
"""

from __future__ import annotations

import io
import tokenize
import zipfile
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from trtseg.build.reference import batch_norm
from trtseg.build.variables import LayerVariables, network_variables
from trtseg.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec

#: What numpy and zipfile raise for a damaged archive, depending on the byte.
_UNREADABLE = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class FrozenLayer:
    """One layer: ``conv(prelu(x * scale + shift)) + bias [+ crop of the residual]``.

    Attributes
    ----------
    scale, shift : ndarray, shape (in,), float32, or None
        What of batch norm could not be folded; None for the identity.
    slope : ndarray, shape (in,), float32, or None
        PReLU's slope for negative values; None for no activation.
    weight : ndarray, shape (out, in, k, k, k), float32
    bias : ndarray, shape (out,), float32
    residual : bool
        Whether the output gains the centre crop of the input of the layer before, on its first
        channels.
    """

    scale: NDArray[np.float32] | None
    shift: NDArray[np.float32] | None
    slope: NDArray[np.float32] | None
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    residual: bool


@dataclass(frozen=True)
class FrozenNetwork:
    """Folded weights with their architecture."""

    spec: NetworkSpec
    pathways: tuple[tuple[FrozenLayer, ...], ...]
    fc: tuple[FrozenLayer, ...]

    def to_bytes(self) -> bytes:
        """Serialise the arrays as an .npz; the same weights give the same bytes."""
        arrays = {
            f"{name}.{f.name}": getattr(layer, f.name)
            for name, layer in self._named()
            for f in fields(FrozenLayer)
            if isinstance(getattr(layer, f.name), np.ndarray)
        }
        stream = io.BytesIO()
        # numpy gives every member of the archive the same fixed date, so the bytes repeat.
        np.savez(stream, **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, spec: NetworkSpec) -> FrozenNetwork:
        """Read what `to_bytes` wrote.

        Raises
        ------
        EngineError
            The content is damaged or of another architecture.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = dict(archive.items())
        except _UNREADABLE as error:
            raise _unreadable(str(error)) from error
        expected = _array_shapes(spec)
        for name in sorted(expected.keys() | arrays.keys()):
            array = arrays.get(name)
            found = None if array is None else (array.shape, array.dtype)
            if found != (expected.get(name), np.float32):
                raise _unreadable(f"{name} is {found}, not {expected.get(name)} of float32")
        layout = network_variables(spec)
        pathways = tuple(
            tuple(
                _layer(arrays, f"{pathway.name}.{number}", variables.residual)
                for number, variables in enumerate(layers, 1)
            )
            for pathway, layers in zip(spec.pathways, layout.pathways, strict=True)
        )
        fc = tuple(
            _layer(arrays, f"fc.{number}", variables.residual)
            for number, variables in enumerate(layout.fc, 1)
        )
        return cls(spec, pathways, fc)

    def _named(self) -> list[tuple[str, FrozenLayer]]:
        named = [
            (f"{pathway.name}.{number}", layer)
            for pathway, layers in zip(self.spec.pathways, self.pathways, strict=True)
            for number, layer in enumerate(layers, 1)
        ]
        return [*named, *((f"fc.{number}", layer) for number, layer in enumerate(self.fc, 1))]


def freeze(variables: Mapping[str, NDArray[np.float32]], spec: NetworkSpec) -> FrozenNetwork:
    """Fold a checkpoint's variables.

    Parameters
    ----------
    variables : mapping of str to ndarray
        From `trtseg.build.checkpoint.read_variables`.
    spec : NetworkSpec

    Returns
    -------
    FrozenNetwork
    """
    layout = network_variables(spec)
    pathways = tuple(
        _fold_sequence([_unfolded(variables, layer) for layer in layers])
        for layers in layout.pathways
    )
    fc = [_unfolded(variables, layer) for layer in layout.fc]
    bias = variables[layout.softmax_bias].astype(np.float64)
    fc[-1] = replace(
        fc[-1],
        weight=fc[-1].weight[1:] - fc[-1].weight[:1],
        bias=bias[1:] - bias[:1],
    )
    return FrozenNetwork(
        spec,
        tuple(_single(layers) for layers in pathways),
        _single(_fold_sequence(fc)),
    )


@dataclass(frozen=True)
class _Layer:
    """A `FrozenLayer` in the making, in float64; the identity is ones and zeros here."""

    scale: NDArray[np.float64] | None
    shift: NDArray[np.float64] | None
    slope: NDArray[np.float64] | None
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    residual: bool


def _unfolded(variables: Mapping[str, NDArray[np.float32]], layer: LayerVariables) -> _Layer:
    weight = variables[layer.weight].astype(np.float64)
    bias = np.zeros(len(weight))
    scale = shift = slope = None
    if layer.input_bias is not None:
        bias = float(variables[layer.input_bias][0]) * weight.sum(axis=(1, 2, 3, 4)) * layer.keep
    if layer.norm is not None:
        scale, shift, slope = batch_norm(variables, layer)
    return _Layer(scale, shift, slope, weight * layer.keep, bias, layer.residual)


def _fold_sequence(layers: list[_Layer]) -> tuple[_Layer, ...]:
    """Fold batch norm into the convolution before it, wherever nothing else reads that."""
    folded = list(layers)
    for index in range(1, len(folded)):
        layer, before = folded[index], folded[index - 1]
        if layer.scale is None or layer.shift is None or not _folds(layers, index):
            continue
        folded[index - 1] = replace(
            before,
            weight=before.weight * layer.scale[:, None, None, None, None],
            bias=before.bias * layer.scale + layer.shift,
        )
        folded[index] = replace(layer, scale=None, shift=None)
    return tuple(folded)


def _folds(layers: Sequence[_Layer] | Sequence[LayerVariables], index: int) -> bool:
    """Whether only this layer reads the output of the convolution before it."""
    tapped = index + 1 < len(layers) and layers[index + 1].residual
    return index > 0 and not layers[index - 1].residual and not tapped


def _array_shapes(spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
    """Name to shape of every array of the serialised form."""
    layout = network_variables(spec)
    sequences = [
        *((p.name, layers) for p, layers in zip(spec.pathways, layout.pathways, strict=True)),
        ("fc", layout.fc),
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for sequence, layers in sequences:
        for index, layer in enumerate(layers):
            name = f"{sequence}.{index + 1}"
            out, channels, *kernel = layer.weight_shape
            if layer is layout.fc[-1]:
                out = 1
            shapes[f"{name}.weight"] = (out, channels, *kernel)
            shapes[f"{name}.bias"] = (out,)
            if layer.norm is not None:
                shapes[f"{name}.slope"] = (channels,)
                if not _folds(layers, index):
                    shapes[f"{name}.scale"] = shapes[f"{name}.shift"] = (channels,)
    return shapes


def _unreadable(reason: str) -> EngineError:
    return EngineError(
        f"folded weights that cannot be read ({reason})",
        expected="the weights of this architecture",
        action="build again: trtseg engines build",
    )


def _single(layers: tuple[_Layer, ...]) -> tuple[FrozenLayer, ...]:
    def narrow(values: NDArray[np.float64] | None) -> NDArray[np.float32] | None:
        return None if values is None else np.ascontiguousarray(values, np.float32)

    return tuple(
        FrozenLayer(
            scale=narrow(layer.scale),
            shift=narrow(layer.shift),
            slope=narrow(layer.slope),
            weight=np.ascontiguousarray(layer.weight, np.float32),
            bias=np.ascontiguousarray(layer.bias, np.float32),
            residual=layer.residual,
        )
        for layer in layers
    )


def _layer(arrays: Mapping[str, NDArray[np.float32]], name: str, residual: bool) -> FrozenLayer:
    return FrozenLayer(
        scale=arrays.get(f"{name}.scale"),
        shift=arrays.get(f"{name}.shift"),
        slope=arrays.get(f"{name}.slope"),
        weight=arrays[f"{name}.weight"],
        bias=arrays[f"{name}.bias"],
        residual=residual,
    )
