"""What a person sees: results, warnings, progress, and the table at the end of a batch.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

from trtseg.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from trtseg.backends.base import ChainProgress
    from trtseg.batch import Outcome
    from trtseg.pipeline import Segmenter

#: Names of passed-over files that are printed.
_NAMED = 3
_COLUMNS = ("scan", "id", "result", "brain mL", "cortex mL", "seconds")
_NUMBERS = 3  # of the columns, counted from the right


def say(text: str, *, err: bool = False) -> None:
    """Print one line; what a terminal would obey or cannot show is shown as an escape."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    plain = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    say_as_is(plain.encode(encoding, "backslashreplace").decode(encoding), err=err)


def say_as_is(text: str, *, err: bool = False) -> None:
    """Print text and the end of a line; what cannot go to stderr is lost.

    Raises
    ------
    OutputError
        Stdout cannot be written.
    """
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:
        raise  # who reads has had enough: Typer ends the program without a word
    except OSError as error:
        _let_go(sys.stderr if err else sys.stdout)
        if not err:
            raise OutputError(
                f"stdout: {error.strerror or error}",
                expected="room for what is printed",
                action="send it elsewhere, or make room",
            ) from error


def _let_go(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python writes it again at its end, and fails."""
    with contextlib.suppress(OSError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say_error(text: str) -> None:
    """Print why something ended."""
    say(f"error: {text}", err=True)


def say_warning(text: str) -> None:
    """Print what a person should know."""
    say(f"warning: {text}", err=True)


def say_passed_over(paths: Sequence[Path]) -> None:
    """Print which files were taken for results and are not segmented."""
    names = ", ".join(path.name for path in paths[:_NAMED])
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    say(f"note: passed over as results of trtseg: {names}{more}", err=True)


def say_what_is_used(segmenter: Segmenter) -> None:
    """Print the device, and the networks with what they were built with."""
    say(f"device: {segmenter.device}", err=True)
    for engine in segmenter.engines.values():
        say(f"{engine.net.upper()}: {engine.folder}", err=True)
        for library, version in sorted(engine.manifest["versions"].items()):
            say(f"  built with {library} {version}", err=True)


def say_outcome(outcome: Outcome, *, quiet: bool) -> None:
    """Print what came of one scan: its errors, warnings and suspect checks, then the result."""
    if outcome.error:
        say_error(outcome.error)
        return
    from trtseg.pipeline import EMPTY_BRAIN

    name = outcome.scan.name
    for warning in outcome.description["warnings"]:
        if warning != EMPTY_BRAIN:  # a suspect check says the same
            say_warning(f"{name}: {warning}")
    for reason in outcome.reasons:
        say(f"suspect: {name}: {reason}", err=True)
    if not quiet:
        _say_result(outcome)


def _say_result(outcome: Outcome) -> None:
    found, paths = outcome.description, outcome.paths
    notice = f"  ({found['notice']})" if found["notice"] else ""
    say(f"{outcome.scan.name}{notice}")
    if outcome.resumed:
        say("  complete and intact: not run again")
        return
    for role in ("brain", "cortex"):
        say(f"  {role:<6} {found['volumes_ml'][role]:8.1f} mL  {paths.maps()[role]}")
    for role, path in (*paths.results().items(), ("sidecar", paths.sidecar)):
        if role not in ("brain", "cortex", "picture"):
            say(f"  {role.replace('_', ' '):<19}  {path}")
    times = found["times_s"]
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in times.items())
    say(f"  {stages}; {sum(times.values()):.2f} s in all on {found['device']}")


def say_summary(outcomes: Sequence[Outcome]) -> None:
    """Print a table of a batch: drawn on a terminal, in plain columns anywhere else."""
    rows = [_row(outcome) for outcome in outcomes]
    if sys.stdout.isatty():
        _draw_table(rows)
    else:
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        for row in (_COLUMNS, *rows):
            say("  ".join(_aligned(row, widths)).rstrip())
    done = sum(outcome.status != "failed" for outcome in outcomes)
    say(f"{done} of {len(outcomes)} scans segmented")


def _row(outcome: Outcome) -> tuple[str, ...]:
    found = outcome.description
    if not found:
        said = f"failed, exit code {outcome.exit_code}"
        return (outcome.scan.name, outcome.id, said, "", "", "")
    return (
        outcome.scan.name,
        outcome.id,
        outcome.status + (", done before" if outcome.resumed else ""),
        f"{found['volumes_ml']['brain']:.1f}",
        f"{found['volumes_ml']['cortex']:.1f}",
        "" if outcome.resumed else f"{sum(found['times_s'].values()):.1f}",
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
        number = index >= len(_COLUMNS) - _NUMBERS
        yield cell.rjust(width) if number else cell.ljust(width)


def _draw_table(rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(_COLUMNS):
        number = index >= len(_COLUMNS) - _NUMBERS
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        style = {"ok": "", "suspect": "yellow"}.get(row[2].partition(",")[0], "red")
        # Text, for a file name may look like rich's markup.
        table.add_row(*(Text(cell, style) for cell in row))
    Console(highlight=False).print(table)


# What goes away by itself


@contextmanager
def tile_progress(*, quiet: bool) -> Iterator[ChainProgress | None]:
    """Give a callback that draws one bar of tiles per network, on a terminal."""
    console = _console()
    if quiet or not console.is_terminal:
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
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(network: str, done: int, total: int) -> None:
            if network not in tasks:
                tasks[network] = bars.add_task(network.upper(), total=total)
            bars.update(tasks[network], completed=done)

        yield advance


@contextmanager
def status(title: str, *, quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """Give a callback that shows what a build is doing, on a terminal, in a line that goes away."""
    console = _console()
    if quiet or not console.is_terminal:
        yield None
        return
    with console.status(title) as shown:
        yield lambda line: shown.update(f"{title}: {line}")


@contextmanager
def download_progress(
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
    console = _console()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield advance, lambda line: say(line, err=True)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
