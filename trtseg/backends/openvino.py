"""Runs built networks on the CPU with OpenVINO.

Work is shared between tiles where that changes no label: the normal pathway is computed once per
block of tiles; a tile computes only the voxels it has the last word on; tiles that see one constant
value (the background of a masked scan) share one answer. See `trtseg.build.parts` for the graphs.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg import tiling
from trtseg.backends import cpu_ceilings
from trtseg.backends.base import NetworkOutput, Work, logistic
from trtseg.backends.openvino_library import (
    available_threads,
    calling,
    copying_rows,
    graph_refused,
    handing_over_bf16,
    maps_of,
    no_cpu,
    openvino_module,
    settings,
    tensor_of,
    version,
)
from trtseg.backends.work import executed
from trtseg.engine import FC_PART, NORMAL_PART, SUB_PART
from trtseg.errors import DeviceError, EngineError, TrtsegError
from trtseg.phases import box_indices, cell_range, reach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import Ceilings, Progress
    from trtseg.backends.openvino_library import Maps
    from trtseg.engine import Engine
    from trtseg.tiling import TilePlan

    Features = NDArray[np.float32]

#: Voxels of a block: its features take 200 bytes each, and the layers before them several times
#: that, which must fit beside a large scan in a laptop's memory (bench/memory.py).
BLOCK_VOXELS = 48**3

#: Tiles whose subsampled pathways run together.
SUB_BATCH = 4

#: A box of at least this share of its tile is computed as the whole tile: with its size fixed at
#: compile time the last part takes about 0.9 of the time (bench/README.md).
WHOLE_SHARE = 0.85

#: Whole tiles in a plan from which on compiling for their size pays: it takes about 0.13 s, and
#: saves about 4 ms a tile. Every size compiled holds a tile's layers in memory, so no other is.
FIXED_SIZE_BOXES = 32

#: Boxes whose indices are kept, at most 200 kB each and factor: many boxes of a scan are alike.
KEPT_INDICES = 16

#: Bytes of a value in each precision.
VALUE_BYTES = {"f32": 4, "bf16": 2}

#: A constant tile's answer is shared only where it is this far from a tie, in logits: far more than
#: rounding can move it, so that sharing changes no label.
CLEAR_LOGIT = 1e-3

#: Bytes that must be free to read a graph: far more than one of 14 MB takes, 28 MB, and far less
#: than it takes to run.
READING_BYTES = 1 << 27


class OpenVINOBackend:
    """The CPU.

    Parameters
    ----------
    threads : int, optional
        Threads to run on; default `available_threads()`.
    precision : str
        ``"f32"``, which gives DeepMedic's labels, or ``"bf16"``.

    Raises
    ------
    DeviceError
        OpenVINO has no CPU device here, or fails, or the processor lacks the precision.
    MemoryError
        There is not enough memory to start OpenVINO.
    """

    device = "cpu"

    def __init__(self, *, threads: int | None = None, precision: str = "f32") -> None:
        self.threads = available_threads() if threads is None else threads
        self.precision = precision
        # NumPy's OpenBLAS ends the process where there is no room for its buffer; it takes it at
        # its first use, which must not come after the networks have filled the memory.
        np.linalg.det(np.eye(2))
        with calling():
            self._core = openvino_module().Core()
        with calling(no_cpu):
            able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:
            raise DeviceError(
                "this processor has no bfloat16 arithmetic",
                expected="AVX-512 BF16 or AMX for --precision bf16",
                action="run in float32: leave --precision out",
            )

    @property
    def description(self) -> str:
        """Threads and library, for reports."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"cpu, {threads}, OpenVINO {version()}"

    def load(self, engine: Engine) -> OpenVINONetwork:
        """Compile a built network for the CPU.

        Raises
        ------
        EngineError
            OpenVINO refuses a graph.
        DeviceError
            OpenVINO fails otherwise.
        MemoryError
            The memory left is too small for the network.
        """
        names = [NORMAL_PART, FC_PART, *([SUB_PART] if len(engine.spec.pathways) > 1 else [])]
        parts = {name: engine.read(name) for name in names}
        return self.compile(engine.spec, parts, folder=engine.folder)

    def compile(
        self, spec: NetworkSpec, parts: Mapping[str, bytes], *, folder: Path | None = None
    ) -> OpenVINONetwork:
        """Compile the parts of a network.

        Parameters
        ----------
        spec : NetworkSpec
        parts : mapping of str to bytes
            File name to content.
        folder : Path, optional
            Where they were read, for errors.

        Raises
        ------
        EngineError
            OpenVINO refuses a graph.
        DeviceError
            OpenVINO fails otherwise.
        MemoryError
            The memory left is too small for the network.
        """
        with calling():
            models = {name: self._read(name, part, folder) for name, part in parts.items()}
            if self.precision == "bf16":
                models = {
                    name: handing_over_bf16(model, taken=name == FC_PART)
                    for name, model in models.items()
                }
        return OpenVINONetwork(
            spec,
            compiled=functools.partial(self._compile_all, models),
            fc_of_sizes=functools.partial(self._compile_fixed, models[FC_PART]),
            value_bytes=VALUE_BYTES[self.precision],
        )

    def ceilings(self) -> Ceilings:
        """Measure one large convolution and one large copy on as many threads."""
        return cpu_ceilings.measure(self.threads, self.precision)

    def _compile_all(self, models: Mapping[str, Any]) -> dict[str, Any]:
        free = {**models, FC_PART: copying_rows(models[FC_PART])}
        return {name: self._compile(model) for name, model in free.items()}

    def _compile_fixed(self, model: Any, sizes: dict[str, Sequence[int]]) -> Any:
        fixed = model.clone()
        fixed.reshape({name: list(size) for name, size in sizes.items()})
        return self._compile(fixed)

    def _read(self, part: str, graph: bytes, folder: Path | None) -> Any:
        name = f"{part} in memory" if folder is None else str(folder / part)
        # Without room for its copies OpenVINO's reader crashes; NumPy raises. No page is touched.
        np.empty(READING_BYTES, np.uint8)
        with calling(functools.partial(graph_refused, name)):
            return self._core.read_model(graph)

    def _compile(self, model: Any) -> Any:
        with calling(functools.partial(graph_refused, model.get_friendly_name())):
            return self._core.compile_model(model, "CPU", settings(self.threads, self.precision))

    def close(self) -> None:
        """Drop the library's handle; compiled networks go with their last reference."""
        self._core = None


