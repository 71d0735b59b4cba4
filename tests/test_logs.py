from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from trtseg.errors import ModelError, OutputError, UsageError
from trtseg.logs import LOG, log_to

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR|DEBUG) (.*)")


def messages(path: Path) -> list[str]:
    found = [LINE.fullmatch(line) for line in path.read_text("utf-8").splitlines()]
    assert all(found)
    return [f"{one[1]} {one[2]}" for one in found if one]


def test_a_log(tmp_path):
    path = tmp_path / "new" / "trtseg.log"
    with log_to(path):
        LOG.info("read: %.2f s", 0.5)
        LOG.warning("scan %s: dark", "abc")
        LOG.debug("scan abc: file name 'doe.nii'")
    assert messages(path) == ["INFO read: 0.50 s", "WARNING scan abc: dark"]


def test_names_where_they_are_asked_for(tmp_path):
    with log_to(tmp_path / "a.log", names=True):
        LOG.debug("scan abc: file name %r", "doe\udcff\n.nii")
    assert messages(tmp_path / "a.log") == [r"DEBUG scan abc: file name 'doe\udcff\n.nii'"]


def test_text_that_no_encoding_holds(tmp_path):
    with log_to(tmp_path / "a.log"):
        LOG.info("doe\udcff")
    assert messages(tmp_path / "a.log") == [r"INFO doe\udcff"]


def test_a_log_goes_on_at_its_end(tmp_path):
    path = tmp_path / "a.log"
    for word in ("one", "two"):
        with log_to(path):
            LOG.info(word)
    assert messages(path) == ["INFO one", "INFO two"]


def test_without_a_file_nothing_is_kept_or_printed(tmp_path, capfd):
    with log_to(None):
        LOG.error("not printed")
    LOG.error("not printed either")
    assert capfd.readouterr() == ("", "")


def test_everything_is_as_before_afterwards(tmp_path):
    before = (LOG.level, LOG.propagate, list(LOG.handlers))
    with log_to(tmp_path / "a.log"):
        assert LOG.level == logging.INFO
        assert not LOG.propagate
    assert (LOG.level, LOG.propagate, list(LOG.handlers)) == before
    LOG.error("after the end")
    assert messages(tmp_path / "a.log") == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("/secret/place is bad"), "ERROR ended: ModelError, exit code 3"),
        (KeyboardInterrupt(), "ERROR interrupted"),
    ],
)
def test_what_ended_the_run(tmp_path, error, said):
    with pytest.raises(type(error)), log_to(tmp_path / "a.log"):
        raise error
    assert messages(tmp_path / "a.log") == [said]


@pytest.mark.parametrize("name", ["scan.nii", "SCAN.NII.GZ", "scan.hdr", "scan.img"])
def test_a_scan_is_no_log(tmp_path, name):
    (tmp_path / name).write_bytes(b"a scan")
    with pytest.raises(UsageError, match="text file"), log_to(tmp_path / name):
        pass
    assert (tmp_path / name).read_bytes() == b"a scan"


def test_a_log_that_cannot_be_opened(tmp_path):
    with pytest.raises(OutputError, match="Is a directory"), log_to(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_once_and_stops_nothing(capfd):
    done = []

    def work() -> None:
        with log_to(Path("/dev/full")):
            for word in ("one", "two"):
                LOG.info(word)
                done.append(word)

    with pytest.raises(OutputError, match="No space left on device"):
        work()
    assert done == ["one", "two"]
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_the_first_error_of_a_run_is_not_hidden_by_its_log():
    with pytest.raises(ModelError), log_to(Path("/dev/full")):
        raise ModelError("damaged")
