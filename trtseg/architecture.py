"""The shape of a DeepMedic v0.7.0 network: layers, tile sizes and cost. Numbers only, no weights.

Source of every formula: DeepMedic v0.7.0 (Kamnitsas et al. 2017); the published configuration is
that of Fetit et al., MIDL 2020, for both of its networks.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trtseg.errors import ModelError

#: The two networks, in the order they run: brain mask, then cortical grey matter inside it.
NETWORKS = ("bdn", "cgm")

#: Kernel side of every convolution of the pathways; DeepMedic allows others, trtseg does not.
KERNEL = 3


@dataclass(frozen=True)
class PathwaySpec:
    """One convolutional pathway.

    Attributes
    ----------
    factor : int
        Subsampling factor of its input per axis; 1 is the normal pathway.
    feature_maps : tuple of int
        Output channels of each layer, first to last.
    residual_layers : tuple of int
        1-based layers L whose output gains the centre crop of the input of layer L - 1.
    dropout : tuple of float
        Dropout rate of each layer; at inference the layer's input is multiplied by 1 - rate.
    """

    factor: int
    feature_maps: tuple[int, ...] = (30, 30, 40, 40, 40, 40, 50, 50)
    residual_layers: tuple[int, ...] = (4, 6, 8)
    dropout: tuple[float, ...] = (0.0,) * 8

    @property
    def layers(self) -> int:
        """Number of convolutions."""
        return len(self.feature_maps)

    @property
    def name(self) -> str:
        """Name of the pathway's input in every graph form: ``normal``, ``sub3``, ``sub5``."""
        return "normal" if self.factor == 1 else f"sub{self.factor}"

    def in_channels(self, layer: int) -> int:
        """Input channels of the 1-based `layer` (1 for the first: the image)."""
        return 1 if layer == 1 else self.feature_maps[layer - 2]


