"""Model sets: which are here, are they intact."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_files import (
    BAD_NAMES,
    CONTENTS,
    DATA,
    FILES,
    NAMES,
    config_of,
    flip,
    import_own,
    put,
)
from trtseg import models
from trtseg.errors import ModelError
from trtseg.files import git_blob_sha1
from trtseg.modelinstall import import_folder
from trtseg.models import DEMO, PUBLISHED, PUBLISHED_FILES


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of checkpoints, not made yet."""
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "checkpoints"


# What is pinned


@pytest.mark.parametrize("net", ["bdn", "cgm"])
def test_published_indexes_are_the_pinned_ones(net: str) -> None:
    name = f"{net}.model.ckpt.index"
    pinned = next(file for file in PUBLISHED_FILES if file.name == name)
    stored = DATA / "published" / name
    assert git_blob_sha1(stored) == pinned.blob_sha1
    assert stored.stat().st_size == pinned.size


# Find and list


@pytest.mark.parametrize("name", BAD_NAMES)
def test_find_refuses_a_name(tmp_path: Path, root: Path, name: str) -> None:
    import_own(put(tmp_path / "in", flat=True))
    put(root.parent / "own", flat=True)
    assert not models.is_present(name)
    with pytest.raises(ModelError, match="no model set is called"):
        models.find_models(name)


def test_find_without_any_weights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)  # a download would be an ImportError
    for name in (None, PUBLISHED):
        with pytest.raises(ModelError) as caught:
            models.find_models(name)
        message = str(caught.value)
        for words in (
            "published weights are not here",
            NAMES[0],
            str(root / PUBLISHED),
            "trtseg models pull",
            "trtseg models import DIR",
            "--models demo",
        ):
            assert words in message
    assert not root.exists()


def test_find_says_what_an_incomplete_set_lacks(tmp_path: Path, root: Path) -> None:
    (put(root / PUBLISHED, flat=True) / NAMES[1]).unlink()
    with pytest.raises(ModelError, match=f"incomplete, without {NAMES[1]};"):
        models.find_models()
    got = import_own(put(tmp_path / "in", flat=True))
    (got.folder / NAMES[1]).unlink()
    with pytest.raises(ModelError, match=f"incomplete, without {NAMES[1]};.*delete {got.folder}"):
        models.find_models("own")
    assert [one.name for one in models.list_models()] == [DEMO]


def test_find_names_the_known_sets(tmp_path: Path) -> None:
    import_own(put(tmp_path / "in", flat=True))
    with pytest.raises(ModelError, match="one of: demo, own;"):
        models.find_models("other")


def test_list(tmp_path: Path, root: Path) -> None:
    assert [one.name for one in models.list_models()] == [DEMO]
    source = put(tmp_path / "in", flat=True)
    import_own(source, "zeta")
    import_own(source, "alpha")
    put(root / DEMO, flat=True)
    put(root / ".hidden", flat=True)
    put(root / "by hand", flat=True)
    put(root / "norecord", flat=True)
    assert [one.name for one in models.list_models()] == [DEMO, "alpha", "zeta"]
    import_folder(source, files=FILES)
    assert [one.name for one in models.list_models()] == [PUBLISHED, DEMO, "alpha", "zeta"]


# Verify


def test_the_demo_is_intact() -> None:
    got = models.find_models(DEMO)
    assert got.kind == "demo"
    assert got.notice == models.DEMO_NOTICE
    checks = models.verify(got)
    assert [check.path for check in checks] == list(got.files())
    assert all(check.ok for check in checks)


def test_verify_finds_a_change_of_the_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    for path in models.find_models(DEMO).files():
        shutil.copy(path, folder)
    flip(folder / NAMES[0])
    (folder / NAMES[3]).unlink()
    checks = models.verify(models.ModelSet(DEMO, folder, "demo", ""))
    assert {check.path.name: check.ok for check in checks} == {
        NAMES[0]: False,
        NAMES[1]: True,
        NAMES[2]: True,
        NAMES[3]: False,
    }
    assert checks[3].detail == "missing"


def test_a_damaged_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "demo_folder", lambda: tmp_path)
    with pytest.raises(ModelError, match="install trtseg again"):
        models.find_models(DEMO)


@settings(max_examples=30, deadline=None)
@given(
    published=st.booleans(),
    name=st.sampled_from(NAMES),
    position=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_verify_finds_any_changed_byte(
    published: bool, name: str, position: float, mask: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTSEG_HOME", scratch)
        source = put(Path(scratch) / "in", flat=True)
        own = {} if published else {"unpublished": True, "name": "own"}
        got = import_folder(source, files=FILES, **own)  # type: ignore[arg-type]
        path = got.folder / name
        flip(path, int(position * path.stat().st_size), mask)
        wrong = [check for check in models.verify(got, FILES) if not check.ok]
        assert [check.path for check in wrong] == [path]
        assert "expected" in wrong[0].detail


def test_verify_published_says_what_is_wrong(root: Path) -> None:
    folder = put(root / PUBLISHED, flat=True)
    got = models.find_models()
    (folder / NAMES[0]).unlink()
    (folder / NAMES[1]).write_bytes(b"short")
    (folder / NAMES[2]).unlink()
    (folder / NAMES[2]).mkdir()
    checks = models.verify(got, FILES)
    assert [check.ok for check in checks] == [False, False, False, True]
    assert checks[0].detail.startswith("missing; expected 300 bytes")
    assert checks[1].detail.startswith(f"5 bytes; expected {FILES[1].size} bytes")
    assert checks[3].detail == f"git blob SHA-1 {FILES[3].blob_sha1}"


def test_verify_imported_against_its_record(tmp_path: Path) -> None:
    got = import_own(put(tmp_path / "in", flat=True, configs=("bdn",)))
    (got.folder / "bdn_model_config.cfg").unlink()
    (got.folder / "cgm_model_config.cfg").write_text("added later")
    wrong = {check.path.name: check.detail for check in models.verify(got) if not check.ok}
    assert set(wrong) == {"bdn_model_config.cfg", "cgm_model_config.cfg"}
    assert wrong["bdn_model_config.cfg"] == "missing"
    assert "not recorded" in wrong["cgm_model_config.cfg"]


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"a": 1}}',
    ],
)
def test_verify_without_a_usable_record(tmp_path: Path, record: str) -> None:
    got = import_own(put(tmp_path / "in", flat=True))
    (got.folder / "record.json").write_text(record)
    checks = models.verify(got)
    assert checks[0].path == got.folder / "record.json"
    assert len(checks) == 1 + len(NAMES)
    assert not any(check.ok for check in checks)


# Digests


def test_digests_cover_what_a_build_depends_on(tmp_path: Path) -> None:
    got = import_own(put(tmp_path / "in", flat=True, configs=("cgm",)))
    assert got.digests("bdn") == {
        Path(path).name: hashlib.sha256(content).hexdigest()
        for path, content in CONTENTS.items()
        if path.startswith("bdn/")
    }
    assert (
        got.digests("cgm")["cgm_model_config.cfg"] == hashlib.sha256(config_of("cgm")).hexdigest()
    )
    (got.folder / NAMES[0]).unlink()
    with pytest.raises(ModelError, match=f"{NAMES[0]}: No such file"):
        got.digests("bdn")
