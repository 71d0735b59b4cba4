"""Both networks over one scan on a device: raw voxels up once, labels down once.

upload -> z-score -> brain network -> boxes of the brain -> cortex network -> gate -> download.

The next scan's voxels go up beside the networks, where they are there by then.

What runs a network is behind `Executor`, what runs a kernel behind `trtseg.cuda.device.Device`;
with other implementations of the two, the same code runs and is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from trtseg import tiling
from trtseg.backends.base import ChainOutput, NetworkOutput, network_progress
from trtseg.cuda import launches
from trtseg.cuda.device import OutOfDeviceMemory
from trtseg.cuda.memory import Memory
from trtseg.errors import DeviceError, EngineError
from trtseg.normalise import z_score
from trtseg.scan import Geometry, Scan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.base import ChainProgress, Progress
    from trtseg.cuda.device import Bytes, Device
    from trtseg.tiling import Shape, TilePlan

#: Batches in flight before the host waits for the oldest: enough for the device never to wait for
#: the host, and few enough for progress to be true and an interrupt to be heard.
DEPTH = 4

#: The stages of a scan, in order, by the device's clock; ``upload`` is the wait for what went up
#: beside the scan before, and ``brain`` the upload of the mask, where that is so.
STAGES = ("upload", "z-score", "brain", "boxes", "cortex", "gate", "download")

#: Standard deviation, as a part of the mean, above which a scan surely has contrast; with less, the
#: CPU judges whether it can be scaled.
_CLEAR_CONTRAST = 1e-6

#: The buffers, on the device and page-locked, of the scan that goes up beside the present one.
_ASIDE = "voxels aside"

#: Plans that are kept, so that a series of scans of one shape plans once.
_PLANS = 8


class Executor(Protocol):
    """One network, ready to run a fixed batch of tiles on the device's stream.

    Attributes
    ----------
    net : str
        ``bdn`` or ``cgm``.
    spec : NetworkSpec
    batch : int
        Tiles of a batch.
    scratch_bytes : int
        Device memory it works in, which networks share.
    """

    net: str
    spec: NetworkSpec
    batch: int
    scratch_bytes: int

    def bind(self, tensors: Mapping[str, int], scratch: int) -> None:
        """Take the addresses of the inputs, of ``logit``, and of the scratch memory."""

    def enqueue(self) -> None:
        """Put one batch into the stream.

        Raises
        ------
        DeviceError
            The library refuses.
        """


@dataclass(frozen=True)
class _Maps:
    """Addresses of a network's results on the device."""

    labels: int
    probabilities: int | None


