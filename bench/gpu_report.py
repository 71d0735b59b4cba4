"""What a long measurement found: on disk after every part of it, each part in its own process."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trtseg.errors import TrtsegError
from trtseg.files import atomic_write_json, make_folder

#: Seconds in which a process ends by itself once it has given its answer.
_PATIENCE = 10


class Report:
    """What was found so far; a crash costs no more than one part.

    Parameters
    ----------
    path : Path
    add : bool
        Start from what the file says already, if it is there.

    Raises
    ------
    OutputError
        It cannot be written.
    """

    def __init__(self, path: Path, *, add: bool = False) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        if add and path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))
        self.failed: dict[str, str] = self.found.get("failed", {})
        self.seconds: dict[str, float] = self.found.get("part_seconds", {})
        make_folder(path.parent)

    def add(self, **parts: Any) -> None:
        """Keep more."""
        self.found |= parts
        atomic_write_json(self.path, self.found)

    def attempt(self, name: str, action: Callable[[], Any], *, needs: Sequence[str] = ()) -> None:
        """Keep what `action` gives, or, under ``failed``, why it gave nothing.

        It is not tried where a part that it needs has failed; ``part_seconds`` says how long each
        part took.
        """
        self.failed.pop(name, None)
        self.found.pop(name, None)
        lacking = [part for part in needs if part in self.failed]
        if lacking:
            self._fail(name, f"not tried: {', '.join(lacking)} failed")
            return
        print(f"{name} ...", flush=True)
        begun = time.perf_counter()
        try:
            self.found[name] = action()
        except Exception as error:  # noqa: BLE001 (whatever it is, the other parts go on)
            self._fail(name, one_line(error))
        self.seconds[name] = round(time.perf_counter() - begun, 2)
        self.add(failed=self.failed, part_seconds=self.seconds)

    def _fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.add(failed=self.failed)
        print(f"{name} failed: {why}", file=sys.stderr, flush=True)


class PartError(Exception):
    """What another process says of its failure, or what is said of a process that died."""


def one_line(error: Exception) -> str:
    """An error's kind and words."""
    said = " ".join(str(error).split())
    return said if isinstance(error, PartError) else f"{type(error).__name__}: {said}"


def apart(action: Callable[..., Any], *given: Any, limit: float) -> Any:
    """Call a function in a process of its own.

    A crash, a GPU that is in error for the rest of the process, memory that is not given back and
    libraries that do not go together then concern this call only.

    Parameters
    ----------
    action : callable
        Of a module's top level, or a `functools.partial` of such a one.
    *given
        Its arguments; they and the result are pickled.
    limit : float
        Seconds after which the process is killed.

    Raises
    ------
    PartError
        The function raised, the process died, or it took too long.
    """
    context = multiprocessing.get_context("spawn")  # a driver that was asked does not outlive forks
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, action, given))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise PartError(f"not done after {limit:g} s")
        well, answer = receiver.recv()
        process.join(_PATIENCE)
    except EOFError:
        process.join()
        raise PartError(f"its process {_end(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not well:
        raise PartError(answer)
    return answer


def _answer(sender: Connection, action: Callable[..., Any], given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of Ctrl-C the other process tells
    try:
        sender.send((True, action(*given)))
    except Exception as error:  # noqa: BLE001 (told by the other process)
        if not isinstance(error, TrtsegError):
            traceback.print_exc()
        sender.send((False, one_line(error)))


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
