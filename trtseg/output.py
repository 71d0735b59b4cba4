"""Where results go and how they are named; refuses any plan that would overwrite what it reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtseg import nifti
from trtseg.errors import UsageError
from trtseg.files import make_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtseg.pipeline import Segmentation

_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class OutputPaths:
    """Files of one result; the probability maps are None where not asked for."""

    cortex: Path
    brain: Path
    cortex_probabilities: Path | None
    brain_probabilities: Path | None

    def all(self) -> tuple[Path, ...]:
        """Every file that may be written."""
        paths = (self.cortex, self.brain, self.cortex_probabilities, self.brain_probabilities)
        return tuple(path for path in paths if path is not None)


def plan_outputs(
    scans: Sequence[Path],
    out: Path | None,
    *,
    mask: Path | None = None,
    probabilities: bool = False,
) -> list[OutputPaths]:
    """Name the results of each scan, before anything runs.

    Parameters
    ----------
    scans : sequence of Path
    out : Path, optional
        A folder (need not exist) or, for one scan, a name ending in .nii or .nii.gz for the cortex
        map; the other maps then go beside it. Default: beside each scan.
    mask : Path, optional
        A brain mask that is read; it must not be overwritten either.
    probabilities : bool
        Whether probability maps are written. With a mask there is no probability of the brain.

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
    named = out is not None and not out.is_dir() and out.name.lower().endswith(_NIFTI)
    if named and len(scans) > 1:
        raise UsageError(
            f"-o {out} is one file, and {len(scans)} scans are given",
            expected="a folder for several scans",
            action="give -o a folder",
        )
    plans = []
    for scan in scans:
        stem = nifti.volume_stem(scan)
        folder = scan.parent if out is None else out.parent if named else out
        plans.append(
            OutputPaths(
                cortex=out if named and out is not None else folder / f"{stem}_cgm.nii.gz",
                brain=folder / f"{stem}_brain.nii.gz",
                cortex_probabilities=folder / f"{stem}_cgm_prob.nii.gz" if probabilities else None,
                brain_probabilities=(
                    folder / f"{stem}_brain_prob.nii.gz" if probabilities and mask is None else None
                ),
            )
        )
    _check(scans, plans, mask)
    return plans


def save(result: Segmentation, paths: OutputPaths) -> None:
    """Write a result's maps; each file is replaced atomically.

    Raises
    ------
    OutputError
        A folder or file cannot be written.
    """
    for folder in {path.parent for path in paths.all()}:
        make_folder(folder)
    description = result.notice
    nifti.write_labels(paths.brain, result.brain, result.geometry, description=description)
    if paths.brain_probabilities is not None and result.brain_probabilities is not None:
        nifti.write_probabilities(
            paths.brain_probabilities,
            result.brain_probabilities,
            result.geometry,
            description=description,
        )
    if paths.cortex_probabilities is not None and result.cortex_probabilities is not None:
        nifti.write_probabilities(
            paths.cortex_probabilities,
            result.cortex_probabilities,
            result.geometry,
            description=description,
        )
    # The cortex comes last: where it is new, the files it belongs with are new too.
    nifti.write_labels(paths.cortex, result.cortex, result.geometry, description=description)


def _check(scans: Sequence[Path], plans: Sequence[OutputPaths], mask: Path | None) -> None:
    inputs = {_key(path): path for path in [*scans, *([] if mask is None else [mask])]}
    writers: dict[Path, Path] = {}
    for scan, plan in zip(scans, plans, strict=True):
        for path in plan.all():
            key = _key(path)
            if key in inputs:
                raise UsageError(
                    f"{path} would overwrite the input {inputs[key]}",
                    expected="results under names of their own",
                    action="choose another output with -o",
                )
            if key in writers:
                raise UsageError(
                    f"{writers[key]} and {scan} would both write {path}",
                    expected="one scan per result",
                    action="rename a scan, give each once, or run them with different -o folders",
                )
            writers[key] = scan


def _key(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve fails on a loop of links in Python < 3.13
