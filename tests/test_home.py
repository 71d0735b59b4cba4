from __future__ import annotations

from pathlib import Path

import pytest

from trtseg import home


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A package in a folder of its own: no $TRTSEG_HOME, no clone, user data under tmp_path."""
    package = tmp_path / "place" / "trtseg"
    package.mkdir(parents=True)
    monkeypatch.setattr(home, "_PACKAGE", package)
    monkeypatch.delenv("TRTSEG_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return package


@pytest.fixture
def clone(installed):
    """The same, with the files that make its parent a clone."""
    for name in ("build_engines.py", "pyproject.toml"):
        (installed.parent / name).touch()
    return installed.parent


def test_user_data_without_a_clone(installed, tmp_path):
    assert home.home() == tmp_path / "data" / "trtseg"


def test_clone_before_user_data(clone):
    assert home.home() == clone


@pytest.mark.parametrize("missing", ["build_engines.py", "pyproject.toml"])
def test_half_a_clone_is_none(clone, tmp_path, missing):
    (clone / missing).unlink()
    assert home.home() == tmp_path / "data" / "trtseg"


def test_variable_before_clone(clone, monkeypatch, tmp_path):
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path / "named"))
    assert home.home() == tmp_path / "named"


def test_empty_variable_is_as_unset(clone, monkeypatch):
    monkeypatch.setenv("TRTSEG_HOME", "")
    assert home.home() == clone


def test_relative_variable_is_made_absolute(clone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRTSEG_HOME", "here")
    assert home.home() == tmp_path / "here"


def test_tilde_in_the_variable(clone, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("TRTSEG_HOME", "~/store")
    assert home.home() == tmp_path / "me" / "store"


def test_roots(clone, monkeypatch, tmp_path):
    assert home.engines_root() == clone / "engines"
    assert home.checkpoints_root() == clone / "checkpoints"
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path / "named"))
    assert home.engines_root() == tmp_path / "named" / "engines"
    assert home.checkpoints_root() == tmp_path / "named" / "checkpoints"


def test_chosen_engines_root(clone, monkeypatch, tmp_path):
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path / "named"))
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    assert home.engines_root(tmp_path / "x") == tmp_path / "x"
    assert home.engines_root(Path("x")) == tmp_path / "x"
    assert home.engines_root(Path("~/x")) == tmp_path / "me" / "x"


def test_nothing_is_created(installed, tmp_path):
    home.engines_root()
    home.checkpoints_root()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "place"]


def test_demo_folder_ships_with_the_package():
    assert {path.name for path in home.demo_folder().iterdir()} >= {
        "bdn.model.ckpt.data-00000-of-00001",
        "bdn.model.ckpt.index",
        "cgm.model.ckpt.data-00000-of-00001",
        "cgm.model.ckpt.index",
        "phantom_23w.nii.gz",
    }
