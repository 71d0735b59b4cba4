"""Where results go and how they are named; refuses any plan that would overwrite what it reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtseg import nifti
from trtseg.errors import UsageError
from trtseg.files import make_folder
from trtseg.sidecar import write_lookup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtseg.pipeline import Segmentation

_NIFTI = (".nii", ".nii.gz")

#: What the names of maps add to the scan's; longer ones first, so that the first match is whole.
MAP_ENDINGS = ("_cgm_prob", "_brain_prob", "_cgm", "_brain", "_dseg")

#: What the name of the sidecar adds to the scan's.
SIDECAR_ENDING = "_trtseg.json"


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
        file for several scans.
    """
    named = out is not None and not is_folder(out) and out.name.lower().endswith(_NIFTI)
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
    def name(ending: str) -> Path:
        return folder / f"{nifti.volume_stem(scan)}{ending}"

    return OutputPaths(
        cortex=cortex or name("_cgm.nii.gz"),
        brain=name("_brain.nii.gz"),
        cortex_probabilities=name("_cgm_prob.nii.gz") if probabilities else None,
        brain_probabilities=name("_brain_prob.nii.gz") if brain_probabilities else None,
        sidecar=name(SIDECAR_ENDING),
        dseg=name("_dseg.nii.gz") if dseg else None,
        lookup=name("_dseg.tsv") if dseg else None,
        report=name("_report.html") if report else None,
        picture=name("_report.png") if report else None,
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