class OpenVINONetwork:
    """A network compiled for the CPU; see `trtseg.backends.base.Network`."""

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        compiled: Callable[[], Mapping[str, Any]],
        fc_of_sizes: Callable[[dict[str, Sequence[int]]], Any],
        value_bytes: int,
    ) -> None:
        self.spec = spec
        self._value_bytes = value_bytes
        self._compiled = compiled
        self._fc_of_sizes = fc_of_sizes
        self._start()

    def _start(self) -> None:
        """Compile the parts."""
        with calling():
            models = self._compiled()
            requests = {name: model.create_infer_request() for name, model in models.items()}
        self._models = list(models.values())
        self._normal: Any = requests[NORMAL_PART]
        self._sub: Any = requests.get(SUB_PART)
        self._fc: Any = requests[FC_PART]
        # The last part compiled for whole tiles, once that has paid.
        self._fc_of_whole: Any = None

    def _drop(self) -> None:
        """Free all that is compiled."""
        self._models = []
        self._normal = self._sub = self._fc = self._fc_of_whole = None

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have the parts compiled inside; where a call fails there, the next one compiles anew."""
        if self._normal is None:
            self._start()
        try:
            yield
        except (MemoryError, TrtsegError):
            # A call that failed leaves its graph half-prepared for its input, and not marked so.
            self._drop()
            raise

    def run(
        self,
        volume: NDArray[np.float32],
        plan: TilePlan,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Decide every box of the plan, block by block.

        Raises
        ------
        DeviceError
            OpenVINO fails.
        MemoryError
            The memory left is too small for the scan. The next one may run.
        """
        padded = tiling.pad(volume, plan)
        output = _Output(plan, probabilities, progress)
        try:
            with self._running():
                varied = self._settle_constant_tiles(padded, output)
                computed = _computed_boxes(plan)
                whole = self._for_whole_tiles(computed, varied)
                for block in tiling.group_tiles(computed, varied, max_voxels=BLOCK_VOXELS):
                    self._run_block(padded, block, computed, output, whole)
        finally:
            # Room for the other network: what a block's layers filled is several times the scan.
            with calling():
                for model in self._models:
                    model.release_memory()
        return NetworkOutput(output.labels, output.maps)

    def work(self, volume: NDArray[np.float32], plan: TilePlan) -> Work:
        """What `run` executes of tiles that do not share an answer."""
        padded = tiling.pad(volume, plan)
        constant = [_constant_value(padded, start, self.spec) for start in plan.starts]
        varied = np.array([n for n, value in enumerate(constant) if value is None], np.intp)
        return executed(
            _computed_boxes(plan), varied, block_voxels=BLOCK_VOXELS, value_bytes=self._value_bytes
        )

    def tile_logits(self, inputs: Mapping[str, Features]) -> Features:
        """Class difference of one whole tile, float32 (out, out, out).

        Parameters
        ----------
        inputs : mapping of str to ndarray, shape (1, 1, n, n, n), float32
            As `trtseg.tiling.gather` cuts them for one tile.

        Raises
        ------
        DeviceError
            OpenVINO fails.
        MemoryError
            The memory left is too small for the tile. The next one may run.
        """
        box = np.array([[0, self.spec.out]] * 3)
        with self._running():
            features = self._features(inputs["normal"][0, 0])
            subs = self._sub_features({k: v for k, v in inputs.items() if k != "normal"})
            return self._decide(
                self._fc, features, box, box, {name: one[0] for name, one in subs.items()}
            )

    def _settle_constant_tiles(self, padded: Features, output: _Output) -> NDArray[np.intp]:
        """Decide the tiles that see one value only; gives the indices of the others."""
        plan, spec = output.plan, self.spec
        logits: dict[float, float | None] = {}
        varied = []
        for tile, start in enumerate(plan.starts):
            value = _constant_value(padded, start, spec)
            if value is not None and value not in logits:
                logits[value] = self._constant_logit(value)
            logit = None if value is None else logits[value]
            if logit is None:
                varied.append(tile)
            else:
                output.decide_all(tile, logit)
        return np.array(varied, np.intp)

    def _constant_logit(self, value: float) -> float | None:
        """Answer for a tile of one value; None where it is too near a tie to be shared."""
        inputs = {
            name: np.full((1, 1, side, side, side), value, np.float32)
            for name, side in self.spec.input_sizes().items()
        }
        logits = self.tile_logits(inputs)
        return float(logits.flat[0]) if np.abs(logits).min() > CLEAR_LOGIT else None

    def _for_whole_tiles(self, plan: TilePlan, tiles: NDArray[np.intp]) -> Any:
        """What runs the last part for whole tiles: where there are many, one of that fixed size."""
        whole = sum(self._is_whole(plan.boxes[tile]) for tile in tiles)
        # By the plan alone, whatever ran before: the two may round in different orders.
        if whole < FIXED_SIZE_BOXES:
            return self._fc
        if self._fc_of_whole is None:
            with calling():
                model = self._fc_of_sizes(self._whole_sizes())
                self._fc_of_whole = model.create_infer_request()
            self._models.append(model)
        return self._fc_of_whole

    def _is_whole(self, box: NDArray[np.integer[Any]]) -> bool:
        return bool((box[:, 1] - box[:, 0] == self.spec.out).all())

    def _whole_sizes(self) -> dict[str, Sequence[int]]:
        """Shapes of the last part's inputs for a whole tile."""
        out, kernel = self.spec.out, self.spec.fc_kernel
        box = np.array([[0, out]] * 3)
        normal = self.spec.pathways[0]
        sizes: dict[str, Sequence[int]] = {
            normal.name: (1, normal.feature_maps[-1], *[out + kernel - 1] * 3)
        }
        for pathway in self.spec.pathways[1:]:
            cells = _cells(box, pathway.factor, kernel)
            sides = (cells[:, 1] - cells[:, 0]).tolist()
            sizes[pathway.name] = (1, pathway.feature_maps[-1], *sides)
            sizes[f"{pathway.name}.variant"] = sizes[f"{pathway.name}.cell"] = (out**3,)
        return sizes

    def _run_block(
        self, padded: Features, block: tiling.Block, plan: TilePlan, output: _Output, whole: Any
    ) -> None:
        spec = self.spec
        reached = np.add(block.region, (0, spec.receptive_field - 1))
        image = padded[tuple(slice(low, high) for low, high in reached)]
        features = self._features(image)
        for first in range(0, len(block.tiles), SUB_BATCH):
            tiles = block.tiles[first : first + SUB_BATCH]
            subs = self._sub_features(
                tiling.gather(padded, plan.starts[tiles], spec, pathways=spec.pathways[1:])
            )
            for row, tile in enumerate(tiles):
                start = plan.starts[tile].astype(np.int64)[:, None]
                box = plan.boxes[tile]
                logits = self._decide(
                    whole if self._is_whole(box) else self._fc,
                    features,
                    block.region - start,
                    box - start,
                    {name: one[row] for name, one in subs.items()},
                )
                output.decide(int(tile), logits, box[:, 0])

    def _features(self, image: Features) -> Maps:
        """Normal-pathway features (C, i, j, k) of an image region; valid until the next call."""
        with calling():
            request = self._normal
            request.infer({"normal": np.ascontiguousarray(image)[None, None]}, share_inputs=True)
            features: Maps = maps_of(request.get_output_tensor(0))[0]
        return features

    def _sub_features(self, inputs: dict[str, Features]) -> dict[str, Maps]:
        """Features (N, C, cells ...) of the subsampled pathways; valid until the next call."""
        if not inputs:
            return {}
        with calling():
            self._sub.infer(inputs, share_inputs=True)
            return {name: maps_of(self._sub.get_tensor(f"{name}.features")) for name in inputs}

    def _decide(
        self,
        request: Any,
        features: Maps,
        region: NDArray[np.int64],
        box: NDArray[np.int64],
        subs: dict[str, Maps],
    ) -> Features:
        """Class difference of the voxels of `box`; both boxes are in tile coordinates."""
        spec = self.spec
        kernel, half = spec.fc_kernel, spec.fc_kernel // 2
        edged = np.add(box, (-half, half))
        inputs = {"normal": tensor_of(_window(features, region[:, 0], edged, spec.out))}
        for pathway in spec.pathways[1:]:
            name, maps = pathway.name, subs[pathway.name]
            cells = _cells(box, pathway.factor, kernel)
            cut = _window(maps, np.zeros(3, np.int64), cells, maps.shape[1])
            (i, j, k), factor = box.tolist(), pathway.factor
            variant, cell = _indices((*i, *j, *k), factor, kernel)
            inputs[name] = tensor_of(cut)
            inputs[f"{name}.variant"], inputs[f"{name}.cell"] = variant, cell
        with calling():
            request.infer(inputs, share_inputs=True)
            logits: Features = request.get_output_tensor(0).data
        return logits.reshape(box[:, 1] - box[:, 0])


