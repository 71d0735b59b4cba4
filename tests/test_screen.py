from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtseg import screen
from trtseg.batch import Outcome
from trtseg.errors import OutputError
from trtseg.output import plan_outputs
from trtseg.pipeline import EMPTY_BRAIN


def outcome(name: str, status: Any = "ok", **changes: Any) -> Outcome:
    [paths] = plan_outputs([Path("/in") / name], Path("/out"), report=True, dseg=True)
    description = {
        "volumes_ml": {"brain": 104.04, "cortex": 9.96},
        "times_s": {"read": 0.25, "brain": 2.0},
        "device": "cpu",
        "notice": "",
        "warnings": [],
        "qc": {"checks": []},
    }
    arguments = {"description": {**description, **changes.pop("description", {})}, **changes}
    code = {"ok": 0, "suspect": 6, "failed": 2}[status]
    return Outcome(Path("/in") / name, "ba7816bf8f01", paths, status, code, **arguments)


def failed(name: str) -> Outcome:
    one = outcome(name, "failed")
    return Outcome(one.scan, one.id, one.paths, "failed", 2, error=f"{name}: too dark")


def test_a_result(capsys):
    screen.say_outcome(outcome("a.nii"), quiet=False)
    assert capsys.readouterr().out.splitlines() == [
        "a.nii",
        "  brain     104.0 mL  /out/a_brain.nii.gz",
        "  cortex     10.0 mL  /out/a_cgm.nii.gz",
        "  dseg                 /out/a_dseg.nii.gz",
        "  lookup               /out/a_dseg.tsv",
        "  report               /out/a_report.html",
        "  sidecar              /out/a_trtseg.json",
        "  read 0.25 s, brain 2.00 s; 2.25 s in all on cpu",
    ]


def test_a_result_that_was_there(capsys):
    screen.say_outcome(outcome("a.nii", resumed=True), quiet=False)
    assert capsys.readouterr().out.splitlines() == [
        "a.nii",
        "  complete and intact: not run again",
    ]


def test_what_is_said_even_when_quiet(capsys):
    check = {"verdict": "suspect", "line": "The brain is small."}
    fine = {"verdict": "ok", "line": "All is well."}
    found = {"warnings": ["dark", EMPTY_BRAIN], "qc": {"checks": [check, fine]}}
    screen.say_outcome(outcome("a.nii", "suspect", description=found), quiet=True)
    screen.say_outcome(failed("bad.nii"), quiet=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "warning: a.nii: dark",
        "suspect: a.nii: The brain is small.",
        "error: bad.nii: too dark",
    ]


ROWS = [
    ("scan", "id", "result", "brain mL", "cortex mL", "seconds"),
    ("a[red].nii", "ba7816bf8f01", "ok", "104.0", "10.0", "2.2"),
    ("b.nii", "ba7816bf8f01", "suspect, done before", "104.0", "10.0"),
    ("bad.nii", "ba7816bf8f01", "failed, exit code 2"),
]


def batch() -> list[Outcome]:
    return [
        outcome("a[red].nii"),
        outcome("b.nii", "suspect", resumed=True),
        failed("bad.nii"),
    ]


def test_a_summary_in_plain_columns(capsys):
    screen.say_summary(batch())
    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, ROWS, strict=False):
        assert [cell.strip() for cell in line.split("  ") if cell.strip()] == list(row)
    ends = [lines[0].index(" mL") + 3, *(line.index("104.0") + 5 for line in lines[1:3])]
    assert len(set(ends)) == 1  # numbers end where their title does
    assert lines[-1] == "2 of 3 scans segmented"


def test_a_summary_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    screen.say_summary(batch())
    out = capsys.readouterr().out
    for row in ROWS:
        for cell in row:
            assert cell in out
    assert "┃" in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Größe", "plain, Größe"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("two\nlines", r"two\nlines"),
        ("doe\udcff", r"doe\udcff"),
    ],
)
def test_text_that_a_terminal_would_obey(capsys, text, shown):
    screen.say(text)
    screen.say(text, err=True)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")


def test_a_terminal_of_few_letters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    screen.say("Größe")
    assert stream.buffer.getvalue() == b"Gr\\xf6\\xdfe\n"  # type: ignore[attr-defined]


class Broken(io.StringIO):
    """A stream that fails as one does whose disk is full, or whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_stdout_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="stdout: No space left on device; expected room"):
        screen.say("a")


def test_a_stderr_that_cannot_be_written_ends_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Broken(OSError(28, "No space left on device")))
    screen.say_error("a")
    screen.say("b")
    assert capsys.readouterr().out == "b\n"


def test_a_reader_that_has_had_enough(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(BrokenPipeError):
        screen.say("a")


def test_no_stdout_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    screen.say("a")


@pytest.mark.parametrize("quiet", [False, True])
def test_no_bars_where_there_is_no_terminal(capfd, quiet):
    with screen.tile_progress(quiet=quiet) as progress:
        assert progress is None
    with screen.status("Building", quiet=quiet) as show:
        assert show is None
    with screen.download_progress(quiet=quiet) as (advance, told):
        if not quiet:
            assert advance is not None
            assert told is not None
            advance("file", 1, 2)
            told("a line")
    assert capfd.readouterr() == ("", "" if quiet else "a line\n")


def test_bars_on_a_terminal(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with screen.tile_progress(quiet=False) as progress:
        assert progress is not None
        progress("bdn", 1, 4)
    with screen.status("Building demo", quiet=False) as show:
        assert show is not None
        show("BDN")
    err = capfd.readouterr().err
    assert "BDN" in err
    assert "1/4" in err
    assert "Building demo" in err


def test_what_was_passed_over(capsys):
    screen.say_passed_over([Path(f"/x/{name}.nii") for name in "abcde"])
    assert capsys.readouterr().err == (
        "note: passed over as results of trtseg: a.nii, b.nii, c.nii and 2 more\n"
    )


def test_what_is_used(capsys):
    engine = SimpleNamespace(net="bdn", folder=Path("/e"), manifest={"versions": {"onnx": "1"}})
    screen.say_what_is_used(SimpleNamespace(device="cpu", engines={"bdn": engine}))  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [
        "device: cpu",
        "BDN: /e",
        "  built with onnx 1",
    ]
