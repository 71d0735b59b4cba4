from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tests.build.networks import TINY, Arrays, random_inputs, random_variables
from tests.golden import DATA, GOLDEN, read_golden, read_voxels
from trtseg import tiling
from trtseg.architecture import PUBLISHED, NetworkSpec, PathwaySpec
from trtseg.build import checkpoint
from trtseg.build.reference import batch_norm, evaluate
from trtseg.build.variables import network_variables

Array = NDArray[np.float64]


def network(
    *maps: int,
    residuals: tuple[int, ...] = (),
    factors: tuple[int, ...] = (),
    out: int = 1,
    fc_kernel: int = 1,
) -> NetworkSpec:
    """Pathways of the given maps and one hidden FC layer of one channel; results of side `out`."""
    dropout = (0.0,) * len(maps)
    return NetworkSpec(
        pathways=tuple(PathwaySpec(f, maps, residuals, dropout) for f in (1, *factors)),
        fc_maps=(1,),
        fc_kernel=fc_kernel,
        fc_residual_layers=(),
        fc_dropout=(0.0, 0.0),
        rolling_batches=2,
        train_segment=2 * len(maps) + 3,
        train_batch=2,
        tile=2 * len(maps) + out,
    )


def transparent_variables(spec: NetworkSpec) -> Arrays:
    """Batch norm and PReLU as the identity, convolutions and biases zero, but for the FC layers.

    The hidden FC layer passes channel 0 on (the centre tap of its kernel), and class 1 scores what
    it gets, class 0 nothing: `logit` then shows the pathways' channel 0.
    """
    layout = network_variables(spec)
    variables = {name: np.zeros(shape, np.float32) for name, shape in layout.required(spec).items()}
    for layer in [*(one for pathway in layout.pathways for one in pathway), *layout.fc]:
        if layer.norm is not None:
            scale, _, slope, _, variance = layer.norm_names()
            variables[scale][:] = 1
            variables[slope][:] = 1
            variables[variance][:] = (layer.samples - 1) / layer.samples
    centre = spec.fc_kernel // 2
    variables[layout.fc[0].weight][0, 0, centre, centre, centre] = 1
    variables[layout.fc[1].weight][1, 0] = 1
    return variables


def logit(variables: Arrays, spec: NetworkSpec, inputs: Arrays) -> Array:
    found = evaluate(variables, spec, inputs)
    assert found.dtype == np.float64
    assert found.shape == (spec.out,) * 3
    return np.log(found / (1 - found))


def ramp(side: int) -> NDArray[np.float32]:
    """A small value of its own for every voxel of (1, side, side, side)."""
    return (np.arange(side**3, dtype=np.float32) / side**3).reshape(1, side, side, side)


def test_one_layer_by_hand() -> None:
    spec = NetworkSpec(
        pathways=(PathwaySpec(1, (1,), (), (0.0,)),),
        fc_maps=(1,),
        fc_kernel=1,
        fc_residual_layers=(),
        fc_dropout=(0.25, 0.5),
        rolling_batches=2,
        train_segment=3,
        train_batch=2,
        tile=3,
    )
    values = {
        "net/b": [0.5],
        "net/W": np.ones((1, 1, 3, 3, 3)),
        # 27 voxels of 1 + 0.5 sum to 40.5. Two values per channel in training: n / (n - 1) = 2.
        "net/muBnsForRollingAverage": [[43.5], [45.5]],  # mean 44.5
        "net/varBnsForRollingAverage": [[1.5], [2.5]],  # mean 2, corrected 4, deviation 2
        "net/gBn": [3],
        "net/bBn": [1],  # 3 * (40.5 - 44.5) / 2 + 1 = -5
        "net/aPrelu": [0.2],  # -1
        "net/W_1": np.full((1, 1, 1, 1, 1), 2),  # keep 0.75: -0.75; times 2: -1.5
        "net/muBnsForRollingAverage_1": [[-1], [0]],
        "net/varBnsForRollingAverage_1": [[0.125], [0.125]],  # corrected 0.25, deviation 0.5
        "net/gBn_1": [-1],
        "net/bBn_1": [0.25],  # -(-1.5 + 0.5) / 0.5 + 0.25 = 2.25
        "net/aPrelu_1": [100],  # positive: stays
        "net/W_2": np.reshape([0.8, -0.8], (2, 1, 1, 1, 1)),  # keep 0.5: 1.125; +0.9 and -0.9
        "net/b_1": [0.1, 1.4],  # 1.0 and 0.5
    }
    variables = {name: np.asarray(array, np.float32) for name, array in values.items()}
    found = evaluate(variables, spec, {"normal": np.ones((1, 3, 3, 3), np.float32)})
    assert found.shape == (1, 1, 1)
    assert found.item() == pytest.approx(1 / (1 + np.exp(0.5)), abs=1e-7)  # 0.3775


