"""From a scan to labels: read this file first.

scan -> z-score -> BDN over the whole scan -> brain mask -> CGM inside it -> gate -> result.

What lies between the scan and the result runs on a device, and is in `trtseg.chains`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg import nifti
from trtseg.backends.base import NetworkOutput
from trtseg.chains import open_chain
from trtseg.errors import InputError, UsageError
from trtseg.home import engines_root
from trtseg.logs import stopwatch
from trtseg.masks import mask_from_array, mask_from_image, read_mask
from trtseg.orientation import check_unambiguous, restore, to_canonical
from trtseg.orientation import reorient as orient
from trtseg.qc import Qc, assess, check_ga

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from trtseg.backends.base import ChainProgress
    from trtseg.engine import Engine
    from trtseg.gpu_engine import GpuEngine
    from trtseg.orientation import Orientation
    from trtseg.scan import Geometry, Scan

#: What a result without any brain says, whether it was not found or the mask given is empty.
EMPTY_BRAIN = "no brain: both maps are empty"

#: What its checks say where the mask given is empty.
_EMPTY_MASK = "No brain was found: the mask given is empty, and so are both maps."


@dataclass(frozen=True)
class Segmentation:
    """What `segment` returns.

    Attributes
    ----------
    cortex, brain : ndarray, shape of the scan, uint8
        1 inside, 0 outside; cortex lies within brain.
    geometry : Geometry
        The scan's; `affine` is a short cut to its affine, shape (4, 4), float64, voxel to mm.
    brain_ml, cortex_ml : float
        Volumes in mL: voxels times the voxel's volume by the affine.
    times : mapping of str to float
        Seconds of each stage, in the order they ran.
    cortex_probabilities, brain_probabilities : ndarray, shape of the scan, float32, or None
        Probability of class 1, where asked for (the cortex's is 0 outside the brain; None for the
        brain when its mask was given).
    models, device, precision : str
        Name of the model set, the device that ran it, and in which precision.
    notice : str
        What must be said of these weights wherever the result goes; empty for the published ones.
    warnings : tuple of str
        What a person should know before using the result.
    ga_weeks : float or None
        Gestational age the checks go by, where it was given.
    description : str
        The very CPU or GPU and the library that drove it, for people.
    mask_given : bool
        Whether `brain` is a mask that was given.
    """

    cortex: NDArray[np.uint8]
    brain: NDArray[np.uint8]
    geometry: Geometry
    brain_ml: float
    cortex_ml: float
    times: Mapping[str, float]
    cortex_probabilities: NDArray[np.float32] | None
    brain_probabilities: NDArray[np.float32] | None
    models: str
    device: str
    precision: str
    notice: str
    warnings: tuple[str, ...] = field(default=())
    ga_weeks: float | None = None
    description: str = ""
    mask_given: bool = False

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel indices to millimetres."""
        return self.geometry.affine

    @cached_property
    def qc(self) -> Qc:
        """The checks of the result, made when first asked for; see `trtseg.qc.assess`."""
        qc = assess(self.brain, self.cortex, self.geometry, ga_weeks=self.ga_weeks)
        return _blame_mask(qc) if self.mask_given else qc

    @property
    def suspect(self) -> bool:
        """Whether the result should not be used unseen: a check is suspect (``qc.reasons``)."""
        return self.qc.suspect


