"""``trtseg models``: fetch, import, list and verify model weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtseg import screen
from trtseg.errors import EXIT_MODEL
from trtseg.logs import LOG, log_to
from trtseg.options import AllModelsOption, LogFileOption
from trtseg.steps import Group, log_start

app = typer.Typer(cls=Group, help="Fetch, import and check model weights.", no_args_is_help=True)


@app.command("list")
def models_list() -> None:
    """List the model sets on this machine."""
    from trtseg.models import PUBLISHED, list_models

    sets = list_models()
    for models in sets:
        screen.say("  ".join(filter(None, [models.name, str(models.folder), models.notice])))
    if PUBLISHED not in [models.name for models in sets]:
        screen.say(f"{PUBLISHED}  not here; fetch with: trtseg models pull")


@app.command("pull")
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
    from trtseg.architecture import NETWORKS
    from trtseg.modelinstall import PUBLISHED_URL, pull
    from trtseg.models import CITATION, LICENCE

    with log_to(log_file), screen.download_progress(quiet=quiet) as (progress, told):
        log_start("models pull")
        url = PUBLISHED_URL if mirror is None else mirror
        found = pull(base_url=url, progress=progress, report=told)
        for net in NETWORKS:
            for name, digest in found.digests(net).items():
                LOG.info("%s: SHA-256 %s", name, digest)
    if not quiet:
        screen.say(f"{found.name}: {found.folder}")
        screen.say(f"licence: {LICENCE}")
        screen.say(f"please cite: {CITATION}")


@app.command("import")
def models_import(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR", readable=False, help="Folder the files were copied to."),
    ],
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
            readable=False,
            help="DeepMedic model config of both networks; default: the ones found in DIR, "
            "else the published architecture.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Take weights that were copied to this machine."""
    from trtseg.modelinstall import import_folder

    found = import_folder(
        source,
        unpublished=unpublished,
        name=name,
        config=config,
        report=lambda line: screen.say(line, err=True),
    )
    screen.say(f"{found.name}: {found.folder}")
    screen.say(f"build it with: trtseg engines build --models {found.name}")


@app.command("verify")
def models_verify(models: AllModelsOption = None) -> None:
    """Check the files of model sets against their hashes."""
    from trtseg.models import find_models, list_models, verify

    sets = list_models() if models is None else [find_models(models)]
    damaged = False
    for found in sets:
        for check in verify(found):
            verdict = "intact" if check.ok else "DAMAGED"
            screen.say(f"{verdict}  {found.name}  {check.path.name}  {check.detail}")
            damaged |= not check.ok
    if damaged:
        raise typer.Exit(EXIT_MODEL)
