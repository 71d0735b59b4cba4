"""Is a result plausible? Checks on the label arrays alone, each with the range it is held against.

A check never says that a result is right, nor that a fetus is well: it finds results that must not
be used unseen. Every range names its source; where none could be confirmed, the number is given and
not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trtseg.affine import MAX_ANISOTROPY, sides_alike
from trtseg.errors import InputError, UsageError
from trtseg.nifti import closest_axes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtseg.scan import Geometry

Verdict = Literal["ok", "suspect", "not judged"]

#: Gestational ages in weeks that `assess` takes; outside them a number is a slip of the keyboard.
GA_RANGE = (18.0, 45.0)

#: Gestational ages in completed weeks of the scans the published networks were developed on.
DEVELOPED_WEEKS = (21, 38)

#: Least share of the brain in its largest component. A brain is one piece; scattered false voxels
#: are common and harmless while they are few, so a twentieth is let pass.
LARGEST_SHARE = 0.95

#: Largest share of the brain's voxels that may lie on the border of the field of view: a touch of
#: a thousandth costs next to no volume, more means that the scan may cut the brain.
BORDER_SHARE = 0.001

#: Factor that published mean volumes are divided and multiplied by. It is wide on purpose: it looks
#: for failed segmentations, not for unusual fetuses, and published means differ with scanner and
#: definition: the tissue curves in the reporting script of Uus et al. 2023
#: (doi:10.7554/eLife.88818.1) add up to about a fifth less than the intracranial means used here,
#: a third less at 21 weeks.
MARGIN = 1.5

_OWN = "trtseg's own rule of thumb"
_FETIT = "Fetit et al., MIDL 2020"
_REN = "Ren et al. 2022, doi:10.3389/fnins.2022.886083, Table 1"


@dataclass(frozen=True)
class _Week:
    """Published means of one week, in mL, with standard deviations."""

    brain: float
    intracranial: float
    intracranial_sd: float
    cortex: float
    cortex_sd: float


# Ren J.-Y. et al., "Quantification of Intracranial Structures Volume in Fetuses Using 3-D
# Volumetric MRI: Normal Values at 19 to 37 Weeks' Gestation", Front. Neurosci. 16 (2022) 886083,
# Table 1: 188 fetuses at 1.5 T, manual segmentation of slice-to-volume reconstructions. Total brain
# volume without CSF, intracranial volume, cortical grey matter. The values were taken from a public
# transcription, ren2022_weekly_mean_sd.csv of github.com/ajoshiusc/fetal-brain-growth, and not seen
# in the article itself. It says that the article prints the cortex of 37 weeks under a second 36,
# which it reads as 37. In it the parts add up to the totals within 0.2 % but for brain at 28 weeks
# (2 % less) and intracranial at 32, 34 and 35 weeks (1, 4 and 1 % more): MARGIN is far wider.
_WEEKS = {
    19: _Week(29.33, 69.55, 3.05, 6.57, 0.43),
    20: _Week(37.63, 76.74, 2.13, 7.28, 0.48),
    21: _Week(47.28, 86.40, 5.65, 9.99, 1.08),
    22: _Week(56.08, 109.30, 11.90, 12.05, 0.68),
    23: _Week(64.98, 125.70, 9.34, 13.63, 0.88),
    24: _Week(74.98, 141.50, 12.11, 15.42, 0.97),
    25: _Week(83.17, 158.50, 9.53, 16.96, 0.96),
    26: _Week(91.10, 175.40, 9.45, 18.47, 1.18),
    27: _Week(122.30, 215.50, 21.33, 24.31, 1.81),
    28: _Week(140.80, 246.80, 15.27, 29.98, 2.66),
    29: _Week(164.10, 277.50, 13.94, 33.44, 4.44),
    30: _Week(175.60, 302.50, 15.51, 39.71, 3.76),
    31: _Week(182.00, 304.70, 12.19, 40.95, 2.53),
    32: _Week(197.80, 328.80, 9.25, 45.78, 4.14),
    33: _Week(212.10, 344.50, 10.24, 47.84, 3.68),
    34: _Week(236.90, 386.60, 12.09, 58.23, 3.70),
    35: _Week(260.30, 426.70, 23.28, 65.24, 4.23),
    36: _Week(294.00, 460.00, 9.74, 77.26, 5.04),
    37: _Week(316.90, 491.80, 11.47, 83.96, 3.20),
}
_FIRST, _LAST = min(_WEEKS), max(_WEEKS)

#: Names of the two sides an array axis can point to, for world axes x, y, z of NIfTI's RAS+.
SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


@dataclass(frozen=True)
class Check:
    """One number, what it was compared with, and what came of it.

    Attributes
    ----------
    name : str
        Stable key, for files.
    title : str
        For people.
    value : float, int, str or None
        In `unit`; None where there is nothing to measure.
    unit : str
        ``"mL"``, ``"%"``, ``"mm"``, ``"voxels"``, ``"weeks"``, or empty.
    verdict : str
        ``"ok"``, ``"suspect"`` or ``"not judged"``.
    expected : str
        The range the value was compared with; empty where it was not.
    source : str
        Where that range comes from, or why there is none.
    line : str
        All of it in one plain sentence.
    """

    name: str
    title: str
    value: float | int | str | None
    unit: str
    verdict: Verdict
    expected: str
    source: str
    line: str

    @property
    def shown(self) -> str:
        """The value as people read it, with its unit."""
        if self.value is None:
            return "-"
        digits = f"{self.value:.1f}" if isinstance(self.value, float) else str(self.value)
        return f"{digits} {self.unit}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "value": self.value,
            "unit": self.unit,
            "verdict": self.verdict,
            "expected": self.expected,
            "source": self.source,
            "line": self.line,
        }


@dataclass(frozen=True)
class Qc:
    """All checks of a result, in the order a person should read them."""

    checks: tuple[Check, ...]

    @property
    def suspect(self) -> bool:
        """Whether any check is suspect."""
        return any(check.verdict == "suspect" for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the suspect checks."""
        return tuple(check.line for check in self.checks if check.verdict == "suspect")

    def check(self, name: str) -> Check:
        """The check of that name (KeyError where there is none)."""
        return {check.name: check for check in self.checks}[name]