class _Output:
    """Labels, and probabilities where asked for, filled box by box."""

    def __init__(self, plan: TilePlan, probabilities: bool, progress: Progress | None) -> None:
        self.plan = plan
        self.labels = np.zeros(plan.shape, np.uint8)
        self.maps = np.zeros(plan.shape, np.float32) if probabilities else None
        self._progress = progress

    def decide_all(self, tile: int, logit: float) -> None:
        """Take one class difference for all of a tile's box."""
        box = self.plan.boxes[tile]
        self.decide(tile, np.full(box[:, 1] - box[:, 0], logit, np.float32), box[:, 0])

    def decide(self, tile: int, logits: Features, origin: NDArray[np.integer[Any]]) -> None:
        """Take a tile's class differences, the first of them being of the voxel `origin`."""
        box = self.plan.boxes[tile]
        where = tuple(slice(low, high) for low, high in box)
        logits = logits[tuple(slice(low, high) for low, high in box - origin[:, None])]
        if not np.isfinite(logits).all():
            raise EngineError(
                "the network gave values that are not finite",
                expected="finite logits, which the build found on its own tile",
                action="run in float32 if this was another precision; else build again: trtseg "
                "engines build",
            )
        self.labels[where] = logits > 0
        if self.maps is not None:
            self.maps[where] = logistic(logits)
        if self._progress is not None:
            self._progress(1)