class Segmenter:
    """Both networks, loaded once, for any number of scans.

    Parameters
    ----------
    models : str, optional
        Model set; default the published one.
    engines : Path or str, optional
        Folder of built networks; default see `trtseg.home.engines_root`.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    threads : int, optional
        CPU threads; default the cores this process may run on.
    precision : str, optional
        ``"f32"``, which gives DeepMedic's labels, or ``"bf16"``, on the CPU; ``"f16"`` on a GPU.
        Default the device's own, f32 or f16; with ``"auto"`` it decides the device.

    Attributes
    ----------
    chain : Chain
        Both networks on the device; see `trtseg.chains`.
    models : str
    engines : mapping of str to Engine or GpuEngine
        What is loaded, by network.
    note : str
        Why ``"auto"`` is the CPU; else empty.

    Raises
    ------
    ModelError, EngineError
        The model set is unknown, nothing is built for it, or the build is damaged or stale.
    DeviceError
        The device is not available.
    UsageError
        The device's name means nothing, or it has no such precision.

    Examples
    --------
    >>> with Segmenter(models="demo") as segmenter:  # doctest: +SKIP
    ...     result = segmenter.segment("scan.nii.gz")
    ...     result.cortex_ml
    """

    def __init__(
        self,
        models: str | None = None,
        *,
        engines: Path | str | None = None,
        device: str = "auto",
        threads: int | None = None,
        precision: str | None = None,
    ) -> None:
        root = engines_root(None if engines is None else Path(engines))
        self.chain, self.note = open_chain(
            models, root, device=device, threads=threads, precision=precision
        )
        self.engines: Mapping[str, Engine | GpuEngine] = self.chain.engines
        self.models = self.engines["bdn"].models
        self._closed = False

    @property
    def device(self) -> str:
        """The device in use: ``cpu`` or ``cuda:N``."""
        return self.chain.device

    @property
    def precision(self) -> str:
        """The precision in use."""
        return self.chain.precision

    @property
    def description(self) -> str:
        """The device and the library that drives it, for people."""
        return self.chain.description

    def segment(
        self,
        scan: Any,
        affine: NDArray[Any] | None = None,
        *,
        mask: Any = None,
        probabilities: bool = False,
        reorient: bool = False,
        ga_weeks: float | None = None,
        progress: ChainProgress | None = None,
        following: Callable[[], Scan | None] | None = None,
        name: str | None = None,
    ) -> Segmentation:
        """Segment one scan.

        Parameters
        ----------
        scan : path, nibabel image, ndarray of shape (i, j, k), or callable
            Raw intensities, not normalised. An array needs its `affine`. A callable gives a
            `trtseg.scan.Scan` when it is called, which is then the reading.
        affine : ndarray, shape (4, 4), optional
            Voxel indices to millimetres; with an array only.
        mask : path, nibabel image or ndarray of the scan's shape, optional
            A brain mask that takes BDN's place; anything over 0.5 is brain. A file or an image must
            lie on the scan's grid.
        probabilities : bool
            Whether to keep the probability maps.
        reorient : bool
            Run the networks in RAS+ orientation instead of the array as stored, and give the maps
            back on the scan's own grid: the same labels however the scan is stored, but not
            DeepMedic's, which sees the array as stored.
        ga_weeks : float, optional
            Gestational age in weeks, 18 to 45: what volumes are plausible.
        progress : callable, optional
            Called as ``progress(network, done, total)`` after every batch of tiles.
        following : callable, optional
            Gives the scan of the next call once it is read, and None until then; it must not wait.
            A GPU uploads it beside the present one's networks; that scan's array must not change
            in between. Not called on a CPU, nor with `reorient`, which makes another array.
        name : str, optional
            What errors call the scan; default its path, where it is one.

        Returns
        -------
        Segmentation

        Raises
        ------
        InputError
            The scan or mask cannot be used as it is; the message says why.
        UsageError
            The gestational age is no number from 18 to 45; or the segmenter is closed.
        """
        if self._closed:
            raise UsageError(
                "the segmenter is closed",
                expected="one that is open",
                action="make a new Segmenter, or segment inside its with block",
            )
        if ga_weeks is not None:
            _check_ga(ga_weeks)
        if name is None:
            name = str(Path(scan)) if isinstance(scan, (str, os.PathLike)) else ""
        times: dict[str, float] = {}
        with stopwatch(times, "read"):
            image = _read(scan, affine)
            given = None if mask is None else _read_mask(mask, image)
            work, orientation = image, None
            if reorient:
                with _naming(name):
                    check_unambiguous(image)
                    work, orientation = to_canonical(image)
                given = None if given is None else orient(given, orientation)
        with _naming(name):
            output = self.chain.run(
                work,
                mask=given,
                probabilities=probabilities,
                progress=progress,
                following=None if reorient else following,
            )
        brain, cortex = output.brain, output.cortex
        if orientation is not None:
            brain, cortex = _restore(brain, orientation), _restore(cortex, orientation)
        millilitres = image.geometry.voxel_volume_ml
        warnings = image.warnings if output.brain_voxels else (*image.warnings, EMPTY_BRAIN)
        return Segmentation(
            cortex=cortex.labels,
            brain=brain.labels,
            geometry=image.geometry,
            brain_ml=output.brain_voxels * millilitres,
            cortex_ml=output.cortex_voxels * millilitres,
            times=MappingProxyType({**times, **output.times}),
            cortex_probabilities=cortex.probabilities,
            brain_probabilities=brain.probabilities,
            models=self.models,
            device=self.device,
            precision=self.precision,
            notice=self.engines["cgm"].notice,
            warnings=warnings,
            ga_weeks=ga_weeks,
            description=self.description,
            mask_given=mask is not None,
        )

    def close(self) -> None:
        """Free the device; nothing can be segmented after it."""
        self._closed = True
        self.chain.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def segment(
    scan: Any,
    affine: NDArray[Any] | None = None,
    *,
    models: str | None = None,
    engines: Path | str | None = None,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    mask: Any = None,
    probabilities: bool = False,
    reorient: bool = False,
    ga_weeks: float | None = None,
    progress: ChainProgress | None = None,
) -> Segmentation:
    """Segment one scan: `Segmenter` and its `segment` in one call.

    For several scans make one `Segmenter`, which loads the networks once. Parameters, result and
    errors are those of the two.
    """
    with Segmenter(
        models, engines=engines, device=device, threads=threads, precision=precision
    ) as segmenter:
        return segmenter.segment(
            scan,
            affine,
            mask=mask,
            probabilities=probabilities,
            reorient=reorient,
            ga_weeks=ga_weeks,
            progress=progress,
        )


