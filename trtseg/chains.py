"""The device a scan runs on: the CPU, network after network, or a GPU, the whole chain at once.

A chain is both networks of a model set, loaded on one device. What comes before it (reading, the
orientation) and after it (checks, writing) is the same whatever the device; see `trtseg.pipeline`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trtseg.architecture import NETWORKS
from trtseg.backends import PRECISIONS as CPU_PRECISIONS
from trtseg.backends import check_device, open_cpu, open_gpu
from trtseg.backends.base import ChainOutput, NetworkOutput, Work, network_progress
from trtseg.engine import WEIGHTS, Engine, is_built, load_engine
from trtseg.errors import DeviceError, ModelError, NotCompiledError, UsageError
from trtseg.gpu_engine import GpuEngine, load_gpu_engine
from trtseg.logs import LOG, stopwatch
from trtseg.models import PUBLISHED, find_models
from trtseg.normalise import z_score
from trtseg.tiling import plan_tiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from trtseg.backends.base import Backend, Ceilings, ChainProgress
    from trtseg.models import ModelSet
    from trtseg.scan import Scan

#: Arithmetic to the kind of device that has it. ``f32``, DeepMedic's labels, is the CPU's default;
#: engines for GPUs are compiled in ``f16``.
PRECISIONS = {**dict.fromkeys(CPU_PRECISIONS, "cpu"), "f16": "cuda"}


class Chain(Protocol):
    """Both networks on one device.

    Attributes
    ----------
    device : str
        ``cpu`` or ``cuda:N``.
    precision : str
        One of `PRECISIONS`.
    """

    device: str
    precision: str

    @property
    def engines(self) -> Mapping[str, Engine | GpuEngine]:
        """What is loaded, by network."""

    @property
    def description(self) -> str:
        """The device and what drives it, for people."""

    def run(
        self,
        scan: Scan,
        *,
        mask: NDArray[np.bool_] | None = None,
        probabilities: bool = False,
        progress: ChainProgress | None = None,
        following: Callable[[], Scan | None] | None = None,
    ) -> ChainOutput:
        """Normalise a raw scan and run both networks over it.

        Parameters
        ----------
        scan : Scan
            Raw intensities.
        mask : ndarray, shape of the scan, bool, optional
            Takes the brain network's place.
        probabilities : bool
        progress : callable, optional
        following : callable, optional
            Gives the scan of the next call once it is read, else None; it must not wait. A GPU
            uploads that scan beside the present one's networks; the CPU does not ask.

        Raises
        ------
        InputError
            The scan cannot be scaled; see `trtseg.normalise.z_score`.
        DeviceError, EngineError
            The device fails, or a network's answer is not finite.
        """

    def work(self, scan: Scan, brain: NDArray[np.uint8]) -> Work:
        """What both networks executed over a scan, given the brain that was found or given."""

    def ceilings(self) -> Ceilings:
        """Measure what the device reaches at its best; takes seconds.

        Raises
        ------
        DeviceError, EngineError
            The device fails.
        """

    def device_bytes(self) -> int | None:
        """Memory taken on a device that has its own; None for the CPU."""

    def close(self) -> None:
        """Free the device."""


def open_chain(
    models: str | None,
    root: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
) -> tuple[Chain, str]:
    """Load both networks of a model set on a device.

    Parameters
    ----------
    models : str, optional
        Default the published set.
    root : Path
        The engines folder.
    device : str
        ``auto``: the first GPU if everything for it is here, else the CPU.
    threads : int, optional
        CPU threads; default the cores this process may run on.
    precision : str, optional
        One of `PRECISIONS`; default the device's own. With ``auto`` it decides the device.

    Returns
    -------
    chain : Chain
    note : str
        Why ``auto`` is the CPU; else empty.

    Raises
    ------
    UsageError
        The device, precision or threads mean nothing, or contradict each other.
    ModelError, EngineError
        The model set is unknown, or its build is missing, damaged or stale.
    DeviceError
        The device is not available.
    """
    device = _chosen(device, precision)
    engines = load_engines(models, root)
    note = ""
    if device == "auto":
        try:
            return GpuChain(0, engines, root), note
        except NotCompiledError as error:
            note = f"running on the CPU: {error.found}; {error.action}"
        except DeviceError as error:
            note = f"running on the CPU: {error.found}"
        device = "cpu"
    if device == "cpu":
        return HostChain(open_cpu(threads=threads, precision=precision or "f32"), engines), note
    index = int(device.partition(":")[2] or 0)
    return GpuChain(index, engines, root), note


def _chosen(device: str, precision: str | None) -> str:
    """The device that the precision leaves of those asked for."""
    check_device(device)
    if precision is None:
        return device
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}", expected=", ".join(PRECISIONS))
    kind = PRECISIONS[precision]
    if device == "auto":
        return kind
    if not device.startswith(kind):
        there = ", ".join(one for one, at in PRECISIONS.items() if device.startswith(at))
        raise UsageError(
            f"precision {precision} with device {device}",
            expected=there,
            action="choose one of these, or leave the precision out",
        )
    return device


class HostChain:
    """The chain on the host, step by step; see `Chain`.

    Parameters
    ----------
    backend : Backend
        Owned from here on.
    engines : mapping of str to Engine
    """

    def __init__(self, backend: Backend, engines: Mapping[str, Engine]) -> None:
        self._backend = backend
        self.engines: Mapping[str, Engine | GpuEngine] = engines
        self.device = backend.device
        self.precision = backend.precision
        try:
            self._networks = {net: backend.load(one) for net, one in engines.items()}
        except BaseException:
            backend.close()
            raise

    @property
    def description(self) -> str:
        """See `Chain`."""
        return self._backend.description

    def run(
        self,
        scan: Scan,
        *,
        mask: NDArray[np.bool_] | None = None,
        probabilities: bool = False,
        progress: ChainProgress | None = None,
        following: Callable[[], Scan | None] | None = None,  # noqa: ARG002 (nothing to upload)
    ) -> ChainOutput:
        """See `Chain`; `following` is not asked, for there is nothing to upload."""
        times: dict[str, float] = {}
        with stopwatch(times, "z-score"):
            scores = z_score(scan).data
        with stopwatch(times, "brain"):
            if mask is None:
                brain = self._run("bdn", scores, None, probabilities, progress)
            else:
                brain = NetworkOutput(mask.astype(np.uint8), None)
        roi = brain.labels.astype(bool)
        with stopwatch(times, "cortex"):
            inside = self._run("cgm", scores, roi, probabilities, progress)
        with stopwatch(times, "gate"):
            cortex = gate(inside, roi)
        return ChainOutput(
            brain=brain,
            cortex=cortex,
            brain_voxels=int(np.count_nonzero(brain.labels)),
            cortex_voxels=int(np.count_nonzero(cortex.labels)),
            times=MappingProxyType(times),
        )

    def _run(
        self,
        net: str,
        scores: NDArray[np.float32],
        roi: NDArray[np.bool_] | None,
        probabilities: bool,
        progress: ChainProgress | None,
    ) -> NetworkOutput:
        network = self._networks[net]
        plan = plan_tiles(scores.shape, network.spec, roi)
        told = network_progress(progress, net, len(plan))
        return network.run(scores, plan, probabilities=probabilities, progress=told)

    def work(self, scan: Scan, brain: NDArray[np.uint8]) -> Work:
        """See `Chain`."""
        scores, total = z_score(scan).data, Work(0, 0)
        for net, roi in (("bdn", None), ("cgm", brain.astype(bool))):
            network = self._networks[net]
            total += network.work(scores, plan_tiles(scores.shape, network.spec, roi))
        return total

    def ceilings(self) -> Ceilings:
        """See `Chain`."""
        return self._backend.ceilings()

    def device_bytes(self) -> int | None:
        """See `Chain`."""
        return None

    def close(self) -> None:
        """See `Chain`."""
        self._networks.clear()
        self._backend.close()


class GpuChain:
    """The chain on a GPU, raw voxels up once and labels down once; see `Chain`.

    Parameters
    ----------
    index : int
        Which GPU.
    built : mapping of str to Engine
        What it must have been compiled from.
    root : Path
        The engines folder.

    Raises
    ------
    DeviceError
        The driver, the GPU, pycuda or the library is missing, or memory runs out.
    EngineError
        An engine is missing, damaged or stale, of another library or GPU, or fails its self-test.
    """

    def __init__(self, index: int, built: Mapping[str, Engine], root: Path) -> None:
        # The device first: where there is none, what to install matters and not what to compile.
        self._backend = open_gpu(index)
        self.device = self._backend.device
        self.precision = self._backend.precision
        try:
            engines = load_gpu_engines(built, root)
            self._networks = {net: self._backend.load(engines[net]) for net in NETWORKS}
        except BaseException:
            self._backend.close()
            raise
        self.engines: Mapping[str, Engine | GpuEngine] = engines

    @property
    def description(self) -> str:
        """See `Chain`."""
        return self._backend.description

    def run(
        self,
        scan: Scan,
        *,
        mask: NDArray[np.bool_] | None = None,
        probabilities: bool = False,
        progress: ChainProgress | None = None,
        following: Callable[[], Scan | None] | None = None,
    ) -> ChainOutput:
        """See `Chain`; the stage ``host`` is what the host took besides the device's stages."""
        begun = time.perf_counter()
        output = self._backend.segment_chain(
            scan.data,
            mask=mask,
            probabilities=probabilities,
            progress=progress,
            following=None if following is None else lambda: _voxels(following()),
        )
        for stage, seconds in output.times.items():
            LOG.info("%s: %.4f s", stage, seconds)
        rest = time.perf_counter() - begun - sum(output.times.values())
        times = MappingProxyType({**output.times, "host": max(0.0, rest)})
        return dataclasses.replace(output, times=times)

    def work(self, scan: Scan, brain: NDArray[np.uint8]) -> Work:
        """See `Chain`; the places of the last batch that are padding are executed too."""
        total = Work(0, 0)
        for net, roi in (("bdn", None), ("cgm", brain.astype(bool))):
            network = self._networks[net]
            batches = -(-len(plan_tiles(scan.shape, network.spec, roi)) // network.batch)
            tile = network.engine.manifest["cost"]
            total += Work(tile["multiply_adds"], tile["bytes"]) * (batches * network.batch)
        return total

    def ceilings(self) -> Ceilings:
        """See `Chain`."""
        return self._backend.ceilings()

    def device_bytes(self) -> int | None:
        """See `Chain`."""
        return self._backend.device_bytes

    def close(self) -> None:
        """See `Chain`."""
        self._backend.close()


def _voxels(scan: Scan | None) -> NDArray[Any] | None:
    return None if scan is None else scan.data


def gate(output: NetworkOutput, roi: NDArray[np.bool_]) -> NetworkOutput:
    """Zero labels and probabilities outside `roi`, as the published system does."""
    maps = output.probabilities
    return NetworkOutput(output.labels * roi, None if maps is None else maps * roi)


def load_engines(models: str | None, root: Path) -> dict[str, Engine]:
    """Open the built networks of a model set, each verified; see `trtseg.engine.load_engine`.

    Raises
    ------
    ModelError, EngineError
        The set is unknown, or its build is missing, damaged or stale.
    """
    name, stored = _resolve_models(models, root)
    return {
        net: load_engine(
            root, name, net, checkpoint=None if stored is None else stored.digests(net)
        )
        for net in NETWORKS
    }


def load_gpu_engines(engines: Mapping[str, Engine], root: Path) -> dict[str, GpuEngine]:
    """Open what was compiled of built networks for GPUs, each verified.

    Raises
    ------
    EngineError
        It is missing, damaged or stale; see `trtseg.gpu_engine.load_gpu_engine`.
    """
    return {
        net: load_gpu_engine(
            root, one.models, net, frozen_sha256=str(one.manifest["files"][WEIGHTS])
        )
        for net, one in engines.items()
    }


def _resolve_models(models: str | None, root: Path) -> tuple[str, ModelSet | None]:
    """Name of the model set and, where its checkpoint is on this machine, the set itself.

    A built engine is enough to segment: a scanner-side box may never have held the checkpoint.
    """
    try:
        stored = find_models(models)
    except ModelError:
        name = PUBLISHED if models is None else models
        if is_built(root, name):
            return name, None
        raise
    return stored.name, stored