def test_batch_norm_corrects_the_bias_of_the_variance() -> None:
    layer = network_variables(PUBLISHED).pathways[0][1]
    scale, shift, slope, mean, variance = layer.norm_names()
    rows = np.arange(60, dtype=np.float32)[:, None]  # mean 29.5
    channels = np.ones(30, np.float32)
    variables = {
        scale: 6 * channels,
        shift: 5 * channels,
        slope: channels / 4,
        mean: rows * channels,
        variance: (rows + 6.5) * channels,  # mean 36
    }
    found_scale, found_shift, found_slope = batch_norm(variables, layer)
    correction = 60835 / 60834  # n = 5 * 23^3
    np.testing.assert_allclose(found_scale, 1 / np.sqrt(correction), rtol=1e-14)
    np.testing.assert_allclose(found_shift, 5 - 29.5 / np.sqrt(correction), rtol=1e-14)
    np.testing.assert_array_equal(found_slope, 0.25)
    assert found_scale.dtype == found_shift.dtype == found_slope.dtype == np.float64


def test_batch_norm_of_no_variance_divides_by_the_root_of_epsilon() -> None:
    layer = network_variables(PUBLISHED).fc[0]
    shapes = network_variables(PUBLISHED).required(PUBLISHED)
    variables = {name: np.zeros(shapes[name], np.float32) for name in layer.norm_names()}
    variables[layer.norm_names()[0]][:] = 1
    scale, shift, _ = batch_norm(variables, layer)
    np.testing.assert_allclose(scale, 9.205746178983233e18, rtol=1e-12)  # 1 / sqrt(1.18e-38)
    np.testing.assert_array_equal(shift, 0.0)


def test_convolution_is_correlation_without_padding() -> None:
    spec = network(1, out=3)
    variables = transparent_variables(spec)
    variables["net/W"][0, 0, 0, 1, 2] = 1
    image = ramp(5)
    found = logit(variables, spec, {"normal": image})
    np.testing.assert_allclose(found, image[0, 0:3, 1:4, 2:5], atol=1e-6)


def test_first_layer_adds_its_bias_and_has_no_activation() -> None:
    spec = network(1)
    variables = transparent_variables(spec)
    variables["net/W"][0, 0, 1, 1, 1] = 2
    variables["net/b"][0] = -3
    image = np.full((1, 3, 3, 3), 0.5, np.float32)
    assert logit(variables, spec, {"normal": image}).item() == pytest.approx(-5.0, abs=1e-6)


def test_prelu_has_one_slope_per_channel() -> None:
    spec = network(2)
    variables = transparent_variables(spec)
    variables["net/W"][:, 0, 1, 1, 1] = [-2, -3]
    variables["net/aPrelu"][:] = [0.5, 0.1]
    variables["net/W_1"][0, :, 0, 0, 0] = [1, 2]
    inputs = {"normal": np.ones((1, 3, 3, 3), np.float32)}
    assert logit(variables, spec, inputs).item() == pytest.approx(-1 - 0.6, abs=1e-6)
    variables["net/W"] *= -1
    assert logit(variables, spec, inputs).item() == pytest.approx(2 + 6, abs=1e-6)


def test_residual_is_the_raw_input_of_the_layer_before_on_the_first_channels() -> None:
    spec = network(1, 1, 2, residuals=(3,), out=2)
    variables = transparent_variables(spec)
    variables["net/W"][0, 0, 1, 1, 1] = 1
    # Batch norm and slope of layer 2 act on what it convolves (nothing here), not on the tap.
    variables["net/gBn"][0] = 7
    variables["net/bBn"][0] = 9
    variables["net/aPrelu"][0] = 0
    image = ramp(8) - np.float32(0.5)
    found = logit(variables, spec, {"normal": image})
    np.testing.assert_allclose(found, image[0, 3:5, 3:5, 3:5], atol=1e-6)
    variables["net/W_3"][0, :, 0, 0, 0] = [0, 1]  # the second channel gains nothing
    np.testing.assert_allclose(logit(variables, spec, {"normal": image}), 0, atol=1e-12)


def test_residual_taps_hold_earlier_residuals() -> None:
    spec = network(1, 1, 1, 1, residuals=(2, 4), out=1)
    variables = transparent_variables(spec)
    # Layer 2 gains the image, layer 3 doubles that and layer 4 gains layer 2's sum only.
    variables["net/W_2"][0, 0, 1, 1, 1] = 2
    image = ramp(9)
    found = logit(variables, spec, {"normal": image})
    np.testing.assert_allclose(found, image[0, 4:5, 4:5, 4:5], atol=1e-6)
    variables["net/W_3"][0, 0, 1, 1, 1] = 1
    found = logit(variables, spec, {"normal": image})
    np.testing.assert_allclose(found, 3 * image[0, 4:5, 4:5, 4:5], atol=1e-6)


