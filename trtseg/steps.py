"""Steps that several commands share: exit codes, the log's first lines, opening, building.

Heavy modules are imported inside the functions, so that ``trtseg --help`` answers at once.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from trtseg import screen
from trtseg.errors import (
    EXIT_DEVICE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EngineMissingError,
    MissingExtraError,
    NotCompiledError,
    TrtsegError,
    UsageError,
    worst_exit_code,
)
from trtseg.logs import LOG

if TYPE_CHECKING:
    from trtseg.batch import Options, Outcome
    from trtseg.engine import Engine
    from trtseg.gpu_engine import GpuEngine
    from trtseg.output import OutputPaths
    from trtseg.pipeline import Segmenter


class Group(TyperGroup):
    """Commands whose errors, and an interrupt, end in one line and the exit code."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Read the arguments; none may be empty, as one of an unset variable of the shell is."""
        with _exit_on_error():
            _refuse_empty([info_name or "", *args])
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with _exit_on_error():
            return super().invoke(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _hide_types_of_flags(command.get_params(ctx))
        return command

    def get_params(self, ctx: Any) -> list[Any]:
        """Options of the group itself."""
        params = super().get_params(ctx)
        _hide_types_of_flags(params)
        return params


def _refuse_empty(args: Sequence[str]) -> None:
    """Refuse an empty name, which would be taken for the current folder."""
    for before, arg in itertools.pairwise(args):
        option = re.fullmatch("(--[a-z][a-z_-]*)=", arg)
        if option or not arg:
            raise UsageError(
                f"an empty name after {option[1] if option else before}",
                expected="a name",
                action="see whether every variable in the command is set",
            )


def _hide_types_of_flags(params: Sequence[Any]) -> None:
    """Show no type after a flag in the help: Typer 0.29 has ``<bool>``, as if it took a value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""


@contextmanager
def _exit_on_error() -> Iterator[None]:
    try:
        with _error_of_stdout():
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


@contextmanager
def _error_of_stdout() -> Iterator[None]:
    """Tell of a stdout that cannot be written where rich writes to it, as it does the help."""
    try:
        yield
    except OSError:
        screen.say_as_is("")  # raises OutputError, if it was stdout
        raise


def log_start(command: str) -> None:
    """Log which command runs, and the versions of what a result depends on."""
    from trtseg.sidecar import versions

    LOG.info("%s: %s", command, ", ".join(f"{name} {one}" for name, one in versions().items()))


@contextmanager
def open_segmenter(
    options: Options, engines: Path | None, *, scans: int, quiet: bool
) -> Iterator[Segmenter]:
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
    except NotCompiledError:
        raise  # it takes minutes with some libraries, and options: not done unasked
    except EngineMissingError as missing:
        try:
            build(options.models, engines, force=False, quiet=quiet)
        except MissingExtraError as error:
            raise EngineMissingError(
                missing.found,
                expected="a built network, or the build extra to make one here",
                action="pip install 'trtseg[build]', then " + missing.action,
            ) from error
        segmenter = load()
    with segmenter:
        LOG.info(
            "models %s, device %s, precision %s, scans: %d",
            segmenter.models,
            segmenter.device,
            segmenter.precision,
            scans,
        )
        if segmenter.note and not quiet:
            screen.say(f"note: {segmenter.note}", err=True)
        yield segmenter


def segment_each(
    segmenter: Segmenter,
    plans: Sequence[tuple[Path, OutputPaths]],
    options: Options,
    *,
    quiet: bool,
) -> Iterator[Outcome]:
    """Segment and save scan by scan, with bars on a terminal; give what came of each."""
    from trtseg.batch import process, read_ahead

    for reading in read_ahead(segmenter, plans, options):
        with screen.tile_progress(quiet=quiet) as progress:
            outcome = process(segmenter, reading, options, progress=progress)
        yield outcome


def end(outcomes: Sequence[Outcome], *, quiet: bool) -> None:
    """Print the table of a batch, and exit with the code of its worst scan."""
    if len(outcomes) > 1 and not quiet:
        screen.say_summary(outcomes)
    code = worst_exit_code([outcome.exit_code for outcome in outcomes])
    if code != EXIT_OK:
        raise typer.Exit(code)


def build(models: str | None, root: Path | None, *, force: bool, quiet: bool) -> None:
    """Build the networks of a model set, and say what was built."""
    from trtseg.build.builder import build_models
    from trtseg.home import engines_root
    from trtseg.models import find_models

    found = find_models(models)
    folder = engines_root(root)
    with _building(f"Building {found.name}", quiet=quiet) as told:
        engines = build_models(found, folder, force=force, report=told)
    _log_files(engines)
    if quiet:
        return
    for engine in engines:
        difference = float(engine.manifest["proof"]["largest_difference"])
        screen.say(
            f"{engine.net.upper()}: {engine.folder} (differs from its checkpoint by at most "
            f"{difference:.1e} in probability)"
        )
    if found.notice:
        screen.say(f"note: {found.notice}")


def compile_for_gpus(
    models: str | None, root: Path | None, chosen: dict[str, Any], *, force: bool, quiet: bool
) -> None:
    """Compile built networks for GPUs, `chosen` being options of it, and say what was compiled."""
    from trtseg.build.tensorrt import build_gpu_models
    from trtseg.home import engines_root
    from trtseg.models import find_models

    found = find_models(models)
    with _building(f"Compiling {found.name}", quiet=quiet) as told:
        engines = build_gpu_models(found, engines_root(root), force=force, report=told, **chosen)
    _log_files(engines)
    if quiet:
        return
    for engine in engines:
        rounding = engine.manifest["float16_on_cpu"]["labels_equal"]
        screen.say(f"{engine.net.upper()}: {engine.folder}")
        screen.say(f"  {engine.summary}; float16 rounding keeps {rounding:.3%} of a tile's labels")
    if found.notice:
        screen.say(f"note: {found.notice}")


@contextmanager
def _building(title: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Give a callback for what is being done, and say at the end how long it took."""
    started = time.perf_counter()
    with screen.status(title, quiet=quiet) as show:

        def told(line: str) -> None:
            LOG.info("%s", line)
            if show is not None:
                show(line)

        yield told
    seconds = time.perf_counter() - started
    LOG.info("%s: %.2f s", title, seconds)
    if not quiet:
        screen.say(f"{title}: {seconds:.1f} s")


def _log_files(engines: Sequence[Engine | GpuEngine]) -> None:
    for engine in engines:
        for name, digest in engine.manifest["files"].items():
            LOG.info("%s: %s, SHA-256 %s", engine.net.upper(), name, digest)
