"""The command line: parse, one library call, save, say what came out.

Heavy modules are imported inside the commands, so that ``trtseg --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from trtseg import __version__, cli_engines, cli_models, screen
from trtseg.cli_bids import LabelsCommand, bids
from trtseg.errors import EXIT_INTERRUPTED, EXIT_OK, OutputError
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
from trtseg.steps import Group, end, log_start, open_segmenter, segment_each

if TYPE_CHECKING:
    from trtseg.batch import Options, Outcome
    from trtseg.output import OutputPaths
    from trtseg.pipeline import Segmenter

app = typer.Typer(
    name="trtseg",
    cls=Group,
    help="Fetal-brain cortex segmentation from 3-D T2w MRI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_engines.app, name="engines")
app.add_typer(cli_models.app, name="models")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.
    """
    try:
        # A batch system's SIGTERM ends a run as Ctrl-C does: nothing is left half-written.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        app(args=None if argv is None else list(argv), prog_name="trtseg")
    except KeyboardInterrupt:
        screen.say_error("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(EXIT_OK)


def _version(wanted: bool) -> None:
    if wanted:
        screen.say(f"trtseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


app.command("bids", cls=LabelsCommand)(bids)


@app.command()
def segment(
    scans: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCAN",
            readable=False,
            help="T2w scans, .nii or .nii.gz; folders of them; patterns in quotes.",
        ),
    ],
    out: Annotated[
        Path | None,
        optional(
            "-o",
            "--out",
            metavar="OUT",
            help="A folder, or for one scan the cortex map's name (.nii, .nii.gz); "
            "default: beside each scan.",
        ),
    ] = None,
    models: ModelsOption = None,
    device: DeviceOption = "auto",
    mask: Annotated[
        Path | None,
        optional(
            "--mask",
            metavar="BRAIN",
            help="A brain mask on the scan's grid that takes the brain network's place.",
        ),
    ] = None,
    ga: GaOption = None,
    report: ReportOption = False,
    stats: Annotated[
        Path | None,
        optional("--stats", metavar="FILE", help="Write a table across scans, .csv or .json."),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write the probability maps as well.")
    ] = False,
    save_dseg: Annotated[
        bool,
        typer.Option(
            "--save-dseg",
            help="Write one map of both labels (1 brain, 2 cortex) and its lookup table as well.",
        ),
    ] = False,
    reorient: ReorientOption = False,
    resume: ResumeOption = False,
    keep_names: Annotated[
        bool,
        typer.Option(
            "--keep-names", help="Let file names into sidecars, reports, tables and the log."
        ),
    ] = False,
    engines: EnginesOption = None,
    threads: ThreadsOption = None,
    precision: PrecisionOption = None,
    log_file: LogFileOption = None,
    quiet: QuietOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print what was used.")] = False,
) -> None:
    """Segment the brain and the cortical grey matter of one or more scans.

    Writes SCAN_cgm.nii.gz and SCAN_brain.nii.gz (1 inside, 0 outside) on the scan's own grid, and
    SCAN_trtseg.json, which says what they were made of.
    """
    from trtseg.batch import Options

    options = Options(
        models=models,
        device=device,
        threads=threads,
        precision=precision,
        mask=mask,
        save_probabilities=save_probabilities,
        save_dseg=save_dseg,
        reorient=reorient,
        report=report,
        ga_weeks=ga,
        keep_names=keep_names,
        resume=resume,
    )
    plans = _plan(scans, out, options, stats, log_file)
    with log_to(log_file, names=keep_names):
        log_start("segment")
        with open_segmenter(options, engines, scans=len(plans), quiet=quiet) as segmenter:
            if verbose:
                screen.say_what_is_used(segmenter)
            outcomes = _segment_all(segmenter, plans, options, stats, quiet=quiet)
    end(outcomes, quiet=quiet)