def assess(
    brain: NDArray[np.uint8],
    cortex: NDArray[np.uint8],
    geometry: Geometry,
    *,
    ga_weeks: float | None = None,
) -> Qc:
    """Check a result; a brain mask that was given is checked like one that was found.

    Parameters
    ----------
    brain, cortex : ndarray, shape (i, j, k), uint8
        Labels, 1 inside and 0 outside.
    geometry : Geometry
        The scan's.
    ga_weeks : float, optional
        Gestational age in weeks, 18 to 45. With it, volumes are held against the published ones of
        that completed week, without it against those of all ages.

    Returns
    -------
    Qc

    Raises
    ------
    InputError
        The arrays are not two 3-D arrays of one shape.
    UsageError
        The gestational age is no number from 18 to 45.
    """
    _check_arrays(brain, cortex)
    if ga_weeks is not None:
        check_ga(ga_weeks)
    millilitres = geometry.voxel_volume_ml
    brain_ml = np.count_nonzero(brain) * millilitres
    cortex_ml = np.count_nonzero(cortex) * millilitres
    checks = [
        _brain_found(brain_ml > 0),
        *_components(brain),
        _border(brain, geometry),
        _brain_volume(brain_ml, ga_weeks),
        _cortex_volume(cortex_ml, ga_weeks),
        _cortex_fraction(cortex_ml, brain_ml),
        *_voxels(geometry),
    ]
    if ga_weeks is not None:
        checks.append(_age(ga_weeks))
    return Qc(tuple(checks))


