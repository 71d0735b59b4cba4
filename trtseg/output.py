"""Where results go and how they are named; refuses any plan that would overwrite what it reads."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtseg import nifti
from trtseg.errors import OutputError, UsageError
from trtseg.files import atomic_write_json, make_folder, sha256_file
from trtseg.sidecar import write_lookup
from trtseg.volumefile import volume_stem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtseg.pipeline import Segmentation

_NIFTI = (".nii", ".nii.gz")

#: Ends of names that mean another kind of file than a folder or what is written.
_OTHER_FILES = (".mgz", ".mgh", ".nrrd", ".mha", ".mhd", ".img", ".hdr", ".gz")

#: What the name of each file but the sidecar adds to the scan's: role to ending.
_ENDINGS = {
    "cortex": "_cgm.nii.gz",
    "brain": "_brain.nii.gz",
    "cortex_probabilities": "_cgm_prob.nii.gz",
    "brain_probabilities": "_brain_prob.nii.gz",
    "dseg": "_dseg.nii.gz",
    "lookup": "_dseg.tsv",
    "report": "_report.html",
    "picture": "_report.png",
}

#: What the name of the sidecar adds to the scan's.
SIDECAR_ENDING = "_trtseg.json"

# The masks' names are those of `trtseg.bids`, where a label comes before a description.
_MAP = re.compile(
    r"(.+)_(?:cgm_prob|brain_prob|cgm|brain|dseg|label-(?:CGM|brain)(_desc-[0-9A-Za-z+]+)?_mask)"
)


@dataclass(frozen=True)
class OutputPaths:
    """Files of one result; None where not asked for.

    Attributes
    ----------
    cortex, brain : Path
        Label maps.
    cortex_probabilities, brain_probabilities : Path or None
    dseg, lookup : Path or None
        Both labels in one map, and the table of what its values mean.
    report, picture : Path or None
        The page and the picture it holds.
    sidecar : Path
        What the result was made of, with the digests of all the others.
    """

    cortex: Path
    brain: Path
    cortex_probabilities: Path | None
    brain_probabilities: Path | None
    sidecar: Path
    dseg: Path | None = None
    lookup: Path | None = None
    report: Path | None = None
    picture: Path | None = None

    def maps(self) -> dict[str, Path]:
        """What `save` writes: role to file."""
        return _present(
            cortex=self.cortex,
            brain=self.brain,
            cortex_probabilities=self.cortex_probabilities,
            brain_probabilities=self.brain_probabilities,
            dseg=self.dseg,
            lookup=self.lookup,
        )

    def pages(self) -> dict[str, Path]:
        """What a person looks at: role to file."""
        return _present(report=self.report, picture=self.picture)

    def results(self) -> dict[str, Path]:
        """What the sidecar lists: role to file."""
        return {**self.maps(), **self.pages()}

    def all(self) -> tuple[Path, ...]:
        """Every file that may be written."""
        return (*self.results().values(), self.sidecar)

    def unasked(self) -> dict[str, Path]:
        """What a result beside this sidecar may have, and this one has not: role to file."""
        start = self.sidecar.name.removesuffix(SIDECAR_ENDING)
        names = {role: self.sidecar.with_name(start + end) for role, end in _ENDINGS.items()}
        return {role: path for role, path in names.items() if path not in self.all()}


def map_of(stem: str) -> str | None:
    """What the name of a map, without its suffix, shares with its sidecar's; None for no map."""
    match = _MAP.fullmatch(stem)
    return None if match is None else match[1] + (match[2] or "")


def _present(**files: Path | None) -> dict[str, Path]:
    return {role: path for role, path in files.items() if path is not None}


def plan_outputs(
    scans: Sequence[Path],
    out: Path | None,
    *,
    mask: Path | None = None,
    probabilities: bool = False,
    dseg: bool = False,
    report: bool = False,
    others: Mapping[str, Path | None] | None = None,
) -> list[OutputPaths]:
    """Name the results of each scan, before anything runs.

    Parameters
    ----------
    scans : sequence of Path
    out : Path, optional
        A folder (need not exist) or, for one scan, a name ending in .nii or .nii.gz for the cortex
        map; the other files then go beside it. Default: beside each scan.
    mask : Path, optional
        A brain mask that is read; it must not be overwritten either.
    probabilities : bool
        Whether probability maps are written. With a mask there is no probability of the brain.
    dseg : bool
        Whether the map of both labels and its lookup table are written.
    report : bool
        Whether the report and its picture are written.
    others : mapping of str to Path or None, optional
        Further files that will be written, by the option that names each.

    Returns
    -------
    list of OutputPaths
        One per scan, in order.

    Raises
    ------
    UsageError
        Two scans would write the same file, a result would overwrite an input, or `out` names one
        file for several scans, or a file of a kind that is not written.
    """
    named = out is not None and not is_folder(out) and out.name.lower().endswith(_NIFTI)
    if out is not None and not named:
        _check_folder(out)
    if named and len(scans) > 1:
        raise UsageError(
            f"-o {out} is one file, and {len(scans)} scans are given",
            expected="a folder for several scans",
            action="give -o a folder",
        )
    plans = [
        _plan(
            scan,
            scan.parent if out is None else out.parent if named else out,
            cortex=out if named else None,
            probabilities=probabilities,
            brain_probabilities=probabilities and mask is None,
            dseg=dseg,
            report=report,
        )
        for scan in scans
    ]
    _check(scans, plans, mask, others or {})
    return plans