def _plan(
    arguments: list[Path],
    out: Path | None,
    options: Options,
    stats: Path | None,
    log_file: Path | None,
) -> list[tuple[Path, OutputPaths]]:
    """Each scan with the files that will be written, once all of the options make sense."""
    from trtseg.backends import check_device
    from trtseg.batch import find_scans
    from trtseg.errors import UsageError
    from trtseg.files import check_writable
    from trtseg.output import plan_outputs
    from trtseg.qc import check_ga
    from trtseg.sidecar import check_stats_path

    check_device(options.device)
    if options.ga_weeks is not None:
        check_ga(options.ga_weeks)
    if stats is not None:
        check_stats_path(stats)
    found = find_scans(arguments)
    if found.passed_over:
        screen.say_passed_over(found.passed_over)
    if len(found.scans) > 1 and options.mask is not None:
        raise UsageError(
            f"--mask with {len(found.scans)} scans",
            expected="one scan, whose grid the mask is on",
            action="run the scans one by one, each with its own mask",
        )
    plans = plan_outputs(
        found.scans,
        out,
        mask=options.mask,
        probabilities=options.save_probabilities,
        dseg=options.save_dseg,
        report=options.report,
        others={"--stats": stats, "--log-file": log_file},
    )
    if stats is not None:
        check_writable(stats, "--stats")
    if out is not None and not options.resume:  # what is complete already needs no writing
        check_writable(plans[0].cortex, "-o")
    return list(zip(found.scans, plans, strict=True))


def _segment_all(
    segmenter: Segmenter,
    plans: list[tuple[Path, OutputPaths]],
    options: Options,
    stats: Path | None,
    *,
    quiet: bool,
) -> list[Outcome]:
    """Segment and save scan by scan; the table is written whatever stops the batch."""
    from trtseg.files import make_folder

    if stats is not None:
        make_folder(stats.parent)
    outcomes: list[Outcome] = []
    try:
        for outcome in segment_each(segmenter, plans, options, quiet=quiet):
            outcomes.append(outcome)
            screen.say_outcome(outcome, quiet=quiet)
    except (KeyboardInterrupt, OutputError, BrokenPipeError):  # the last two: of what is printed
        with contextlib.suppress(OutputError):  # what stopped the batch is the worse of the two
            _write_stats(stats, outcomes, options)
        raise
    _write_stats(stats, outcomes, options)
    return outcomes


def _write_stats(stats: Path | None, outcomes: list[Outcome], options: Options) -> None:
    if stats is None:
        return
    from trtseg.sidecar import write_stats

    write_stats(stats, [outcome.row(keep_names=options.keep_names) for outcome in outcomes])


@app.command()
def bench(
    scan: Annotated[
        Path,
        typer.Argument(metavar="SCAN", readable=False, help="A T2w scan, .nii or .nii.gz."),
    ],
    runs: Annotated[
        int, typer.Option("--runs", min=1, metavar="N", help="Warm runs; one more comes before.")
    ] = 10,
    models: ModelsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    precision: PrecisionOption = None,
    engines: EnginesOption = None,
    as_json: Annotated[
        Path | None, optional("--json", metavar="FILE", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Time a scan from its file to the label maps, stage by stage, on this machine.

    What is written goes to a temporary folder. The share of the device's ceilings is of one large
    matrix product or convolution and one large copy, timed in the same run.
    """
    from trtseg import bench as library
    from trtseg.files import atomic_write_json, check_writable, make_folder
    from trtseg.pipeline import Segmenter

    if as_json is not None:
        check_writable(as_json, "--json")
    load = functools.partial(
        Segmenter, models, engines=engines, device=device, threads=threads, precision=precision
    )
    with screen.status("Timing", quiet=False) as show:

        def told(done: int, total: int) -> None:
            if show is not None:
                show(f"run {done} of {total}")

        report = library.measure(load, scan, runs=runs, progress=told)
    for line in library.lines(report):
        screen.say(line)
    if as_json is not None:
        make_folder(as_json.parent)
        atomic_write_json(as_json, report, action="choose another --json, or make room")


@app.command()
def info(
    engines: EnginesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is here, what is missing, and the command that mends it."""
    from trtseg.info import gather, lines

    found = gather(engines)
    if as_json:
        screen.say_as_is(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            screen.say(line)