def _check_ga(ga_weeks: Any) -> None:
    if not isinstance(ga_weeks, Real):
        raise UsageError(
            f"a gestational age that is no number ({type(ga_weeks).__name__})",
            expected="a number of weeks, such as 27.4",
        )
    check_ga(float(ga_weeks))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let errors of what has no file of its own begin with a name, where there is one."""
    try:
        yield
    except InputError as error:
        if not name:
            raise
        found = f"{name}: {error.found}"
        raise InputError(found, expected=error.expected, action=error.action) from error


def _blame_mask(qc: Qc) -> Qc:
    """The same checks, which lay an empty brain to the mask."""
    return Qc(
        tuple(
            replace(check, line=_EMPTY_MASK)
            if check.name == "brain_found" and check.verdict == "suspect"
            else check
            for check in qc.checks
        )
    )


def _restore(output: NetworkOutput, orientation: Orientation) -> NetworkOutput:
    maps = output.probabilities
    return NetworkOutput(
        restore(output.labels, orientation), None if maps is None else restore(maps, orientation)
    )


def _read(scan: Any, affine: NDArray[Any] | None) -> Scan:
    if isinstance(scan, np.ndarray):
        if affine is None:
            raise InputError(
                "an array without its affine",
                expected="segment(array, affine), the affine being 4 x 4, voxel to mm",
            )
        return nifti.scan_from_array(scan, affine)
    if affine is not None:
        raise InputError(
            "an affine beside a scan that has its own", expected="an affine with an array only"
        )
    if isinstance(scan, (str, os.PathLike)):
        return nifti.read_scan(Path(scan))
    if callable(scan):
        given: Scan = scan()
        return given
    return nifti.scan_from_image(scan)


def _read_mask(mask: Any, scan: Scan) -> NDArray[np.bool_]:
    if isinstance(mask, (str, os.PathLike)):
        return read_mask(Path(mask), scan.geometry, scan.shape)
    if hasattr(mask, "affine"):
        return mask_from_image(mask, scan.geometry, scan.shape)
    return mask_from_array(np.asarray(mask), scan.shape)