def _plan(
    scan: Path,
    folder: Path,
    *,
    cortex: Path | None,
    probabilities: bool,
    brain_probabilities: bool,
    dseg: bool,
    report: bool,
) -> OutputPaths:
    start = volume_stem(scan)
    names = {role: folder / f"{start}{ending}" for role, ending in _ENDINGS.items()}
    return OutputPaths(
        cortex=cortex or names["cortex"],
        brain=names["brain"],
        cortex_probabilities=names["cortex_probabilities"] if probabilities else None,
        brain_probabilities=names["brain_probabilities"] if brain_probabilities else None,
        sidecar=folder / f"{start}{SIDECAR_ENDING}",
        dseg=names["dseg"] if dseg else None,
        lookup=names["lookup"] if dseg else None,
        report=names["report"] if report else None,
        picture=names["picture"] if report else None,
    )


def _check_folder(out: Path) -> None:
    """Refuse a name that would become a folder's, and was not meant so."""
    if out.name.lower().endswith(_OTHER_FILES) and not is_folder(out):
        raise UsageError(
            f"-o {out} is the name of a file of another kind",
            expected="a folder, or for one scan a name ending in .nii or .nii.gz",
            action="change its ending",
        )


def save(result: Segmentation, paths: OutputPaths) -> None:
    """Write a result's maps; each file is replaced atomically.

    Raises
    ------
    OutputError
        A folder or file cannot be written.
    """
    for folder in {path.parent for path in paths.all()}:
        make_folder(folder)
    geometry, notice = result.geometry, result.notice
    nifti.write_labels(paths.brain, result.brain, geometry, description=notice)
    for path, values in (
        (paths.brain_probabilities, result.brain_probabilities),
        (paths.cortex_probabilities, result.cortex_probabilities),
    ):
        if path is not None and values is not None:
            nifti.write_probabilities(path, values, geometry, description=notice)
    if paths.dseg is not None:
        # Cortex lies within brain: 1 is brain alone, 2 is cortex.
        nifti.write_labels(paths.dseg, result.brain + result.cortex, geometry, description=notice)
    if paths.lookup is not None:
        write_lookup(paths.lookup, "dseg")
    # The cortex comes last: where it is new, the files it belongs with are new too.
    nifti.write_labels(paths.cortex, result.cortex, geometry, description=notice)


def remove_stale(paths: OutputPaths, inputs: Sequence[Path]) -> tuple[str, ...]:
    """Remove what an earlier result of that name has besides this one, so that none contradicts it.

    To be called when all files of this result but the sidecar are written. The earlier sidecar then
    loses its seal first: it vouches for nothing any more, and if this is interrupted, the digests
    in it still tell the next run what to remove.

    Parameters
    ----------
    paths : OutputPaths
    inputs : sequence of Path
        Files that are read; they stay, whatever their names.

    Returns
    -------
    tuple of str
        Roles of the files that were removed: those of `OutputPaths.unasked` that the earlier
        sidecar lists with the digest they have.

    Raises
    ------
    OutputError
        A file cannot be removed.
    """
    earlier = _read_earlier(paths.sidecar)
    kept = {_key(path) for path in (*inputs, *paths.all())}
    stale = {
        role: path
        for role, path in paths.unasked().items()
        if _key(path) not in kept and _is_listed(path, earlier, role)
    }
    if stale:
        atomic_write_json(
            paths.sidecar, {name: value for name, value in earlier.items() if name != "seal"}
        )
    for path in stale.values():
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(
                f"{path}: {error.strerror or error}",
                expected="a file of an earlier result, to remove it",
                action="remove it, or choose another output folder",
            ) from error
    return tuple(stale)


def _read_earlier(sidecar: Path) -> dict[str, Any]:
    """An earlier sidecar, sealed or not; empty where there is none or it is something else."""
    try:
        found = json.loads(sidecar.read_bytes()) if sidecar.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_listed(path: Path, earlier: Mapping[str, Any], role: str) -> bool:
    """Whether a file is there, and is the one that a sidecar lists."""
    try:
        digest = earlier["outputs"][role]["sha256"]
        return path.is_file() and sha256_file(path) == digest
    except (OSError, KeyError, TypeError):
        return False


def _check(
    scans: Sequence[Path],
    plans: Sequence[OutputPaths],
    mask: Path | None,
    others: Mapping[str, Path | None],
) -> None:
    inputs = {_key(path): path for path in [*scans, *([] if mask is None else [mask])]}
    written: list[tuple[str, Path]] = [
        (str(scan), path) for scan, plan in zip(scans, plans, strict=True) for path in plan.all()
    ]
    written += [(option, path) for option, path in others.items() if path is not None]
    writers: dict[Path, str] = {}
    for writer, path in written:
        key = _key(path)
        if key in inputs:
            raise UsageError(
                f"{path} would overwrite the input {inputs[key]}",
                expected="results under names of their own",
                action="choose another output, or give a folder, whose results are passed over",
            )
        if key in writers:
            raise UsageError(
                f"{writers[key]} and {writer} would both write {path}",
                expected="one scan per result, and names of their own for all other files",
                action="rename a file, give each scan once, or use different -o folders",
            )
        writers[key] = writer


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; False, not an error, below a folder that may not be entered."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _key(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve fails on a loop of links in Python < 3.13
