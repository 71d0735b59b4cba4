"""Where trtseg keeps what it builds and what it is given: engines and checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_data_path

from trtseg.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The folder that holds ``engines/`` and ``checkpoints/``.

    ``$TRTSEG_HOME`` where set; else the clone trtseg is imported from; else the user's data folder.
    """
    named = os.environ.get("TRTSEG_HOME")
    if named:
        return _expanded(Path(named))
    clone = _PACKAGE.parent
    if (clone / "build_engines.py").is_file() and (clone / "pyproject.toml").is_file():
        return clone
    return user_data_path("trtseg", appauthor=False)


def engines_root(chosen: Path | None = None) -> Path:
    """Folder of built networks, ``<models>/<net>/`` below it: `chosen`, else ``home()/engines``."""
    return home() / "engines" if chosen is None else _expanded(chosen)


def checkpoints_root() -> Path:
    """Folder of pulled and imported checkpoints, ``<models>/`` below it."""
    return home() / "checkpoints"


def demo_folder() -> Path:
    """Folder of the demo checkpoints and scan that ship inside the package."""
    return _PACKAGE / "demo"


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(
            f"{path}: {error}", expected="a folder", action="write the folder's path out"
        ) from error