def _computed_boxes(plan: TilePlan) -> TilePlan:
    """The plan with boxes that cover most of their tile widened to all of it."""
    whole = plan.starts[:, :, None].astype(np.int32) + np.array([0, plan.spec.out], np.int32)
    voxels = np.prod(plan.boxes[:, :, 1] - plan.boxes[:, :, 0], axis=1)
    wide = voxels >= WHOLE_SHARE * plan.spec.out**3
    return replace(plan, boxes=np.where(wide[:, None, None], whole, plan.boxes))


def _cells(box: NDArray[np.integer[Any]], factor: int, kernel: int) -> NDArray[np.int64]:
    """Cells that the first FC layer sees of a box, (3, 2), in the tile's coarse grid."""
    edge = reach(factor, kernel)
    cells = [cell_range(low, high, factor) for low, high in box.tolist()]
    return np.add(cells, (-edge, edge))


def _constant_value(padded: Features, start: NDArray[np.int32], spec: NetworkSpec) -> float | None:
    """The one value that all inputs of a tile hold, fill included; None where they hold several."""
    tile = padded[tuple(slice(s, s + spec.tile) for s in start)]
    value = tile[0, 0, 0]
    if not (tile[-1, -1, -1] == value and (tile == value).all()):
        return None
    subs = tiling.gather(padded, start[None], spec, pathways=spec.pathways[1:])
    return float(value) if all((one == value).all() for one in subs.values()) else None


@functools.lru_cache(maxsize=KEPT_INDICES)
def _indices(
    bounds: tuple[int, ...], factor: int, kernel: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`trtseg.phases.box_indices` of a box with these bounds; not to be written to."""
    return box_indices(np.array(bounds).reshape(3, 2), factor, kernel)


def _window(maps: Maps, origin: NDArray[np.int64], wanted: NDArray[np.int64], size: int) -> Maps:
    """Cut (1, C, ...) out of (C, ...) maps; beyond the tile, its edge is repeated.

    Parameters
    ----------
    maps : ndarray, shape (C, i, j, k)
    origin : ndarray, shape (3,)
        Tile coordinates of the maps' first voxel.
    wanted : ndarray, shape (3, 2)
        First and end voxel per axis, in tile coordinates; may go beyond 0 ... size - 1.
    size : int
        Voxels per axis of the tile's result.
    """
    inside = np.clip(wanted, 0, size)
    i, j, k = (slice(low, high) for low, high in inside - origin[:, None])
    cut = maps[:, i, j, k]
    beyond = np.abs(wanted - inside)
    if beyond.any():
        cut = np.pad(cut, [(0, 0), *beyond.tolist()], "edge")
    return np.ascontiguousarray(cut)[None]