def check_ga(ga_weeks: float) -> None:
    """Refuse a gestational age that no fetus has, before anything runs.

    Raises
    ------
    UsageError
        It is no number from 18 to 45.
    """
    low, high = GA_RANGE
    if not low <= ga_weeks <= high:  # also refuses NaN
        raise UsageError(
            f"a gestational age of {ga_weeks:g} {'week' if ga_weeks == 1 else 'weeks'}",
            expected=f"{low:g} to {high:g} weeks",
            action="give it as decimal weeks, such as 27.4, or as weeks+days, such as 27+3",
        )


def voxel_sizes(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel sides in mm along the array axes: the column norms of the affine's 3 x 3 part."""
    i, j, k = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(i), float(j), float(k))


def canonical_axes(
    affine: NDArray[np.float64],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Array axes that lie closest to the anatomical ones.

    Parameters
    ----------
    affine : ndarray, shape (4, 4)
        Voxel indices to mm, x to the right, y to anterior, z to superior (NIfTI's RAS+).

    Returns
    -------
    tuple of (int, int)
        For x, y and z: the array axis, and 1 where its index grows with the coordinate, else -1.

    Raises
    ------
    InputError
        As for `trtseg.nifti.closest_axes`.
    """
    closest = closest_axes(affine)
    axes = np.argsort(closest[:, 0])
    x, y, z = ((int(axis), int(closest[axis, 1])) for axis in axes)
    return (x, y, z)


def _check_arrays(brain: NDArray[Any], cortex: NDArray[Any]) -> None:
    if brain.ndim != 3 or brain.shape != cortex.shape:
        raise InputError(
            f"a brain mask of shape {brain.shape} and a cortex of shape {cortex.shape}",
            expected="two 3-D arrays of one shape",
        )


def _brain_found(found: bool) -> Check:
    return Check(
        name="brain_found",
        title="Brain found",
        value="yes" if found else "no",
        unit="",
        verdict="ok" if found else "suspect",
        expected="yes",
        source="a scan that is segmented shows a brain",
        line="A brain was found." if found else "No brain was found: both maps are empty.",
    )


def _components(brain: NDArray[np.uint8]) -> tuple[Check, Check]:
    sizes = component_sizes(brain)
    share = 100.0 * float(sizes[0] / sizes.sum()) if len(sizes) else None
    ok = share is not None and share >= 100 * LARGEST_SHARE
    number = Check(
        name="components",
        title="Pieces of the brain mask",
        value=len(sizes),
        unit="",
        verdict="not judged",
        expected="",
        source="scattered voxels are common; what counts is the share of the largest piece. Voxels "
        "that touch by a face, an edge or a corner (26 neighbours) are one piece",
        line=f"The brain mask is in {len(sizes)} {'piece' if len(sizes) == 1 else 'pieces'}.",
    )
    largest = Check(
        name="largest_component",
        title="Largest piece of the brain mask",
        value=share,
        unit="%",
        verdict="not judged" if share is None else "ok" if ok else "suspect",
        expected=f"at least {100 * LARGEST_SHARE:.0f} %",
        source=_OWN,
        line="There is no piece to measure."
        if share is None
        else f"The largest piece holds {share:.1f} % of the brain mask"
        + ("." if ok else ": the rest may be something else than brain."),
    )
    return number, largest


def component_sizes(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Voxels of each connected piece of `mask` (26 neighbours), largest first."""
    _, sizes, _ = _label(mask)
    return np.sort(sizes)[::-1]


def brain_box(mask: NDArray[Any]) -> tuple[slice, slice, slice]:
    """Bounding box of the pieces of `mask` that hold a twentieth of it or more.

    Scattered voxels would else stretch the box over the whole field of view. Without any such
    piece, as in an empty mask, it is the whole array.
    """
    labels, sizes, corner = _label(mask)
    large = np.flatnonzero(sizes >= (1 - LARGEST_SHARE) * sizes.sum()) + 1
    if not len(large):
        i, j, k = (slice(0, size) for size in mask.shape)
    else:
        where = np.nonzero(np.isin(labels, large))
        i, j, k = (
            slice(start + int(found.min()), start + int(found.max()) + 1)
            for start, found in zip(corner, where, strict=True)
        )
    return (i, j, k)


def _label(mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64], tuple[int, ...]]:
    """Numbered pieces in the mask's bounding box, their voxels, and the first corner of the box."""
    from scipy import ndimage

    inside = mask != 0
    # Labelling the bounding box alone keeps memory small on large fields of view.
    boxes = ndimage.find_objects(inside.view(np.uint8))
    if not boxes:
        return np.zeros((0, 0, 0), np.int32), np.zeros(0, np.int64), (0, 0, 0)
    labels, _ = ndimage.label(inside[boxes[0]], np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())[1:].astype(np.int64)
    return labels, sizes, tuple(side.start for side in boxes[0])


def _border(brain: NDArray[np.uint8], geometry: Geometry) -> Check:
    faces = border_voxels(brain, geometry.affine)
    border = np.ones(brain.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    touching = int(np.count_nonzero(brain[border]))
    total = int(np.count_nonzero(brain))
    where = ", ".join(f"{side} {count}" for side, count in faces.items() if count)
    ok = touching <= BORDER_SHARE * total
    if not touching:
        line = "The brain mask lies inside the field of view."
    else:
        line = f"The brain mask touches the border of the field of view ({where} voxels)" + (
            ", too little to matter." if ok else ": the scan may cut the brain."
        )
    return Check(
        name="border",
        title="Brain mask on the border of the field of view",
        value=touching,
        unit="voxels",
        verdict="not judged" if not total else "ok" if ok else "suspect",
        expected=f"at most {100 * BORDER_SHARE:g} % of the brain's voxels",
        source=_OWN,
        line=line,
    )


def border_voxels(mask: NDArray[Any], affine: NDArray[np.float64]) -> dict[str, int]:
    """Voxels of `mask` on each face of the array, by the anatomical side the face is nearest to.

    Returns
    -------
    dict of str to int
        ``left``, ``right``, ``posterior``, ``anterior``, ``inferior``, ``superior``. A voxel on
        an edge counts for both its faces.
    """
    counts = {}
    for (axis, sign), (low, high) in zip(canonical_axes(affine), SIDES, strict=True):
        ends = [int(np.count_nonzero(mask.take(index, axis=axis))) for index in (0, -1)]
        counts[low], counts[high] = ends[::sign]
    return counts


def _brain_volume(millilitres: float, ga_weeks: float | None) -> Check:
    weeks, when = _weeks(ga_weeks)
    source = (
        f"{_REN} ({when}): from the mean brain volume without CSF divided by {MARGIN:g} to the "
        f"mean intracranial volume times {MARGIN:g}, a margin of trtseg's own; the mask may or may "
        "not hold the CSF around the brain"
    )
    if len(weeks) == 1:
        week = weeks[0]
        source += (
            f". Means of that week: {week.brain:.1f} mL without CSF, {week.intracranial:.1f} mL "
            f"intracranial (SD {week.intracranial_sd:.1f})"
        )
    return _volume(
        "brain_volume",
        "Brain volume",
        millilitres,
        min(week.brain for week in weeks) / MARGIN,
        max(week.intracranial for week in weeks) * MARGIN,
        when,
        source,
    )


def _cortex_volume(millilitres: float, ga_weeks: float | None) -> Check:
    weeks, when = _weeks(ga_weeks)
    source = (
        f"{_REN} ({when}): the mean cortical grey matter volume divided and multiplied by "
        f"{MARGIN:g}, a margin of trtseg's own"
    )
    if len(weeks) == 1:
        week = weeks[0]
        source += f". Mean of that week: {week.cortex:.1f} mL (SD {week.cortex_sd:.1f})"
    return _volume(
        "cortex_volume",
        "Cortex volume",
        millilitres,
        min(week.cortex for week in weeks) / MARGIN,
        max(week.cortex for week in weeks) * MARGIN,
        when,
        source,
    )


def _weeks(ga_weeks: float | None) -> tuple[list[_Week], str]:
    """The published weeks to compare with, and how to name them."""
    whole = f"all ages of {_FIRST} to {_LAST} weeks"
    if ga_weeks is None:
        return list(_WEEKS.values()), whole
    completed = math.floor(ga_weeks)
    if completed not in _WEEKS:
        return list(_WEEKS.values()), f"{whole}, for there is no value of {ga_weeks:g} weeks"
    return [_WEEKS[completed]], f"{completed} completed weeks"


def _volume(
    name: str, title: str, value: float, low: float, high: float, when: str, source: str
) -> Check:
    ok = low <= value <= high
    expected = f"{low:.1f} to {high:.1f} mL"
    return Check(
        name=name,
        title=title,
        value=float(value),
        unit="mL",
        verdict="ok" if ok else "suspect",
        expected=expected,
        source=source,
        line=f"{title}: {value:.1f} mL, {'within' if ok else 'outside'} the {expected} that are "
        f"plausible at {when}.",
    )


def _cortex_fraction(cortex_ml: float, brain_ml: float) -> Check:
    weeks = _WEEKS.values()
    low = 100 * min(week.cortex / week.intracranial for week in weeks) / MARGIN
    high = 100 * max(week.cortex / week.brain for week in weeks) * MARGIN
    value = 100.0 * cortex_ml / brain_ml if brain_ml else None
    ok = value is not None and low <= value <= high
    expected = f"{low:.1f} to {high:.1f} %"
    return Check(
        name="cortex_fraction",
        title="Cortex as a share of the brain",
        value=value,
        unit="%",
        verdict="not judged" if value is None else "ok" if ok else "suspect",
        expected=expected,
        source=f"{_REN}, all ages: from the smallest ratio of mean cortical to mean intracranial "
        f"volume divided by {MARGIN:g} to the largest of cortical to brain volume without CSF "
        f"times {MARGIN:g}, a margin of trtseg's own",
        line="There is no brain to take a share of."
        if value is None
        else f"The cortex is {value:.1f} % of the brain mask, {'within' if ok else 'outside'} the "
        f"plausible {expected}.",
    )


def _voxels(geometry: Geometry) -> tuple[Check, Check]:
    sides = voxel_sizes(geometry.affine)
    ratio = max(sides) / min(sides)
    ok = sides_alike(sides)
    shown = " x ".join(f"{side:.2f}" for side in sides)
    size = Check(
        name="voxel_size",
        title="Voxel size",
        value=shown,
        unit="mm",
        verdict="not judged",
        expected="",
        source=f"{_FETIT}: the published networks were developed on 3-D reconstructions of the "
        "Developing Human Connectome Project; no voxel size of theirs could be confirmed",
        line=f"Voxels of {shown} mm; the networks see voxels, not millimetres, and were made for "
        "scans like those they were developed on.",
    )
    shape = Check(
        name="voxel_shape",
        title="Longest to shortest side of a voxel",
        value=float(ratio),
        unit="",
        verdict="ok" if ok else "suspect",
        expected=f"at most {MAX_ANISOTROPY:g}",
        source=f"{_OWN}; the project's fetal scans are reconstructions with voxels of equal sides "
        "(Uus et al., multi-channel spatio-temporal MRI atlas of normal fetal brain development)",
        line="The sides of a voxel are about equal, as in the scans the networks were developed on."
        if ok
        else f"A voxel's longest side is {ratio:.1f} times its shortest: the networks were "
        "developed on voxels of equal sides, not on stacks of thick slices.",
    )
    return size, shape


def _age(ga_weeks: float) -> Check:
    first, last = DEVELOPED_WEEKS
    ok = first <= math.floor(ga_weeks) <= last
    return Check(
        name="gestational_age",
        title="Gestational age",
        value=float(ga_weeks),
        unit="weeks",
        verdict="ok" if ok else "suspect",
        expected=f"{first} to {last} completed weeks",
        source=f"{_FETIT}: 249 scans of {first} to {last} weeks",
        line=f"{ga_weeks:.1f} weeks, {'within' if ok else 'outside'} the {first} to {last} weeks "
        "of the scans the published networks were developed on.",
    )
