"""Small architectures, for what goes by tiles and pathways alone and needs no weights."""

from __future__ import annotations

from hypothesis import strategies as st

from trtseg.architecture import NetworkSpec, PathwaySpec


def small(tile: int, layers: int = 1, factors: tuple[int, ...] = (3,)) -> NetworkSpec:
    """Receptive field 1 + 2 x `layers`."""
    return NetworkSpec(
        pathways=tuple(
            PathwaySpec(factor, (1,) * layers, (), (0.0,) * layers) for factor in (1, *factors)
        ),
        fc_maps=(1,),
        fc_residual_layers=(),
        fc_dropout=(0.0, 0.0),
        tile=tile,
        batch=3,
    )


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    """Up to three layers and three subsampled pathways, results of 1 to 8 voxels per axis."""
    layers = draw(st.integers(1, 3))
    field = 1 + 2 * layers
    factors = draw(st.lists(st.integers(2, 7), unique=True, max_size=3))
    return small(draw(st.integers(field, field + 7)), layers, tuple(factors))


#: Scans that are smaller than a tile, or take one, or several.
shapes = st.tuples(*[st.integers(1, 19)] * 3)