def test_fc_residual_is_the_centre_of_the_padded_concatenation() -> None:
    spec = NetworkSpec(
        pathways=(PathwaySpec(1, (1,), (), (0.0,)),),
        fc_maps=(1, 2),
        fc_residual_layers=(2,),
        fc_dropout=(0.0, 0.0, 0.0),
        rolling_batches=2,
        train_segment=3,
        train_batch=2,
        tile=6,
    )
    variables = transparent_variables(spec)
    variables["net/W"][0, 0, 1, 1, 1] = 1
    variables["net/W_1"][:] = 0
    variables["net/W_2"][:] = 0
    variables["net/W_3"][1] = np.reshape([1, 100], (2, 1, 1, 1))
    image = ramp(6)
    found = logit(variables, spec, {"normal": image})
    np.testing.assert_allclose(found, image[0, 1:5, 1:5, 1:5], atol=1e-6)


def test_subsampled_results_are_repeated_and_cut_at_the_end() -> None:
    spec = network(1, factors=(3,), out=4)
    variables = transparent_variables(spec)
    variables["net/W_1"][0, 0, 1, 1, 1] = 1
    variables["net/W_2"][0, :, 0, 0, 0] = [0, 1]  # the subsampled pathway is the second channel
    assert spec.input_sizes() == {"normal": 6, "sub3": 4}
    image = ramp(4)
    found = logit(variables, spec, {"normal": ramp(6), "sub3": image})
    low, high = image[0, 1, 1, 1], image[0, 2, 2, 2]
    np.testing.assert_allclose(found[[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]], [low] * 3 + [high])
    np.testing.assert_allclose(found[:, 0, 0], [low] * 3 + [image[0, 2, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(found[0, :, 0], [low] * 3 + [image[0, 1, 2, 1]], atol=1e-6)
    np.testing.assert_allclose(found[0, 0, :], [low] * 3 + [image[0, 1, 1, 2]], atol=1e-6)


def test_first_fc_layer_sees_repeated_edges() -> None:
    spec = network(1, out=3, fc_kernel=3)
    variables = transparent_variables(spec)
    variables["net/W"][0, 0, 1, 1, 1] = 1
    variables["net/W_1"][:] = 0
    variables["net/W_1"][0, 0, 0, 1, 2] = 1  # the neighbour before (r) and behind (z)
    image = ramp(5)
    found = logit(variables, spec, {"normal": image})
    expected = image[0, 1:4, 1:4, 1:4][[0, 0, 1]][:, :, [1, 2, 2]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_softmax_of_large_scores_does_not_overflow() -> None:
    spec = network(1)
    variables = transparent_variables(spec)
    inputs = {"normal": np.zeros((1, 3, 3, 3), np.float32)}
    variables["net/b_1"][:] = [5000, 5001]
    assert evaluate(variables, spec, inputs).item() == pytest.approx(0.7310585786300049, abs=1e-12)
    variables["net/b_1"][:] = [3000, -3000]
    assert evaluate(variables, spec, inputs).item() == 0.0
    variables["net/b_1"][:] = [7, 7]
    assert evaluate(variables, spec, inputs).item() == 0.5


def by_scipy(variables: Arrays, spec: NetworkSpec, inputs: Arrays) -> Array:
    """The network once more, with scipy's correlation and names counted up as they come."""
    names = dict.fromkeys(("W", "b", "gBn"), -1)

    def take(stem: str, like: str = "") -> Array:
        if not like:
            names[stem] += 1
        number = names[like or stem]
        return variables[f"net/{stem}" + (f"_{number}" if number else "")].astype(float)

    def normalised(values: Array, batch: int) -> Array:
        gain, bias = take("gBn"), take("bBn", "gBn")
        slope = take("aPrelu", "gBn")
        mean = take("muBnsForRollingAverage", "gBn").mean(0)
        variance = take("varBnsForRollingAverage", "gBn").mean(0) * batch / (batch - 1)
        channels = []
        for n, channel in enumerate(values):
            y = gain[n] * (channel - mean[n]) / np.sqrt(variance[n] + 1.18e-38) + bias[n]
            channels.append(np.where(y > 0, y, slope[n] * y))
        return np.stack(channels)

    def convolved(values: Array) -> Array:
        kernels = take("W")
        edge = kernels.shape[-1] // 2
        inner = (slice(edge, n - edge) for n in values.shape[1:])
        where = tuple(inner)
        return np.stack(
            [
                sum(
                    ndimage.correlate(channel, kernel, mode="constant")[where]
                    for channel, kernel in zip(values, kernels_of_one, strict=True)
                )
                for kernels_of_one in kernels
            ]
        )

    def with_tap(values: Array, tap: Array) -> Array:
        lost = (tap.shape[1] - 1) // 2 - (values.shape[1] - 1) // 2
        there = slice(lost, lost + values.shape[1])
        values[: len(tap)] += tap[:, there, there, there]
        return values

    joined = []
    for pathway in spec.pathways:
        sees = -(-(spec.train_segment - spec.receptive_field + 1) // pathway.factor)
        sees += spec.receptive_field - 1
        raw = [inputs[pathway.name].astype(float)]
        for layer in range(1, pathway.layers + 1):
            if layer == 1:
                values = raw[0] + take("b")[0]
            else:
                values = normalised(raw[-1], spec.train_batch * (sees - 2 * (layer - 1)) ** 3)
            result = convolved(values * (1 - pathway.dropout[layer - 1]))
            if layer in pathway.residual_layers:
                result = with_tap(result, raw[-2])
            raw.append(result)
        index = np.arange(spec.out) // pathway.factor
        joined.append(raw[-1][:, index][:, :, index][:, :, :, index])
    values = np.concatenate(joined)
    reach = np.clip(np.arange(-(spec.fc_kernel // 2), spec.out + spec.fc_kernel // 2), 0, None)
    reach = np.minimum(reach, spec.out - 1)
    raw = [values[:, reach][:, :, reach][:, :, :, reach]]
    for layer in range(1, len(spec.fc_maps) + 2):
        side = spec.train_segment - spec.receptive_field + 1
        side += spec.fc_kernel - 1 if layer == 1 else 0
        values = normalised(raw[-1], spec.train_batch * side**3)
        result = convolved(values * (1 - spec.fc_dropout[layer - 1]))
        if layer in spec.fc_residual_layers:
            result = with_tap(result, raw[-2])
        raw.append(result)
    scores = raw[-1] + take("b")[:, None, None, None]
    return 1 / (1 + np.exp(scores[0] - scores[1]))


UNEQUAL = NetworkSpec(
    pathways=(
        PathwaySpec(1, (2, 2, 3, 3), (2, 3, 4), (0.0, 0.25, 0.0, 0.5)),
        PathwaySpec(2, (1, 2, 3, 4), (3,), (0.0,) * 4),
        PathwaySpec(5, (3, 3, 3, 2), (), (0.1, 0.0, 0.0, 0.0)),
    ),
    fc_maps=(6, 9, 7),
    fc_kernel=5,
    fc_residual_layers=(2, 3),
    fc_dropout=(0.2, 0.0, 0.5, 0.5),
    rolling_batches=3,
    train_segment=11,
    train_batch=1,
    tile=14,
)


@pytest.mark.parametrize("spec", [TINY, UNEQUAL], ids=["tiny", "unequal"])
def test_random_networks_agree_with_scipy(spec: NetworkSpec) -> None:
    variables = random_variables(spec, seed=4)
    inputs = random_inputs(spec, seed=5)
    found = evaluate(variables, spec, inputs)
    np.testing.assert_allclose(found, by_scipy(variables, spec, inputs), rtol=1e-10)
    assert found.std() > 0.02


def test_last_tile_of_a_golden_scan() -> None:
    # 12 x 20 x 35 voxels: two tiles along the third axis; the second covers all from voxel 6 on.
    volume = read_voxels(GOLDEN / "net_tiny" / "scan.nii.gz").astype(np.float32)
    plan = tiling.plan_tiles(volume.shape, PUBLISHED)
    assert plan.starts.tolist() == [[0, 0, 0], [0, 0, 6]]
    variables = checkpoint.read_variables(
        DATA / "checkpoints" / "random11" / "cgm.model.ckpt",
        network_variables(PUBLISHED).required(PUBLISHED),
    )
    inputs = tiling.gather(tiling.pad(volume, plan), plan.starts[1:], PUBLISHED)
    tile = evaluate(variables, PUBLISHED, {name: batch[0] for name, batch in inputs.items()})
    found = tile[:12, :20]
    golden = read_golden("net_tiny")
    scaled, labels = golden.scaled[:, :, 6:], golden.labels[:, :, 6:]
    # DeepMedic computed in float32; the golden map is rounded to 1 / 65535.
    np.testing.assert_allclose(found, scaled / 65535, rtol=0, atol=2.5e-5)
    decided = ~golden.undecided[:, :, 6:]
    np.testing.assert_array_equal((found > 0.5)[decided], labels[decided] == 1)
    assert 0 < labels.sum() < labels.size