@dataclass(frozen=True)
class NetworkSpec:
    """A whole network; the defaults are the two published ones.

    Attributes
    ----------
    pathways : tuple of PathwaySpec
        The normal pathway (factor 1) first, then the subsampled ones in the config's order.
    fc_maps : tuple of int
        Channels of the hidden "fully connected" (1x1x1 but for the first) layers.
    fc_kernel : int
        Kernel side of the first FC layer.
    fc_residual_layers : tuple of int
        As for pathways; layer 1 is the first FC layer.
    fc_dropout : tuple of float
        One rate per FC layer and one for the classification layer.
    rolling_batches : int
        Rows of the batch-norm rolling averages.
    train_segment, train_batch : int
        Side of the training segment and the training batch: they set the n of the batch-norm
        variance's n / (n - 1).
    tile : int
        Side of the inference segment, in voxels.
    batch : int
        Inference batch of the published system; the result does not depend on it.
    classes, channels : int
        Output classes and image channels.
    """

    pathways: tuple[PathwaySpec, ...] = (PathwaySpec(1), PathwaySpec(3), PathwaySpec(5))
    fc_maps: tuple[int, ...] = (250, 250)
    fc_kernel: int = 3
    fc_residual_layers: tuple[int, ...] = (2,)
    fc_dropout: tuple[float, ...] = (0.0, 0.5, 0.5)
    rolling_batches: int = 60
    train_segment: int = 25
    train_batch: int = 5
    tile: int = 45
    batch: int = 5
    classes: int = field(default=2)
    channels: int = field(default=1)

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        def refuse(what: str, expected: str) -> None:
            raise ModelError(f"architecture: {what}", expected=expected)

        if not self.pathways or self.pathways[0].factor != 1:
            refuse("no normal pathway", "the first pathway to have factor 1")
        factors = [pathway.factor for pathway in self.pathways]
        if len(set(factors)) != len(factors) or min(factors) < 1:
            refuse(f"subsampling factors {factors[1:]}", "different whole numbers above 1")
        for pathway in self.pathways:
            if pathway.layers != self.pathways[0].layers or pathway.layers < 1:
                refuse(
                    f"{pathway.name} has {pathway.layers} layers",
                    f"as many as the normal pathway ({self.pathways[0].layers}), which sets the "
                    "receptive field",
                )
            if len(pathway.dropout) != pathway.layers:
                refuse(f"{pathway.name} has {len(pathway.dropout)} dropout rates", "one per layer")
            _check_residuals(pathway.name, pathway.feature_maps, pathway.residual_layers, 1)
        if self.classes != 2 or self.channels != 1:
            refuse(f"{self.classes} classes, {self.channels} channels", "2 classes, 1 channel")
        if not self.fc_maps:
            refuse("no hidden FC layer", "at least one")
        if self.fc_kernel < 1 or self.fc_kernel % 2 == 0:
            refuse(f"first FC kernel {self.fc_kernel}", "an odd number")
        if len(self.fc_dropout) != len(self.fc_maps) + 1:
            refuse(
                f"{len(self.fc_dropout)} FC dropout rates",
                f"{len(self.fc_maps) + 1}: one per FC layer and one for the classification layer",
            )
        _check_residuals("FC", self.fc_maps, self.fc_residual_layers, self.concat_channels)
        rates = [rate for pathway in self.pathways for rate in pathway.dropout]
        for rate in [*rates, *self.fc_dropout]:
            if not 0.0 <= rate < 1.0:
                refuse(f"dropout rate {rate}", "0 <= rate < 1")
        if min(self.tile, self.train_segment) < self.receptive_field:
            refuse(
                f"inference segment {self.tile}, training segment {self.train_segment}",
                f"both at least the receptive field, {self.receptive_field}",
            )
        if min(self.rolling_batches, self.batch, self.train_batch) < 1:
            refuse("a batch size or rolling length below 1", "at least 1")
        # FC layer 2 averages over the fewest values; its variance is scaled by n / (n - 1).
        if self.fc_bn_samples(2) < 2:
            refuse(
                f"training segment {self.train_segment} with training batch {self.train_batch}",
                "at least two values per channel for batch norm: a larger segment or batch",
            )

    @property
    def receptive_field(self) -> int:
        """Voxels per axis that one output voxel of a pathway depends on."""
        return 1 + (KERNEL - 1) * self.pathways[0].layers

    @property
    def margin(self) -> int:
        """Voxels per side that valid convolutions take off a tile."""
        return (self.receptive_field - 1) // 2

    @property
    def out(self) -> int:
        """Side of a tile's result, and the stride from tile to tile."""
        return self.tile - self.receptive_field + 1

    @property
    def concat_channels(self) -> int:
        """Channels after the pathways are concatenated."""
        return sum(pathway.feature_maps[-1] for pathway in self.pathways)

    def input_size(self, pathway: PathwaySpec, *, segment: int | None = None) -> int:
        """Side of a pathway's input for a segment of side `segment` (default: the tile)."""
        out = (self.tile if segment is None else segment) - self.receptive_field + 1
        return -(-out // pathway.factor) + self.receptive_field - 1

    def input_sizes(self) -> dict[str, int]:
        """Input name to side, for all pathways, in order."""
        return {pathway.name: self.input_size(pathway) for pathway in self.pathways}

    def bn_samples(self, pathway: PathwaySpec, layer: int) -> int:
        """Values per channel that batch norm of the 1-based `layer` averaged over in training."""
        side = self.input_size(pathway, segment=self.train_segment) - (KERNEL - 1) * (layer - 1)
        return int(self.train_batch * side**3)

    def fc_bn_samples(self, layer: int) -> int:
        """The same for the 1-based FC `layer` (hidden layers, then the classification layer)."""
        side = self.train_segment - self.receptive_field + 1
        if layer == 1:
            side += self.fc_kernel - 1
        return int(self.train_batch * side**3)

    def multiply_adds(self) -> int:
        """Multiply-adds of one tile in the published graph form (repeat, concatenate, convolve)."""
        total = 0
        for pathway in self.pathways:
            side = self.input_size(pathway)
            for layer in range(1, pathway.layers + 1):
                side -= KERNEL - 1
                maps = pathway.in_channels(layer) * pathway.feature_maps[layer - 1]
                total += side**3 * KERNEL**3 * maps
        channels = [self.concat_channels, *self.fc_maps, self.classes]
        for layer, (source, target) in enumerate(itertools.pairwise(channels)):
            kernel = self.fc_kernel if layer == 0 else 1
            total += self.out**3 * kernel**3 * source * target
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NetworkSpec:
        """Rebuild a spec from `to_dict`'s form.

        Raises
        ------
        ModelError
            A field is missing, unknown, or out of scope.
        """
        try:
            _refuse_unknown(cls, data)
            for pathway in data["pathways"]:
                _refuse_unknown(PathwaySpec, pathway)
            values = {f.name: data[f.name] for f in fields(cls)}
            pathways = tuple(
                PathwaySpec(
                    factor=int(p["factor"]),
                    feature_maps=tuple(p["feature_maps"]),
                    residual_layers=tuple(p["residual_layers"]),
                    dropout=tuple(p["dropout"]),
                )
                for p in values.pop("pathways")
            )
            for name in ("fc_maps", "fc_residual_layers", "fc_dropout"):
                values[name] = tuple(values[name])
            return cls(pathways=pathways, **values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(
                f"an architecture that cannot be read ({error!r})",
                expected="the fields this version of trtseg writes",
                action="build again: trtseg engines build",
            ) from error


def _refuse_unknown(kind: Any, data: dict[str, Any]) -> None:
    unknown = set(data) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")


def _check_residuals(
    name: str, maps: tuple[int, ...], layers: tuple[int, ...], first_input: int
) -> None:
    for number in maps:
        if number < 1:
            raise ModelError(f"architecture: {name} has {number} feature maps", expected="above 0")
    for layer in layers:
        if not 2 <= layer <= len(maps):
            raise ModelError(
                f"architecture: {name} residual layer {layer}",
                expected=f"2 to {len(maps)} (a residual joins the input of the layer before)",
            )
        source = first_input if layer == 2 else maps[layer - 3]
        if maps[layer - 1] < source:
            raise ModelError(
                f"architecture: {name} residual layer {layer} has {maps[layer - 1]} feature maps",
                expected=f"at least the {source} of the input it adds",
            )


#: The published networks; BDN and CGM differ in their weights only.
PUBLISHED = NetworkSpec()
