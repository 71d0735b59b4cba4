"""``trtseg bids``, a BIDS App: every T2w image of a BIDS dataset, written as BIDS derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trtseg import bids as library
from trtseg import screen
from trtseg.errors import UsageError
from trtseg.logs import log_to
from trtseg.options import (
    DeviceOption,
    EnginesOption,
    GaOption,
    LogFileOption,
    ModelsOption,
    PrecisionOption,
    QuietOption,
    ReorientOption,
    ReportOption,
    ResumeOption,
    ThreadsOption,
    optional,
)
from trtseg.steps import end, log_start, open_segmenter, segment_each

if TYPE_CHECKING:
    from trtseg.batch import Options, Outcome
    from trtseg.pipeline import Segmenter


def _names(entity: str) -> tuple[str, str]:
    """Of the option for its labels, with a hyphen and with the underscore of many BIDS Apps."""
    return f"--{library.KINDS[entity]}-label", f"--{library.KINDS[entity]}_label"


_LABEL_OPTIONS = {name for entity in library.KINDS for name in _names(entity)}


def _labels(entity: str) -> Any:
    """The option for its labels."""
    return optional(
        *_names(entity),
        metavar="LABEL...",
        help=f"{library.KINDS[entity].capitalize()}s, without {entity}-; default: all.",
    )


class LabelsCommand(TyperCommand):
    """A command whose label options take several values each, as those of BIDS Apps do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values; all up to the next option are its own."""
        return super().parse_args(ctx, _repeat_options(args, _LABEL_OPTIONS))


def _repeat_options(args: Sequence[str], options: set[str]) -> list[str]:
    repeated: list[str] = []
    option, values = "", 0
    for arg in args:
        if arg in options or arg.startswith("-"):
            option, values = (arg if arg in options else ""), 0
        elif option:
            repeated += [option] if values else []
            values += 1
        repeated.append(arg)
    return repeated


def bids(
    bids_dir: Annotated[
        Path, typer.Argument(metavar="BIDS_DIR", readable=False, help="The BIDS dataset.")
    ],
    out_dir: Annotated[
        Path,
        typer.Argument(
            metavar="OUT_DIR",
            readable=False,
            help="Folder of the derivatives, such as BIDS_DIR/derivatives/trtseg.",
        ),
    ],
    analysis_level: Annotated[
        str, typer.Argument(metavar="participant", help="The level of analysis.")
    ],
    participant_label: Annotated[list[str] | None, _labels("sub")] = None,
    session_label: Annotated[list[str] | None, _labels("ses")] = None,
    acquisition_label: Annotated[list[str] | None, _labels("acq")] = None,
    reconstruction_label: Annotated[list[str] | None, _labels("rec")] = None,
    run_label: Annotated[list[str] | None, _labels("run")] = None,
    models: ModelsOption = None,
    device: DeviceOption = "auto",
    ga: GaOption = None,
    report: ReportOption = False,
    reorient: ReorientOption = False,
    resume: ResumeOption = False,
    engines: EnginesOption = None,
    threads: ThreadsOption = None,
    precision: PrecisionOption = None,
    log_file: LogFileOption = None,
    quiet: QuietOption = False,
) -> None:
    """Segment every T2w image of a BIDS dataset; write BIDS derivatives.

    A BIDS App. Of every sub-*_T2w.nii or .nii.gz in the anat folders of the participants and their
    sessions it writes masks of the brain and of the cortical grey matter, and a map of both.
    """
    from trtseg.backends import check_device
    from trtseg.batch import Options
    from trtseg.qc import check_ga

    _check_level(analysis_level)
    check_device(device)
    if ga is not None:
        check_ga(ga)
    source = library.read_description(bids_dir)
    library.check_out_dir(bids_dir, out_dir)
    if log_file is not None:
        library.check_log_file(bids_dir, out_dir, log_file)
    found = library.find_t2w(
        bids_dir,
        participant_label or (),
        session_label or (),
        {
            "acq": acquisition_label or (),
            "rec": reconstruction_label or (),
            "run": run_label or (),
        },
    )
    for line in found.notes:
        screen.say_warning(line)
    options = Options(
        models=models,
        device=device,
        threads=threads,
        precision=precision,
        save_dseg=True,
        reorient=reorient,
        report=report,
        ga_weeks=ga,
        resume=resume,
    )
    with log_to(log_file):
        log_start("bids")
        with open_segmenter(options, engines, scans=len(found.scans), quiet=quiet) as segmenter:
            library.write_dataset(bids_dir, out_dir, source)
            outcomes = _segment_all(segmenter, found.scans, out_dir, options, quiet=quiet)
    end(outcomes, quiet=quiet)


def _check_level(level: str) -> None:
    if level == "participant":
        return
    none = "; trtseg has no group level" if level == "group" else ""
    raise UsageError(
        f"analysis level {level}{none}",
        expected="participant",
        action="trtseg bids BIDS_DIR OUT_DIR participant",
    )


def _segment_all(
    segmenter: Segmenter,
    scans: Sequence[library.T2w],
    out_dir: Path,
    options: Options,
    *,
    quiet: bool,
) -> list[Outcome]:
    plans = [(scan.path, library.plan(scan, out_dir, report=options.report)) for scan in scans]
    outcomes = []
    each = segment_each(segmenter, plans, options, quiet=quiet)
    for scan, segmented in zip(scans, each, strict=True):
        outcome = library.add_sidecars(scan, segmented)
        outcomes.append(outcome)
        screen.say_outcome(outcome, quiet=quiet)
    return outcomes
