"""``trtseg engines``: build, list and verify networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtseg import screen
from trtseg.errors import (
    EngineMissingError,
    TrtsegError,
    UsageError,
    worst_exit_code,
)
from trtseg.logs import log_to
from trtseg.options import (
    ENGINES_DEFAULT,
    AllModelsOption,
    EnginesOption,
    LogFileOption,
    ModelsOption,
    optional,
)
from trtseg.steps import Group, build, compile_for_gpus, log_start

app = typer.Typer(cls=Group, help="Build and inspect networks.", no_args_is_help=True)


@app.command("build")
def engines_build(
    models: ModelsOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, or cuda: compile for NVIDIA GPUs as well.",
        ),
    ] = "cpu",
    library: Annotated[
        str | None,
        optional(
            "--library",
            metavar="NAME",
            help="tensorrt_rtx or tensorrt; default: the one that is installed.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        optional(
            "--form",
            metavar="NAME",
            help="Graph form: plain, transposed, or with channels padded plain8, transposed8; "
            "default: the one estimated to be fastest.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        optional(
            "--batch",
            metavar="TILES",
            help="Tiles per run; may be repeated; default: 1, 4 and 16.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        optional(
            "--compute-capability",
            metavar="X.Y",
            help="GPUs to compile for with tensorrt_rtx, such as 7.5; may be repeated; "
            "default: 8.6, 8.9, 12.0 and later.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compile for GPUs even what is compiled already.")
    ] = False,
    out: Annotated[
        Path | None,
        optional(
            "--out",
            "--engines",
            metavar="DIR",
            help=f"Folder to build into; {ENGINES_DEFAULT}.",
        ),
    ] = None,
    log_file: LogFileOption = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Freeze the checkpoints of a model set, build its networks, and compile them for GPUs."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}", expected="cpu or cuda")
    compiled = {
        "library": library,
        "form": form,
        "batches": tuple(batch or ()) or None,
        "compute_capabilities": tuple(compute_capability or ()) or None,
    }
    chosen = {name: value for name, value in compiled.items() if value is not None}
    if device == "cpu":
        _refuse_gpu_options(
            {
                "--library": library,
                "--form": form,
                "--batch": batch,
                "--compute-capability": compute_capability,
                "--force": force,
            }
        )
    with log_to(log_file):
        log_start("engines build")
        # Compiling starts from what is built; that is made again only where it must be.
        build(models, out, force=device == "cpu", quiet=quiet or device == "cuda")
        if device == "cuda":
            compile_for_gpus(models, out, chosen, force=force, quiet=quiet)


def _refuse_gpu_options(options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(
            f"{', '.join(given)} without --device cuda",
            expected="--device cuda with what is for GPUs",
        )


@app.command("list")
def engines_list(engines: EnginesOption = None) -> None:
    """List what is built, and what is compiled for GPUs."""
    from trtseg.engine import built_models
    from trtseg.home import engines_root
    from trtseg.info import intact

    root = engines_root(engines)
    names = built_models(root)
    if not names:
        screen.say(f"nothing is built in {root}; build with: trtseg engines build --models NAME")
    for name in names:
        try:
            _, compiled = intact(root, name)
        except TrtsegError as error:
            screen.say(f"{name}  {error}")
            continue
        screen.say(f"{name}  {root / name}")
        for net, state in compiled.items():
            screen.say(f"  {net.upper()} for GPUs: {state}")


@app.command("verify")
def engines_verify(
    models: AllModelsOption = None,
    engines: EnginesOption = None,
    device: Annotated[
        str | None,
        optional(
            "--device",
            metavar="DEVICE",
            help="Load them there as well: cpu, cuda or cuda:N; on a GPU with its self-test.",
        ),
    ] = None,
) -> None:
    """Check every byte of what is built, and that it belongs to the checkpoint that is here."""
    from trtseg.engine import built_models
    from trtseg.home import engines_root

    root = engines_root(engines)
    names = built_models(root) if models is None else [models]
    if not names:
        raise EngineMissingError(
            f"nothing is built in {root}",
            expected="built networks",
            action="build with: trtseg engines build --models NAME",
        )
    codes = []
    for name in names:
        try:
            _verify(name, root, device)
        except TrtsegError as error:  # it must not hide what there is to say of the others
            screen.say_error(str(error))
            codes.append(error.exit_code)
    if codes:
        raise typer.Exit(worst_exit_code(codes))


def _verify(models: str, root: Path, device: str | None) -> None:
    from trtseg.chains import load_engines, load_gpu_engines, open_chain
    from trtseg.gpu_engine import gpu_built

    built = load_engines(models, root)
    for engine in built.values():
        screen.say(f"{engine.net.upper()}: intact  {engine.folder}")
    if gpu_built(root, models):
        for one in load_gpu_engines(built, root).values():
            screen.say(f"{one.net.upper()}: intact  {one.folder} ({one.summary})")
    if device is not None:
        chain, note = open_chain(models, root, device=device)
        screen.say(f"loaded: {chain.description}" + (f"; {note}" if note else ""))
        chain.close()
