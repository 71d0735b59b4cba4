"""The command line: parse, one library call, save, say what came out.

Heavy modules are imported inside the commands, so that ``trtseg --help`` answers at once.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from trtseg import __version__
from trtseg.errors import (
    EXIT_DEVICE,
    EXIT_INTERRUPTED,
    EXIT_MODEL,
    EXIT_OK,
    EXIT_SUSPECT,
    EngineMissingError,
    MissingExtraError,
    TrtsegError,
    worst_exit_code,
)

if TYPE_CHECKING:
    from rich.console import Console

    from trtseg.models import ModelSet
    from trtseg.output import OutputPaths
    from trtseg.pipeline import Progress, Segmentation, Segmenter

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


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="trtseg")
    except KeyboardInterrupt:
        _say_error("interrupted")
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
        _say_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except MemoryError:
        _say_error(_OUT_OF_MEMORY)
        raise typer.Exit(EXIT_DEVICE) from None
    except KeyboardInterrupt:
        _say_error("interrupted; nothing was left half-written")
        raise typer.Exit(EXIT_INTERRUPTED) from None


_OUT_OF_MEMORY = "out of memory; expected more free memory for this scan; close other programs"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trtseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
@_command
def segment(
    scans: Annotated[
        list[Path], typer.Argument(metavar="SCAN...", help="T2w scans, .nii or .nii.gz.")
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
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write the probability maps as well.")
    ] = False,
    reorient: Annotated[
        bool,
        typer.Option(
            "--reorient",
            help="Run in RAS+ orientation, so that how a scan is stored does not matter; "
            "default: as stored, as the published system does.",
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
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print warnings and errors only.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print what was used.")] = False,
) -> None:
    """Segment the brain and the cortical grey matter of one or more scans.

    Writes SCAN_cgm.nii.gz and SCAN_brain.nii.gz (1 inside, 0 outside) on the scan's own grid.
    """
    from trtseg.backends import check_device
    from trtseg.errors import UsageError
    from trtseg.output import plan_outputs

    check_device(device)
    if mask is not None and len(scans) > 1:
        raise UsageError(
            f"--mask with {len(scans)} scans",
            expected="one scan, whose grid the mask is on",
            action="run the scans one by one, each with its own mask",
        )
    plans = plan_outputs(scans, out, mask=mask, probabilities=save_probabilities)
    codes = []
    with _open_segmenter(models, engines, device, threads, precision, quiet=quiet) as segmenter:
        if verbose:
            _say_what_is_used(segmenter)
        for scan, paths in zip(scans, plans, strict=True):
            codes.append(
                _segment_one(
                    segmenter, scan, paths, mask, save_probabilities, reorient, quiet=quiet
                )
            )
    if len(scans) > 1 and not quiet:
        failed = sum(code not in (EXIT_OK, EXIT_SUSPECT) for code in codes)
        typer.echo(f"{len(scans) - failed} of {len(scans)} scans segmented")
    code = worst_exit_code(codes)
    if code != EXIT_OK:
        raise typer.Exit(code)


def _segment_one(
    segmenter: Segmenter,
    scan: Path,
    paths: OutputPaths,
    mask: Path | None,
    probabilities: bool,
    reorient: bool,
    *,
    quiet: bool,
) -> int:
    """Segment and save one scan; an error of this scan is said and does not stop the others."""
    from trtseg.output import save

    try:
        with _progress(quiet=quiet) as progress:
            result = segmenter.segment(
                scan,
                mask=mask,
                probabilities=probabilities,
                reorient=reorient,
                progress=progress,
            )
        started = time.perf_counter()
        save(result, paths)
        elapsed = time.perf_counter() - started
    except TrtsegError as error:
        _say_error(str(error))
        return error.exit_code
    except MemoryError:
        _say_error(f"{scan}: {_OUT_OF_MEMORY}")
        return EXIT_DEVICE
    for warning in result.warnings:
        _say_warning(f"{scan.name}: {warning}")
    if not quiet:
        _say_result(scan, paths, result, {**result.times, "write": elapsed})
    return EXIT_SUSPECT if result.suspect else EXIT_OK


@contextmanager
def _open_segmenter(
    models: str | None,
    engines: Path | None,
    device: str,
    threads: int | None,
    precision: str,
    *,
    quiet: bool,
) -> Iterator[Segmenter]:
    """Load the networks, building them first where that takes seconds and nothing is built yet."""
    from trtseg.pipeline import Segmenter

    load = functools.partial(
        Segmenter, models, engines=engines, device=device, threads=threads, precision=precision
    )
    try:
        segmenter = load()
    except EngineMissingError as missing:
        try:
            _build(models, engines, force=False, quiet=quiet)
        except MissingExtraError as error:
            raise EngineMissingError(
                missing.found,
                expected="a built network, or the build extra to make one here",
                action="pip install 'trtseg[build]', then " + missing.action,
            ) from error
        segmenter = load()
    with segmenter:
        yield segmenter


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
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Freeze the checkpoints of a model set and build its networks."""
    _build(models, out, force=True, quiet=quiet)


