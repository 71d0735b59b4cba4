"""Options that several commands have, each declared once; its default stands with each command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from trtseg.errors import UsageError

#: Where networks are built.
ENGINES_DEFAULT = (
    "default: engines/ in $TRTSEG_HOME, else in the clone, else in the user's data folder"
)


def optional(*names: str, metavar: str, help: str, **more: Any) -> Any:
    """Option with a value that may be left out; what it is then, `help` says.

    Of a path, Typer is not to ask whether it can be read: the error would be its own, and of all.
    """
    return typer.Option(
        *names, metavar=metavar, help=help, show_default=False, readable=False, **more
    )


def weeks(text: str) -> float:
    """Gestational age in weeks: of decimal weeks, ``27.4``, or of weeks and days, ``27+3``.

    Raises
    ------
    UsageError
        The text is neither.
    """
    found = re.fullmatch(r"([0-9]{1,3})(?:\+([0-6])|\.[0-9]+)?", text)
    if found is None:
        raise UsageError(
            f"--ga {text}",
            expected="18 to 45 weeks, as 27.4 (decimal) or 27+3 (weeks+days, 0 to 6 of these)",
        )
    return float(text) if found[2] is None else int(found[1]) + int(found[2]) / 7


ModelsOption = Annotated[
    str | None,
    optional("--models", metavar="NAME", help="Model set; default: the published one."),
]
AllModelsOption = Annotated[
    str | None, optional("--models", metavar="NAME", help="Model set; default: all of them.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
]
GaOption = Annotated[
    float | None,
    optional(
        "--ga",
        metavar="WEEKS",
        parser=weeks,
        help="Gestational age, as 27.4 (decimal weeks) or 27+3 (weeks+days); the checks then go "
        "by that week.",
    ),
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Write a page with pictures and all checks.")
]
ReorientOption = Annotated[
    bool,
    typer.Option(
        "--reorient",
        help="Run in RAS+ orientation, so that how a scan is stored does not matter; "
        "default: as stored, as the published system does.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Leave out scans whose results are complete and intact.")
]
EnginesOption = Annotated[
    Path | None,
    optional("--engines", metavar="DIR", help=f"Folder of built networks; {ENGINES_DEFAULT}."),
]
ThreadsOption = Annotated[
    int | None,
    optional(
        "--threads",
        min=1,
        metavar="N",
        help="CPU threads; default: the cores this process may run on.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    optional(
        "--precision",
        metavar="PRECISION",
        help="On the CPU f32, which gives DeepMedic's labels, or bf16, faster, with a few "
        "labels changed; on a GPU f16; default: f32 and f16.",
    ),
]
LogFileOption = Annotated[
    Path | None,
    optional(
        "--log-file",
        metavar="FILE",
        help="Add a log to the end of this file: times, stages, versions; no names.",
    ),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print warnings and errors only.")]
