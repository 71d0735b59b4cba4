"""Which checkpoint variables make up which layer: DeepMedic's naming, from the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtseg.architecture import KERNEL

if TYPE_CHECKING:
    from trtseg.architecture import NetworkSpec, PathwaySpec


@dataclass(frozen=True)
class LayerVariables:
    """Variable names and shapes of one layer, with what inference needs besides.

    Attributes
    ----------
    weight : str
        Convolution weights, [out, in, r, c, z].
    weight_shape : tuple of int
    norm : int or None
        Index of the batch-norm variables (``gBn``, ``bBn``, ``aPrelu`` and the rolling averages);
        None for a pathway's first layer, which has neither batch norm nor activation.
    input_bias : str or None
        Scalar added to the image, for a pathway's first layer.
    samples : int
        Values per channel that batch norm averaged over in training (its n).
    keep : float
        1 - dropout rate: the factor on the layer's input at inference.
    residual : bool
        Whether the output gains the centre crop of the input of the layer before.
    """

    weight: str
    weight_shape: tuple[int, ...]
    norm: int | None
    input_bias: str | None
    samples: int
    keep: float
    residual: bool

    def norm_names(self) -> tuple[str, str, str, str, str]:
        """Names of scale, shift, PReLU slope, rolling mean and rolling variance."""
        assert self.norm is not None
        g, b, a, mu, var = (
            numbered(stem, self.norm)
            for stem in (
                "gBn",
                "bBn",
                "aPrelu",
                "muBnsForRollingAverage",
                "varBnsForRollingAverage",
            )
        )
        return g, b, a, mu, var


@dataclass(frozen=True)
class NetworkVariables:
    """All layers of a network: per pathway, then FC (the classification layer last)."""

    pathways: tuple[tuple[LayerVariables, ...], ...]
    fc: tuple[LayerVariables, ...]
    softmax_bias: str

    def required(self, spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor inference needs."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in [*(one for pathway in self.pathways for one in pathway), *self.fc]:
            shapes[layer.weight] = layer.weight_shape
            if layer.input_bias is not None:
                shapes[layer.input_bias] = (spec.channels,)
            if layer.norm is not None:
                channels = layer.weight_shape[1]
                scale, shift, slope, mean, variance = layer.norm_names()
                shapes.update(dict.fromkeys((scale, shift, slope), (channels,)))
                shapes.update(dict.fromkeys((mean, variance), (spec.rolling_batches, channels)))
        shapes[self.softmax_bias] = (spec.classes,)
        return shapes


def numbered(stem: str, index: int) -> str:
    """TensorFlow's name of the `index`-th variable called `stem` (0 has no suffix)."""
    return f"net/{stem}" if index == 0 else f"net/{stem}_{index}"


def network_variables(spec: NetworkSpec) -> NetworkVariables:
    """Lay out the variables of `spec` in DeepMedic's creation order.

    Names count up over the normal pathway, the subsampled pathways in the config's order, then FC.
    """
    weights = 0
    norms = 0
    pathways = []
    for number, pathway in enumerate(spec.pathways):
        layers = []
        for layer in range(1, pathway.layers + 1):
            first = layer == 1
            layers.append(_pathway_layer(spec, pathway, layer, weights, norms, number))
            weights += 1
            norms += 0 if first else 1
        pathways.append(tuple(layers))
    channels = [spec.concat_channels, *spec.fc_maps, spec.classes]
    fc = []
    for layer in range(1, len(channels)):
        side = spec.fc_kernel if layer == 1 else 1
        fc.append(
            LayerVariables(
                weight=numbered("W", weights),
                weight_shape=(channels[layer], channels[layer - 1], side, side, side),
                norm=norms,
                input_bias=None,
                samples=spec.fc_bn_samples(layer),
                keep=1.0 - spec.fc_dropout[layer - 1],
                residual=layer in spec.fc_residual_layers,
            )
        )
        weights += 1
        norms += 1
    return NetworkVariables(tuple(pathways), tuple(fc), numbered("b", len(spec.pathways)))


def _pathway_layer(
    spec: NetworkSpec, pathway: PathwaySpec, layer: int, weight: int, norm: int, number: int
) -> LayerVariables:
    first = layer == 1
    return LayerVariables(
        weight=numbered("W", weight),
        weight_shape=(
            pathway.feature_maps[layer - 1],
            pathway.in_channels(layer),
            KERNEL,
            KERNEL,
            KERNEL,
        ),
        norm=None if first else norm,
        input_bias=numbered("b", number) if first else None,
        samples=spec.bn_samples(pathway, layer),
        keep=1.0 - pathway.dropout[layer - 1],
        residual=layer in pathway.residual_layers,
    )