class Chain:
    """The steps of a scan on one device, with the memory they need.

    Every method is called while the device is active. The chain owns the memory it reserves, and
    frees it in `close`; it does not own the device.

    Parameters
    ----------
    device : Device
        With the kernels loaded.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = Memory(device)
        self._marks = [device.event() for _ in range(len(STAGES) + 1)]
        self._ring = [device.event() for _ in range(DEPTH)]
        self._plans: dict[tuple[Shape, NetworkSpec], TilePlan] = {}
        self._following: Callable[[], NDArray[Any] | None] | None = None  # until it gives one
        self._staged: NDArray[Any] | None = None  # what `_ASIDE` holds, or will once joined

    def segment(
        self,
        raw: NDArray[Any],
        bdn: Executor,
        cgm: Executor,
        *,
        mask: NDArray[np.bool_] | None = None,
        probabilities: bool = False,
        progress: ChainProgress | None = None,
        following: Callable[[], NDArray[Any] | None] | None = None,
    ) -> ChainOutput:
        """Run both networks over a scan.

        Only the copy of the following scan may still be under way on return, from memory of the
        chain's own.

        Parameters
        ----------
        raw : ndarray, shape (i, j, k), any real dtype
            Voxels as stored, in any memory order.
        bdn, cgm : Executor
        mask : ndarray of the same shape, bool, optional
            Takes the brain network's place.
        probabilities : bool
        progress : callable, optional
            Called as ``progress(net, done, total)``, first with 0 done, then as batches finish.
        following : callable, optional
            Gives the next scan's voxels, or None while they are not there; called once a batch
            until it gives them. They are brought to the device beside the networks, and must not
            change until `segment` is called with that very array, which then uploads nothing. With
            another array, after an error, or with too little memory for both, scans go up in turn.

        Returns
        -------
        ChainOutput

        Raises
        ------
        InputError
            As for `trtseg.normalise.z_score`.
        OutOfDeviceMemory
            The device has too little memory for the scan.
        DeviceError
            The device fails.
        EngineError
            A network's answer is not finite.
        """
        voxels = launches.readable(raw)
        brain_plan, full = self._plan(voxels, bdn.spec), self._plan(voxels, cgm.spec)
        try:
            staged = self._take(raw)
            self._following = following
            self._reserve(voxels, (brain_plan, full), (bdn, cgm), probabilities)
            brain = self._maps(0, voxels.size, probabilities and mask is None)
            cortex = self._maps(1, voxels.size, probabilities)
            self._start(voxels, probabilities, staged=staged)
            self._z_score(voxels)
            self._normalise(voxels, brain_plan if mask is None else full)
            self._mark("z-score")
            if mask is None:
                self._infer(
                    bdn, brain_plan, brain, network_progress(progress, "bdn", len(brain_plan))
                )
            else:
                self._upload("labels", np.ascontiguousarray(mask).view(np.uint8))
            self._mark("brain")
            plan = self._region(full, brain.labels)
            self._mark("boxes")
            if mask is None and full.padding != brain_plan.padding:
                self._normalise(voxels, full)
            self._infer(cgm, plan, cortex, network_progress(progress, "cgm", len(plan)))
            self._mark("cortex")
            self._gate(brain, cortex, voxels.size)
            self._mark("gate")
            labels, summary = self._labels_and_summary(voxels.shape)
            _check_finite(summary, cgm.net)
            maps = [self._probabilities(one, voxels.shape) for one in (brain, cortex)]
            self._mark("download")
        except BaseException:
            self._staged = None
            self._device.join()
            raise
        finally:
            # Whatever happened, nothing but what goes on aside may read or write memory after this.
            self._following = None
            self._device.synchronize()
        return ChainOutput(
            brain=NetworkOutput(labels[0], maps[0]),
            cortex=NetworkOutput(labels[1], maps[1]),
            brain_voxels=int(summary["brain"]),
            cortex_voxels=int(summary["cortex"]),
            times=self._times(),
        )

    def run(
        self,
        scores: NDArray[np.float32],
        plan: TilePlan,
        executor: Executor,
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> NetworkOutput:
        """Run one network over the planned tiles of a z-scored volume.

        Parameters
        ----------
        scores : ndarray, shape ``plan.shape``, float32
        plan : TilePlan
        executor : Executor
        probabilities : bool
        progress : callable, optional
            Called with the number of tiles just finished.

        Returns
        -------
        NetworkOutput

        Raises
        ------
        OutOfDeviceMemory, DeviceError, EngineError
            As for `segment`.
        """
        self._reserve(scores, (plan,), (executor,), probabilities)
        maps = self._maps(0, scores.size, probabilities)
        try:
            self._start(scores, probabilities)
            self._normalise(scores, plan, scaled=False)
            self._infer(executor, plan, maps, progress)
            labels, summary = self._labels_and_summary(scores.shape)
            _check_finite(summary, executor.net)
            return NetworkOutput(labels[0], self._probabilities(maps, scores.shape))
        finally:
            self._device.synchronize()

    def evaluate(
        self, executor: Executor, inputs: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Logits of one tile, repeated in every place of a batch.

        Parameters
        ----------
        executor : Executor
        inputs : mapping of str to ndarray, shape (1, 1, n, n, n), float32
            As `trtseg.tiling.gather` cuts them for one tile.

        Returns
        -------
        ndarray, shape (batch, out, out, out), float32

        Raises
        ------
        OutOfDeviceMemory, DeviceError
            The device has too little memory, or fails.
        """
        spec, batch = executor.spec, executor.batch
        self.reserve_executor(executor)
        try:
            for name, one in inputs.items():
                self._upload(_tensor(name), np.repeat(one, batch, axis=0))
                self._device.synchronize()  # the next upload goes through the same host memory
            self._bind(executor)
            executor.enqueue()
            logits = self._pull("logit", self._memory[_tensor("logit")], 4 * batch * spec.out**3)
        finally:
            self._device.synchronize()
        found: NDArray[np.float32] = logits.view(np.float32).reshape(batch, *[spec.out] * 3).copy()
        return found

    def reserve_executor(self, executor: Executor) -> None:
        """Have the memory that a network needs, whatever the scan.

        Raises
        ------
        OutOfDeviceMemory
            The device has too little.
        """
        self._memory.reserve(_executor_sizes([executor]), f"batches of {executor.batch} tiles")

    def drop_executors(self) -> None:
        """Free what networks need whatever the scan, and the room for the scan that follows.

        Both are reserved again when they are needed.
        """
        self._drop_aside()
        for name in self._memory.names():
            if name == "scratch" or name.startswith(_tensor("")):
                self._memory.drop(name)

    def release(self) -> None:
        """Free the chain's memory; it is reserved again when a scan is run."""
        self._drop_aside()
        self._memory.release()

    def close(self) -> None:
        """Free everything; the chain is of no use afterwards."""
        self.release()
        self._marks.clear()
        self._ring.clear()

    def _plan(self, voxels: NDArray[Any], spec: NetworkSpec) -> TilePlan:
        i, j, k = voxels.shape
        key = ((i, j, k), spec)
        if key not in self._plans:
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = tiling.plan_tiles(key[0], spec)
        return self._plans[key]

    def _reserve(
        self,
        voxels: NDArray[Any],
        plans: Sequence[TilePlan],
        executors: Sequence[Executor],
        probabilities: bool,
    ) -> None:
        tiles = max(1, *map(len, plans))
        sizes = {
            "voxels": voxels.nbytes,
            "padded": 4 * max(math.prod(plan.padded_shape) for plan in plans),
            "labels": 2 * voxels.size,
            "probabilities": 8 * voxels.size if probabilities else 0,
            "partials": launches.PARTIALS_BYTES,
            "summary": launches.SUMMARY_BYTES,
            "tiles": 4 * launches.ROW * tiles,
            "all tiles": 4 * launches.ROW * tiles,
            "planes": max(map(launches.planes_bytes, plans)),
            "boxes": 4 * 6 * tiles,
            **_executor_sizes(executors),
        }
        size = " x ".join(map(str, voxels.shape))
        batch = max(executor.batch for executor in executors)
        purpose = f"a scan of {size} voxels in batches of {batch} tiles"
        try:
            self._memory.reserve(sizes, purpose)
        except OutOfDeviceMemory:
            if not self._memory.size(_ASIDE):
                raise
            self._drop_aside()  # to go up early is not worth smaller batches
            self._memory.reserve(sizes, purpose)

    def _maps(self, which: int, count: int, probabilities: bool) -> _Maps:
        return _Maps(
            self._memory["labels"] + which * count,
            self._memory["probabilities"] + 4 * which * count if probabilities else None,
        )

    def _start(self, voxels: NDArray[Any], probabilities: bool, *, staged: bool = False) -> None:
        """Bring the voxels to the device, and clear what is filled from here on."""
        self._device.record(self._marks[0])
        self._device.zero(self._memory["labels"], 2 * voxels.size)
        self._device.zero(self._memory["summary"], launches.SUMMARY_BYTES)
        if probabilities:
            self._device.zero(self._memory["probabilities"], 8 * voxels.size)
        self._device.join()  # the memory of what went aside may be used again from here on
        if not staged:
            self._upload("voxels", voxels)
        self._mark("upload")

    def _take(self, raw: NDArray[Any]) -> bool:
        """Whether this scan went up beside the last one; then its buffer is ``voxels``."""
        staged, self._staged = self._staged, None
        if raw is not staged:
            return False
        self._memory.swap("voxels", _ASIDE)
        return True

    def _stage(self) -> None:
        """Let the following scan go up aside, if it is there.

        Its buffers are free: what went aside before was joined in `_start`, and waited for in
        `_z_score`, as was what the last scan did with its voxels.
        """
        raw = None if self._following is None else self._following()
        if raw is None:
            return
        self._following = None
        # An error is not this scan's: the next one tries again in its turn, and a device that
        # failed says so to whatever comes next.
        with contextlib.suppress(DeviceError, MemoryError):
            voxels = launches.readable(raw)
            self._memory.reserve({_ASIDE: voxels.nbytes}, "the next scan")
            self._device.upload_aside(self._memory[_ASIDE], self._pinned_copy(voxels, _ASIDE))
            self._staged = raw

    def _drop_aside(self) -> None:
        """Free the room for the scan that follows, which then goes up in its turn."""
        self._staged = None
        if self._memory.size(_ASIDE):
            self._device.join()
            self._device.synchronize()
            self._memory.drop(_ASIDE)

    def _upload(self, name: str, source: NDArray[Any], staging: str = "upload") -> None:
        """Copy an array into a buffer, in its own memory order where that is C or Fortran.

        The page-locked memory named `staging` must not change until the stream has passed.
        """
        if source.size:
            self._device.upload(self._memory[name], self._pinned_copy(source, staging))

    def _pinned_copy(self, source: NDArray[Any], staging: str) -> Bytes:
        pinned = self._memory.pinned(staging, source.nbytes)
        view = pinned.view(source.dtype).reshape(source.shape, order=_order(source))
        np.copyto(view, source)
        return pinned

    def _pull(self, name: str, address: int, size: int) -> Bytes:
        """Start a copy to page-locked memory, there once the stream has passed."""
        pinned = self._memory.pinned(name, size)
        self._device.download(pinned, address)
        return pinned

    def _z_score(self, voxels: NDArray[Any]) -> None:
        """Mean and standard deviation; refuses what `trtseg.normalise.z_score` refuses."""
        for launch in launches.statistics(
            voxels=self._memory["voxels"],
            dtype=voxels.dtype.name,
            count=voxels.size,
            partials=self._memory["partials"],
            summary=self._memory["summary"],
        ):
            self._device.launch(launch)
        summary = self._pull_summary()
        self._device.synchronize()
        found = _summary(summary)
        mean, deviation = found["mean"], found["deviation"]
        finite = math.isfinite(mean) and math.isfinite(deviation)
        if finite and found["varied"] and deviation > _CLEAR_CONTRAST * abs(mean):
            return
        z_score(Scan(voxels, Geometry(np.eye(4), {})))  # the CPU's word, and its words, count
        if not finite or deviation == 0.0:
            raise DeviceError(
                f"the GPU finds mean {mean:g} and standard deviation {deviation:g} of the scan",
                expected="the usable values that the CPU finds",
                action="see the system's log for GPU errors, or run with --device cpu",
            )

    def _normalise(self, voxels: NDArray[Any], plan: TilePlan, *, scaled: bool = True) -> None:
        self._device.launch(
            launches.normalise(
                voxels=self._memory["voxels"],
                dtype=voxels.dtype.name,
                strides=_dense_strides(voxels),
                padded=self._memory["padded"],
                plan=plan,
                summary=self._memory["summary"] if scaled else None,
            )
        )

    def _infer(
        self, executor: Executor, plan: TilePlan, maps: _Maps, progress: Progress | None
    ) -> None:
        """Run the planned tiles, batch by batch; all of them are finished on return."""
        batch, memory = executor.batch, self._memory
        self._upload("tiles", launches.tile_table(plan), staging="tiles")
        self._bind(executor)
        pending: deque[tuple[Any, int]] = deque()
        for number, first in enumerate(range(0, len(plan), batch)):
            for pathway in plan.spec.pathways:
                self._device.launch(
                    launches.gather(
                        padded=memory["padded"],
                        tiles=memory["tiles"],
                        target=memory[_tensor(pathway.name)],
                        plan=plan,
                        pathway=pathway,
                        first=first,
                        batch=batch,
                    )
                )
            executor.enqueue()
            self._device.launch(
                launches.scatter(
                    logit=memory[_tensor("logit")],
                    tiles=memory["tiles"],
                    labels=maps.labels,
                    probabilities=maps.probabilities,
                    summary=memory["summary"],
                    plan=plan,
                    first=first,
                    batch=batch,
                )
            )
            if len(pending) == DEPTH:
                self._finish(*pending.popleft(), progress)
            event = self._ring[number % DEPTH]
            self._device.record(event)
            pending.append((event, min(batch, len(plan) - first)))
        while pending:
            self._finish(*pending.popleft(), progress)

    def _finish(self, event: Any, tiles: int, progress: Progress | None) -> None:
        self._stage()  # before the wait: the device is busy meanwhile
        self._device.wait(event)
        if progress is not None:
            progress(tiles)

    def _bind(self, executor: Executor) -> None:
        names = launches.input_bytes(executor.spec, executor.batch)
        tensors = {name: self._memory[_tensor(name)] for name in names}
        executor.bind(tensors, self._memory["scratch"])

    def _region(self, full: TilePlan, mask: int) -> TilePlan:
        """The tiles that decide a voxel of the mask: one small download."""
        self._upload("all tiles", launches.tile_table(full), staging="tiles")
        for launch in launches.region(
            mask=mask,
            tiles=self._memory["all tiles"],
            planes=self._memory["planes"],
            boxes=self._memory["boxes"],
            plan=full,
        ):
            self._device.launch(launch)
        boxes = self._pull("boxes", self._memory["boxes"], 4 * 6 * len(full))
        summary = self._pull_summary()
        self._device.synchronize()
        _check_finite(_summary(summary), "bdn")
        return launches.planned(full, boxes.view(np.int32).reshape(-1, 3, 2).copy())

    def _gate(self, brain: _Maps, cortex: _Maps, count: int) -> None:
        """Zero the cortex outside the brain, and count the voxels of both."""
        gate = launches.gate(
            mask=brain.labels,
            labels=cortex.labels,
            probabilities=cortex.probabilities,
            count=count,
        )
        counts = [
            launches.count_labels(
                labels=maps.labels,
                count=count,
                partials=self._memory["partials"],
                result=launches.summary_address(self._memory["summary"], name),
            )
            for name, maps in (("brain", brain), ("cortex", cortex))
        ]
        for launch in (gate, *counts[0], *counts[1]):
            self._device.launch(launch)

    def _pull_summary(self) -> Bytes:
        return self._pull("summary", self._memory["summary"], launches.SUMMARY_BYTES)

    def _labels_and_summary(
        self, shape: tuple[int, ...]
    ) -> tuple[list[NDArray[np.uint8]], dict[str, float]]:
        pinned = self._pull("download", self._memory["labels"], 2 * math.prod(shape))
        summary = self._pull_summary()
        self._device.synchronize()
        return [one.copy() for one in pinned.reshape(2, *shape)], _summary(summary)

    def _probabilities(self, maps: _Maps, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if maps.probabilities is None:
            return None
        pinned = self._pull("download", maps.probabilities, 4 * math.prod(shape))
        self._device.synchronize()
        found: NDArray[np.float32] = pinned.view(np.float32).reshape(shape).copy()
        return found

    def _mark(self, stage: str) -> None:
        """Note the end of a stage."""
        self._device.record(self._marks[1 + STAGES.index(stage)])

    def _times(self) -> Mapping[str, float]:
        ends = zip(STAGES, self._marks, self._marks[1:], strict=False)
        return MappingProxyType({one: self._device.seconds(a, b) for one, a, b in ends})


def _executor_sizes(executors: Sequence[Executor]) -> dict[str, int]:
    """Bytes that hold any of the networks; they never run at the same time."""
    sizes = {"scratch": 1}
    for executor in executors:
        tensors = launches.input_bytes(executor.spec, executor.batch)
        wanted = {_tensor(name): size for name, size in tensors.items()}
        for name, size in {**wanted, "scratch": executor.scratch_bytes}.items():
            sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def _tensor(name: str) -> str:
    return f"tensor {name}"


def _order(array: NDArray[Any]) -> Literal["C", "F"]:
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def _dense_strides(array: NDArray[Any]) -> tuple[int, ...]:
    """Strides in elements of the copy that `_pinned_copy` makes."""
    i, j, k = array.shape
    return (1, i, i * j) if _order(array) == "F" else (j * k, k, 1)


def _summary(pinned: Bytes) -> dict[str, float]:
    return dict(zip(launches.SUMMARY, pinned.view(np.float64).tolist(), strict=True))


def _check_finite(summary: Mapping[str, float], net: str) -> None:
    if summary["not_finite"]:
        raise EngineError(
            f"{net.upper()} gave values that are not finite",
            expected="finite logits: half precision holds values up to 65504",
            action="run with --device cpu, which computes in float32",
        )
