"""A lock on a file, among threads and processes."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trtseg
from trtseg.locks import locked


def is_locked(path: Path) -> bool:
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def never() -> None:
    raise AssertionError("waited")


def test_it_is_held_inside_only(tmp_path):
    path = tmp_path / "lock"
    with locked(path, never) as held:
        assert held
        assert is_locked(path)
    assert not is_locked(path)
    with pytest.raises(KeyboardInterrupt), locked(path, never):
        raise KeyboardInterrupt
    assert not is_locked(path)


def test_others_wait_and_are_told(tmp_path):
    log: list[str] = []
    told = threading.Event()

    def second() -> None:
        def waiting() -> None:
            log.append("waits")
            told.set()

        with locked(tmp_path / "lock", waiting) as held:
            log.append(f"held {held}")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "lock", never):
        thread.start()
        told.wait()
        log.append("let go")
    thread.join()
    assert log == ["waits", "let go", "held True"]


def test_it_holds_against_another_process(tmp_path):
    path = tmp_path / "lock"
    program = f"""
import sys
from pathlib import Path
from trtseg.locks import locked
with locked(Path({str(path)!r}), None):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(trtseg.__file__).parents[1],
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert is_locked(path)
        holder.communicate()  # closes its stdin, on which it ends
    assert holder.returncode == 0
    assert not is_locked(path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "lock", never) as held:
        assert not held


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock", never):
        pytest.fail("entered without a lock")
    assert not (tmp_path / "elsewhere").exists()