def _build(models: str | None, root: Path | None, *, force: bool, quiet: bool) -> None:
    from trtseg.build.builder import build_models
    from trtseg.home import engines_root
    from trtseg.models import find_models

    found = find_models(models)
    folder = engines_root(root)
    started = time.perf_counter()
    with _status(f"Building {found.name}", quiet=quiet) as say:
        engines = build_models(found, folder, force=force, report=say)
    if quiet:
        return
    for engine in engines:
        difference = float(engine.manifest["proof"]["largest_difference"])
        typer.echo(
            f"{engine.net.upper()}: {engine.folder} (differs from its checkpoint by at most "
            f"{difference:.1e} in probability)"
        )
    typer.echo(f"built {found.name} in {time.perf_counter() - started:.1f} s")
    if found.notice:
        typer.echo(f"note: {found.notice}")


@engines_app.command("list")
@_command
def engines_list(engines: EnginesOption = None) -> None:
    """List what is built."""
    from trtseg.engine import built_models
    from trtseg.home import engines_root

    root = engines_root(engines)
    names = built_models(root)
    if not names:
        typer.echo(f"nothing is built in {root}; build with: trtseg engines build --models NAME")
    for name in names:
        typer.echo(f"{name}  {root / name}")


@engines_app.command("verify")
@_command
def engines_verify(models: ModelsOption = None, engines: EnginesOption = None) -> None:
    """Check every byte of what is built, and that it belongs to the checkpoint that is here."""
    from trtseg.home import engines_root
    from trtseg.pipeline import load_engines

    for engine in load_engines(models, engines_root(engines)).values():
        typer.echo(f"{engine.net.upper()}: intact  {engine.folder}")


@models_app.command("list")
@_command
def models_list() -> None:
    """List the model sets on this machine."""
    from trtseg.models import PUBLISHED, list_models

    sets = list_models()
    for models in sets:
        typer.echo("  ".join(filter(None, [models.name, str(models.folder), models.notice])))
    if PUBLISHED not in [models.name for models in sets]:
        typer.echo(f"{PUBLISHED}  not here; fetch with: trtseg models pull")


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
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Download the published weights, verified by size and hash."""
    from trtseg import models as library

    with _download_progress(quiet=quiet) as (progress, say):
        url = library.PUBLISHED_URL if mirror is None else mirror
        found = library.pull(base_url=url, progress=progress, report=say)
    if not quiet:
        typer.echo(f"{found.name}: {found.folder}")
        typer.echo(f"licence: {library.LICENCE}")
        typer.echo(f"please cite: {library.CITATION}")


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
        report=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"{found.name}: {found.folder}")
    typer.echo(f"build it with: trtseg engines build --models {found.name}")


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
            typer.echo(f"{found.name}  {check.path.name}  {check.detail}")
            damaged |= not check.ok
    if damaged:
        raise typer.Exit(EXIT_MODEL)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _say_error(text: str) -> None:
    typer.echo(f"error: {text}", err=True)


def _say_warning(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _say_what_is_used(segmenter: Segmenter) -> None:
    typer.echo(f"device: {segmenter.device}", err=True)
    for engine in segmenter.engines.values():
        typer.echo(f"{engine.net.upper()}: {engine.folder}", err=True)
        for library, version in sorted(engine.manifest["versions"].items()):
            typer.echo(f"  built with {library} {version}", err=True)


def _say_result(
    scan: Path, paths: OutputPaths, result: Segmentation, times: dict[str, float]
) -> None:
    typer.echo(f"{scan.name}" + (f"  ({result.notice})" if result.notice else ""))
    typer.echo(f"  brain  {result.brain_ml:8.1f} mL  {paths.brain}")
    typer.echo(f"  cortex {result.cortex_ml:8.1f} mL  {paths.cortex}")
    for path in paths.all()[2:]:
        typer.echo(f"  probabilities       {path}")
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in times.items())
    typer.echo(f"  {stages}; {sum(times.values()):.2f} s in all on {result.device}")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress | None]:
    """Give a callback that draws one bar of tiles per network, on a terminal."""
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console(), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(network: str, done: int, total: int) -> None:
            if network not in tasks:
                tasks[network] = bars.add_task(network.upper(), total=total)
            bars.update(tasks[network], completed=done)

        yield advance


@contextmanager
def _status(title: str, *, quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """Give a callback that shows what a build is doing, in one line that goes away."""
    if quiet:
        yield None
        return
    with _console().status(title) as status:
        yield lambda line: status.update(f"{title}: {line}")


@contextmanager
def _download_progress(
    *, quiet: bool
) -> Iterator[tuple[Callable[[str, int, int], None] | None, Callable[[str], None] | None]]:
    """Give callbacks for bytes received, per file, and for lines worth saying."""
    if quiet:
        yield None, None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=_console(), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield advance, lambda line: typer.echo(line, err=True)
