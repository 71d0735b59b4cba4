"""The command line: parse, one library call, save, say what came out.

Heavy modules are imported inside the commands, so that ``trtseg --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from trtseg import __version__, screen
from trtseg.bids import LabelsCommand, bids
from trtseg.errors import (
    EXIT_DEVICE,
    EXIT_INTERRUPTED,
    EXIT_MODEL,
    EXIT_OK,
    EngineMissingError,
    MissingExtraError,
    OutputError,
    TrtsegError,
    worst_exit_code,
)
from trtseg.logs import LOG, log_to

if TYPE_CHECKING:
    from trtseg.batch import Options, Outcome
    from trtseg.models import ModelSet
    from trtseg.output import OutputPaths
    from trtseg.pipeline import Segmenter

_F = TypeVar("_F", bound=Callable[..., None])

app = typer.Typer(
    name="trtseg",
    help="Fetal-brain cortex segmentation from 3-D T2w MRI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
engines_app = typer.Typer(help="Build and inspect networks.", no_args_is_help=True)
models_app = typer.Typer(help="Fetch, import and check model weights.", no_args_is_help=True)
app.add_typer(engines_app, name="engines")
app.add_typer(models_app, name="models")

ModelsOption = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="NAME",
        help="Model set; default: the published one.",
        show_default=False,
    ),
]
EnginesOption = Annotated[
    Path | None,
    typer.Option(
        "--engines",
        metavar="DIR",
        help="Folder of built networks; default: engines/ in $TRTSEG_HOME, else in the clone, "
        "else in the user's data folder.",
        show_default=False,
    ),
]
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        metavar="FILE",
        help="Add a log to the end of this file: times, stages, versions; no names.",
        show_default=False,
    ),
]


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


def _command(function: _F) -> _F:
    """Turn the project's errors, and an interrupt, into one line and the exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        with _exit_on_error():
            function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextmanager
def _exit_on_error() -> Iterator[None]:
    try:
        yield
    except TrtsegError as error:
        screen.say_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except MemoryError:
        screen.say_error("out of memory; expected more free memory; close other programs")
        raise typer.Exit(EXIT_DEVICE) from None
    except KeyboardInterrupt:
        screen.say_error("interrupted; nothing was left half-written")
        raise typer.Exit(EXIT_INTERRUPTED) from None


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


app.command("bids", cls=LabelsCommand)(_command(bids))


@app.command()
@_command
def segment(
    scans: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCAN...",
            help="T2w scans, .nii or .nii.gz; folders of them; patterns in quotes.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="A folder, or for one scan the cortex map's name (.nii, .nii.gz); "
            "default: beside each scan.",
            show_default=False,
        ),
    ] = None,
    models: ModelsOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask",
            metavar="BRAIN",
            help="A brain mask on the scan's grid that takes the brain network's place.",
            show_default=False,
        ),
    ] = None,
    ga: Annotated[
        float | None,
        typer.Option(
            "--ga",
            metavar="WEEKS",
            help="Gestational age, such as 27.4; the checks then go by that week.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page with pictures and all checks.")
    ] = False,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats",
            metavar="FILE",
            help="Write a table across scans, .csv or .json.",
            show_default=False,
        ),
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
    reorient: Annotated[
        bool,
        typer.Option(
            "--reorient",
            help="Run in RAS+ orientation, so that how a scan is stored does not matter; "
            "default: as stored, as the published system does.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Leave out scans whose results are complete and intact."),
    ] = False,
    keep_names: Annotated[
        bool,
        typer.Option(
            "--keep-names", help="Let file names into sidecars, reports, tables and the log."
        ),
    ] = False,
    engines: EnginesOption = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="CPU threads; default: the cores this process may run on.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="PRECISION",
            help="f32, which gives DeepMedic's labels; or bf16, faster, with a few labels changed.",
        ),
    ] = "f32",
    log_file: LogFileOption = None,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print warnings and errors only.")
    ] = False,
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
        _log_start("segment")
        with _open_segmenter(options, engines, quiet=quiet) as segmenter:
            LOG.info(
                "models %s, device %s, precision %s, scans: %d",
                segmenter.models,
                segmenter.device,
                segmenter.precision,
                len(plans),
            )
            if verbose:
                screen.say_what_is_used(segmenter)
            outcomes = _segment_all(segmenter, plans, options, stats, quiet=quiet)
    if len(outcomes) > 1 and not quiet:
        screen.say_summary(outcomes)
    code = worst_exit_code([outcome.exit_code for outcome in outcomes])
    if code != EXIT_OK:
        raise typer.Exit(code)


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
    from trtseg.batch import process
    from trtseg.files import make_folder

    if stats is not None:
        make_folder(stats.parent)
    outcomes: list[Outcome] = []
    try:
        for scan, paths in plans:
            with screen.tile_progress(quiet=quiet) as progress:
                outcome = process(segmenter, scan, paths, options, progress=progress)
            outcomes.append(outcome)
            screen.say_outcome(outcome, quiet=quiet)
    except KeyboardInterrupt:
        with contextlib.suppress(OutputError):  # the interrupt is the worse of the two
            _write_stats(stats, outcomes, options)
        raise
    _write_stats(stats, outcomes, options)
    return outcomes


