"""What many tests need: the demo and random networks, built once per session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.golden import DATA

BUILT = os.environ.get("TRTSEG_BUILT")


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own models and engines."""
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def engines_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engines folder with the sets ``demo`` and ``random11``, built as a user builds them.

    On a machine without TensorFlow, ``$TRTSEG_BUILT`` names such a folder, built elsewhere.
    """
    from trtseg.build.builder import build_models
    from trtseg.modelinstall import import_folder
    from trtseg.models import find_models

    home = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTSEG_HOME", str(home))
        import_folder(DATA / "checkpoints" / "random11", unpublished=True, name="random11")
        if BUILT is not None:
            shutil.copytree(BUILT, home / "engines")
        for name in ("demo", "random11"):
            build_models(find_models(name), home / "engines", force=BUILT is None)
    return home / "engines"
