"""The graph forms an engine can be compiled from, what each costs, and which one is the default.

Forms named with an 8 have their channels padded to multiples of 8 with zero weights: tensor cores
multiply, and vector loads read, 8 float16 channels at a time.

Which form is fastest on which GPU is to be measured (``make gpu-check``). Until then `cost` decides
between the two, a roofline estimate per operation, and the padded variant is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from trtseg.architecture import KERNEL
from trtseg.build.freeze import FrozenLayer, FrozenNetwork
from trtseg.build.graph import plain
from trtseg.build.transposed import transposed
from trtseg.errors import UsageError
from trtseg.phases import reach

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec

#: Name to (graph builder, channel multiple).
_FORMS = {
    "plain": (plain, 1),
    "transposed": (transposed, 1),
    "plain8": (plain, 8),
    "transposed8": (transposed, 8),
}
FORMS = tuple(_FORMS)

#: Floating-point operations a GPU does in float16 (with float32 sums) while it moves one byte. From
#: the vendor's figures: RTX 4090, 165 TFLOP/s and 1.01 TB/s: 164; RTX 5090, 210 and 1.79: 117; RTX
#: 6000 Ada, 182 and 0.96: 190; H100 SXM, 989 and 3.35: 295. Between 100 and 300 the forms rank the
#: same.
OPERATIONS_PER_BYTE = 164

_HALF_BYTES = 2


@dataclass(frozen=True)
class Cost:
    """What one tile costs.

    Attributes
    ----------
    multiply_adds : int
        Of convolutions and transposed convolutions, halos included.
    bytes : int
        Device memory read and written, in float16, weights excluded (a batch shares them).
    time : int
        Sum over operations of the larger of its bytes and of the bytes that could be moved while
        it computes: a roofline time in units of one byte's.
    """

    multiply_adds: int
    bytes: int
    time: int


def form_graph(
    network: FrozenNetwork,
    form: str,
    *,
    batch: int | str = "N",
    half: bool = True,
    wide: Collection[str] = (),
) -> bytes:
    """Build the ONNX graph of a form; parameters as of `trtseg.build.graph.plain`.

    What is listed in `wide` is of this form: another names its operations otherwise.

    Raises
    ------
    UsageError
        There is no such form.
    EngineError, MissingExtraError
        As `trtseg.build.graph.plain`.
    """
    build, multiple = _FORMS[check_form(form)]
    return build(pad_channels(network, multiple), batch=batch, half=half, wide=wide)


def check_form(form: str) -> str:
    """Give `form` back if it names one.

    Raises
    ------
    UsageError
        There is no such form.
    """
    if form not in _FORMS:
        raise UsageError(f"graph form {form!r}", expected=" or ".join(FORMS))
    return form


def default_form(spec: NetworkSpec) -> str:
    """Name of the form an engine is compiled from unless another is asked for."""
    return min(("transposed8", "plain8"), key=lambda form: cost(spec, form).time)


def pad_channels(network: FrozenNetwork, multiple: int = 8) -> FrozenNetwork:
    """Pad every layer's output channels to a multiple, with zeros; the result stays the same.

    Parameters
    ----------
    network : FrozenNetwork
    multiple : int

    Returns
    -------
    FrozenNetwork
        With a spec of its own; the same inputs, and the same output up to the order of sums.
    """
    if multiple == 1:
        return network
    image = _Layout(np.zeros(1, np.intp), 1)
    pathways, results = [], []
    for layers in network.pathways:
        padded, layout = _pad_sequence(layers, image, multiple)
        pathways.append(padded)
        results.append(layout)
    offsets = np.cumsum([0, *(layout.size for layout in results)])
    joined = _Layout(
        np.concatenate([one.places + at for one, at in zip(results, offsets, strict=False)]),
        int(offsets[-1]),
    )
    *hidden, last = network.fc
    fc, layout = _pad_sequence(hidden, joined, multiple)
    score = _Layout(np.zeros(1, np.intp), 1)
    spec = replace(
        network.spec,
        pathways=tuple(
            replace(pathway, feature_maps=tuple(len(layer.weight) for layer in layers))
            for pathway, layers in zip(network.spec.pathways, pathways, strict=True)
        ),
        fc_maps=tuple(len(layer.weight) for layer in fc),
    )
    return FrozenNetwork(spec, tuple(pathways), (*fc, _pad_layer(last, layout, score)))


@dataclass(frozen=True)
class _Layout:
    """Where the channels of a tensor went, and how many it has now."""

    places: NDArray[np.intp]
    size: int


def _pad_sequence(
    layers: tuple[FrozenLayer, ...] | list[FrozenLayer], layout: _Layout, multiple: int
) -> tuple[tuple[FrozenLayer, ...], _Layout]:
    padded = []
    before = layout
    for layer in layers:
        result = _result_layout(layer, before, multiple)
        padded.append(_pad_layer(layer, layout, result))
        before, layout = layout, result
    return tuple(padded), layout


def _result_layout(layer: FrozenLayer, before: _Layout, multiple: int) -> _Layout:
    channels = len(layer.weight)
    # A residual adds channel by channel: its channels must lie where the tap's do.
    fixed = before.places if layer.residual else np.zeros(0, np.intp)
    least = max(channels, before.size if layer.residual else 0)
    size = -(-least // multiple) * multiple
    free = np.setdiff1d(np.arange(size), fixed)
    return _Layout(np.concatenate([fixed, free[: channels - len(fixed)]]), size)


def _pad_layer(layer: FrozenLayer, source: _Layout, result: _Layout) -> FrozenLayer:
    def spread(values: NDArray[np.float32], layout: _Layout) -> NDArray[np.float32]:
        padded = np.zeros(layout.size, np.float32)
        padded[layout.places] = values
        return padded

    weight = np.zeros((result.size, source.size, *layer.weight.shape[2:]), np.float32)
    weight[np.ix_(result.places, source.places)] = layer.weight
    return FrozenLayer(
        scale=None if layer.scale is None else spread(layer.scale, source),
        shift=None if layer.shift is None else spread(layer.shift, source),
        slope=None if layer.slope is None else spread(layer.slope, source),
        weight=weight,
        bias=spread(layer.bias, result),
        residual=layer.residual,
    )


def cost(spec: NetworkSpec, form: str) -> Cost:
    """Estimate what one tile costs in a form, from the operations TensorRT-RTX makes of it.

    Counted are: per convolution its input read and its result written, the residual read with it;
    per activation a pass of its own over what it changes (bench/results/tensorrt_layers.md shows
    that PReLU is not joined with the convolution, and that the residual sum is); a copy for every
    crop; for the published form, the joined map written and read with its edge; for the transposed
    one, every term of the first FC layer written, all but the first read by what adds it, and the
    joined map where a residual needs it.

    Raises
    ------
    UsageError
        There is no such form.
    """
    build, multiple = _FORMS[check_form(form)]
    operations = list(_operations(spec, multiple, stretched=build is transposed))
    return Cost(
        multiply_adds=sum(work for work, _ in operations),
        bytes=_HALF_BYTES * sum(moved for _, moved in operations),
        time=sum(
            max(2 * work // OPERATIONS_PER_BYTE, _HALF_BYTES * moved) for work, moved in operations
        ),
    )


def _operations(spec: NetworkSpec, multiple: int, *, stretched: bool) -> Iterator[tuple[int, int]]:
    """(multiply-adds, values read and written) of each operation on one tile."""

    def padded(channels: int) -> int:
        return channels if channels == 1 else -(-channels // multiple) * multiple

    for pathway in spec.pathways:
        side = spec.input_size(pathway)
        maps = [1, *map(padded, pathway.feature_maps)]
        for layer, (source, target) in enumerate(itertools.pairwise(maps), 1):
            read, wrote = source * side**3, target * (side - KERNEL + 1) ** 3
            side -= KERNEL - 1
            if layer > 1:
                yield 0, 2 * read
            tap = wrote if layer in pathway.residual_layers else 0
            if tap:
                yield 0, 2 * tap
            yield side**3 * KERNEL**3 * source * target, read + wrote + tap
    edge = spec.fc_kernel // 2
    first = padded(spec.fc_maps[0])
    result = first * spec.out**3
    joined = sum(padded(pathway.feature_maps[-1]) for pathway in spec.pathways)
    whole = joined * spec.out**3
    tapped = 2 in spec.fc_residual_layers
    if stretched:
        for pathway in spec.pathways:
            yield _first_term(spec, pathway.factor, padded(pathway.feature_maps[-1]), first)
        yield 0, result * (len(spec.pathways) - 1)
        if tapped:
            yield 0, 2 * whole
    else:
        edged = joined * (spec.out + 2 * edge) ** 3
        yield 0, 2 * whole + edged
        yield spec.out**3 * spec.fc_kernel**3 * joined * first, edged + result
    maps = [padded(channels) for channels in spec.fc_maps]
    for layer, (source, target) in enumerate(itertools.pairwise(maps), 2):
        read, wrote = source * spec.out**3, target * spec.out**3
        yield 0, 2 * read
        tap = wrote if layer in spec.fc_residual_layers else 0
        yield spec.out**3 * source * target, read + wrote + tap
    yield spec.out**3 * maps[-1], maps[-1] * spec.out**3


def _first_term(spec: NetworkSpec, factor: int, channels: int, first: int) -> tuple[int, int]:
    """The first FC layer on one pathway's own grid, its activation and padding included."""
    cells = -(-spec.out // factor) + 2 * reach(factor, spec.fc_kernel)
    read, wrote = channels * cells**3, first * spec.out**3
    if factor == 1:
        work = spec.out**3 * spec.fc_kernel**3
    else:
        work = cells**3 * (factor + spec.fc_kernel - 1) ** 3
    return work * channels * first, 3 * read + wrote