def _write_stats(stats: Path | None, outcomes: list[Outcome], options: Options) -> None:
    if stats is None:
        return
    from trtseg.sidecar import write_stats

    write_stats(stats, [outcome.row(keep_names=options.keep_names) for outcome in outcomes])


def _log_start(command: str) -> None:
    from trtseg.sidecar import versions

    LOG.info("%s: %s", command, ", ".join(f"{name} {one}" for name, one in versions().items()))


@contextmanager
def _open_segmenter(options: Options, engines: Path | None, *, quiet: bool) -> Iterator[Segmenter]:
    """Load the networks, building them first where that takes seconds and nothing is built yet."""
    from trtseg.pipeline import Segmenter

    load = functools.partial(
        Segmenter,
        options.models,
        engines=engines,
        device=options.device,
        threads=options.threads,
        precision=options.precision,
    )
    try:
        segmenter = load()
    except EngineMissingError as missing:
        try:
            _build(options.models, engines, force=False, quiet=quiet)
        except MissingExtraError as error:
            raise EngineMissingError(
                missing.found,
                expected="a built network, or the build extra to make one here",
                action="pip install 'trtseg[build]', then " + missing.action,
            ) from error
        segmenter = load()
    with segmenter:
        yield segmenter


@app.command()
@_command
def info(
    engines: EnginesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is here, what is missing, and the command that mends it."""
    from trtseg.info import gather, lines

    found = gather(engines)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            screen.say(line)


@engines_app.command("build")
@_command
def engines_build(
    models: ModelsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--engines",
            metavar="DIR",
            help="Folder to build into; default: engines/ in $TRTSEG_HOME, else in the clone, "
            "else in the user's data folder.",
            show_default=False,
        ),
    ] = None,
    log_file: LogFileOption = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Freeze the checkpoints of a model set and build its networks."""
    with log_to(log_file):
        _log_start("engines build")
        _build(models, out, force=True, quiet=quiet)


def _build(models: str | None, root: Path | None, *, force: bool, quiet: bool) -> None:
    from trtseg.build.builder import build_models
    from trtseg.home import engines_root
    from trtseg.models import find_models

    found = find_models(models)
    folder = engines_root(root)
    started = time.perf_counter()
    with screen.status(f"Building {found.name}", quiet=quiet) as show:

        def told(line: str) -> None:
            LOG.info("%s", line)
            if show is not None:
                show(line)

        engines = build_models(found, folder, force=force, report=told)
    LOG.info("built %s: %.2f s", found.name, time.perf_counter() - started)
    for engine in engines:
        for name, digest in engine.manifest["files"].items():
            LOG.info("%s: %s, SHA-256 %s", engine.net.upper(), name, digest)
    if quiet:
        return
    for engine in engines:
        difference = float(engine.manifest["proof"]["largest_difference"])
        screen.say(
            f"{engine.net.upper()}: {engine.folder} (differs from its checkpoint by at most "
            f"{difference:.1e} in probability)"
        )
    screen.say(f"built {found.name} in {time.perf_counter() - started:.1f} s")
    if found.notice:
        screen.say(f"note: {found.notice}")


@engines_app.command("list")
@_command
def engines_list(engines: EnginesOption = None) -> None:
    """List what is built."""
    from trtseg.engine import built_models
    from trtseg.home import engines_root

    root = engines_root(engines)
    names = built_models(root)
    if not names:
        screen.say(f"nothing is built in {root}; build with: trtseg engines build --models NAME")
    for name in names:
        screen.say(f"{name}  {root / name}")


@engines_app.command("verify")
@_command
def engines_verify(models: ModelsOption = None, engines: EnginesOption = None) -> None:
    """Check every byte of what is built, and that it belongs to the checkpoint that is here."""
    from trtseg.home import engines_root
    from trtseg.pipeline import load_engines

    for engine in load_engines(models, engines_root(engines)).values():
        screen.say(f"{engine.net.upper()}: intact  {engine.folder}")


@models_app.command("list")
@_command
def models_list() -> None:
    """List the model sets on this machine."""
    from trtseg.models import PUBLISHED, list_models

    sets = list_models()
    for models in sets:
        screen.say("  ".join(filter(None, [models.name, str(models.folder), models.notice])))
    if PUBLISHED not in [models.name for models in sets]:
        screen.say(f"{PUBLISHED}  not here; fetch with: trtseg models pull")


@models_app.command("pull")
@_command
def models_pull(
    mirror: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="URL",
            help="A mirror with the published folder layout; hashes are checked all the same.",
            show_default=False,
        ),
    ] = None,
    log_file: LogFileOption = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Download the published weights, verified by size and hash."""
    from trtseg import models as library
    from trtseg.architecture import NETWORKS

    with log_to(log_file), screen.download_progress(quiet=quiet) as (progress, told):
        _log_start("models pull")
        url = library.PUBLISHED_URL if mirror is None else mirror
        found = library.pull(base_url=url, progress=progress, report=told)
        for net in NETWORKS:
            for name, digest in found.digests(net).items():
                LOG.info("%s: SHA-256 %s", name, digest)
    if not quiet:
        screen.say(f"{found.name}: {found.folder}")
        screen.say(f"licence: {library.LICENCE}")
        screen.say(f"please cite: {library.CITATION}")


@models_app.command("import")
@_command
def models_import(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder the files were copied to.")],
    unpublished: Annotated[
        bool,
        typer.Option("--unpublished", help="Any other DeepMedic v0.7.0 weights; needs --name."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the new set.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="DeepMedic model config of both networks; default: the ones found in DIR, "
            "else the published architecture.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Take weights that were copied to this machine."""
    from trtseg import models as library

    found = library.import_folder(
        source,
        unpublished=unpublished,
        name=name,
        config=config,
        report=lambda line: screen.say(line, err=True),
    )
    screen.say(f"{found.name}: {found.folder}")
    screen.say(f"build it with: trtseg engines build --models {found.name}")


@models_app.command("verify")
@_command
def models_verify(models: ModelsOption = None) -> None:
    """Check the files of a model set against their hashes; all sets by default."""
    from trtseg import models as library

    sets: list[ModelSet] = (
        library.list_models() if models is None else [library.find_models(models)]
    )
    damaged = False
    for found in sets:
        for check in library.verify(found):
            screen.say(f"{found.name}  {check.path.name}  {check.detail}")
            damaged |= not check.ok
    if damaged:
        raise typer.Exit(EXIT_MODEL)
