"""Strikes a process while it writes: ``python -m tests.faults.strike SCENARIO FAULT COUNT FOLDER``.

Everything is imported and written once here; each strike then falls on a fork of this process. The
points are spread evenly over the bytecode instructions that run in the modules that write, from
the first to the last, or over the time the writing takes. Prints as JSON how often the final names
showed the older files, the new ones or nothing; a file that is neither ends it with a traceback.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

from tests.build.networks import ONE_LAYER
from trtseg import nifti
from trtseg.engine import load_engine, write_engine
from trtseg.errors import EXIT_OUTPUT, EngineMissingError, OutputError
from trtseg.files import atomic_write_json
from trtseg.output import plan_outputs, save
from trtseg.scan import Geometry

#: Exit codes of a fork: it wrote everything, was refused, was interrupted.
DONE, REFUSED, INTERRUPTED = 0, EXIT_OUTPUT, 130

#: Files whose instructions count as writing.
WRITING = (
    *("trtseg/files.py", "trtseg/nifti.py", "trtseg/output.py", "trtseg/sealed.py"),
    "trtseg/volumefile.py",
    *(
        "gzip.py",
        "igzip.py",
        "contextlib.py",
        "tempfile.py",
        "pathlib.py",
        "shutil.py",
        "secrets.py",
    ),
)

#: A user who owns nothing.
NOBODY = 65534

Write = Callable[[Path, int], None]
Judge = Callable[[Path], str]


def geometry() -> Geometry:
    return nifti.geometry_of_affine(np.diag([-0.8, 0.8, 0.8, 1.0]))


def blobs(seed: int) -> np.ndarray:
    """A label map that gzip makes a few kB of."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((16, 16, 16)) > 0.5
    return np.kron(coarse, np.ones((4, 4, 4))).astype(np.uint8)


def write_result(folder: Path, seed: int) -> None:
    """The maps of a result, and JSON beside them."""
    brain = blobs(seed)
    result = SimpleNamespace(
        brain=brain,
        cortex=brain * blobs(seed + 1),
        brain_probabilities=brain.astype(np.float32) / 3,
        cortex_probabilities=None,
        geometry=geometry(),
        notice="",
    )
    (paths,) = plan_outputs([folder / "scan.nii.gz"], folder, probabilities=True)
    save(result, paths)
    atomic_write_json(folder / "scan_trtseg.json", {"seed": seed, "filler": "x" * 20_000})


def write_build(folder: Path, seed: int) -> None:
    """A built network."""
    rng = np.random.default_rng(seed)
    files = {name: rng.bytes(30_000) for name in ("weights.npz", "normal.onnx", "fc.onnx")}
    write_engine(
        folder, "tiny", "bdn", spec=ONE_LAYER, files=files, checkpoint={}, notice=str(seed),
        proof={}, versions={},
    )  # fmt: skip


SCENARIOS: dict[str, Write] = {"result": write_result, "build": write_build}


def visible(folder: Path) -> dict[str, bytes]:
    """Name below `folder` to content, of all files but the temporary ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_left_over(path.relative_to(folder))
    }


def is_left_over(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def left_over(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(name) for name in names if is_left_over(name))


class Checked:
    """What one scenario writes, and the states a folder may be in after a strike."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.write, self.folder = name, SCENARIOS[name], folder
        self.older, self.newer = self._content(1), self._content(2)
        assert self.older.keys() == self.newer.keys()
        assert all(self.older[path] != self.newer[path] for path in self.older)

    def _content(self, seed: int) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            self.write(Path(folder), seed)
            assert not left_over(Path(folder))
            return visible(Path(folder))

    def judge(self, folder: Path, older: bool) -> str:
        """Name the state of a folder: nothing, older, newer, or some of both."""
        found = visible(folder)
        if self.name == "build":
            return self._judge_build(folder)
        states = set()
        for path, content in self.newer.items():
            allowed = {"newer": content, **({"older": self.older[path]} if older else {})}
            if not older:
                allowed["nothing"] = None
            state = [name for name, value in allowed.items() if found.get(path) == value]
            assert state, f"{path} is neither older nor newer nor missing"
            states.add(state[0])
        assert found.keys() <= self.newer.keys()
        return " and ".join(sorted(states))

    def _judge_build(self, folder: Path) -> str:
        try:
            engine = load_engine(folder, "tiny", "bdn")
        except EngineMissingError:
            assert not (folder / "tiny" / "bdn").exists()
            return "nothing"
        return {"1": "older", "2": "newer"}[engine.notice]


# How a fork is struck


def traced(act: Callable[[int], None]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that calls `act` with the number of each instruction that runs."""
    counter = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counter
        if event == "call":
            if not frame.f_code.co_filename.endswith(WRITING):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode":
            counter += 1
            act(counter)
        return trace

    return trace


def run_traced(act: Callable[[int], None], write: Write, folder: Path) -> None:
    before = sys.gettrace()
    sys.settrace(traced(act))
    try:
        write(folder, 2)
    finally:
        sys.settrace(before)


def kill_at(point: int) -> Callable[[int], None]:
    def act(counter: int) -> None:
        if counter == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def interrupt_at(point: int) -> Callable[[int], None]:
    def act(counter: int) -> None:
        if counter == point:
            raise KeyboardInterrupt

    return act


def fork(body: Callable[[], None]) -> int:
    """Run in a fork of this process; give its id."""
    # An interrupt waits until the fork is ready for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return child
    code = 99
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        body()
        code = DONE
    except OutputError:
        code = REFUSED
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        if code == 99:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def ended(child: int) -> int:
    """Exit code of a fork, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def strike(checked: Checked, body: Callable[[Path], int], older: bool, leave: bool) -> str:
    """Strike once in a fresh folder; name what was there afterwards."""
    with tempfile.TemporaryDirectory(dir=checked.folder) as name:
        folder = Path(name)
        if older:
            checked.write(folder, 1)
        code = body(folder)
        if not leave:
            assert not left_over(folder), left_over(folder)
        state = checked.judge(folder, older)
        if code == DONE:
            assert state == "newer", state
        else:
            assert code in (REFUSED, INTERRUPTED, -signal.SIGKILL), code
        if left_over(folder):
            # They may lie there, but in no one's way.
            checked.write(folder, 2)
            assert checked.judge(folder, older) == "newer"
        return {DONE: "done", -signal.SIGKILL: "killed", INTERRUPTED: "interrupted"}.get(
            code, "refused"
        ) + f": {state}"


def spread(count: int, total: int) -> list[int]:
    """`count` points from 1 to `total`."""
    return np.linspace(1, total, count).round().astype(int).tolist()


def at_instructions(checked: Checked, act_at: Any, count: int) -> list[Callable[[Path], int]]:
    totals = []
    with tempfile.TemporaryDirectory(dir=checked.folder) as folder:
        run_traced(totals.append, checked.write, Path(folder))
    return [
        lambda folder, point=point: ended(
            fork(lambda: run_traced(act_at(point), checked.write, folder))
        )
        for point in spread(count, totals[-1])
    ]


def at_times(checked: Checked, number: int, count: int) -> list[Callable[[Path], int]]:
    with tempfile.TemporaryDirectory(dir=checked.folder) as folder:
        started = time.perf_counter()
        ended(fork(lambda: checked.write(Path(folder), 2)))
        whole = time.perf_counter() - started

    def struck(folder: Path, after: float) -> int:
        child = fork(lambda: checked.write(folder, 2))
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        return ended(child)

    return [
        lambda folder, after=whole * index / count: struck(folder, after) for index in range(count)
    ]


def with_little_room(checked: Checked, count: int) -> list[Callable[[Path], int]]:
    """The limit on the size of one file stands for a disk that is full after so many bytes."""
    largest = max(map(len, checked.newer.values()))

    def limited(folder: Path, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        checked.write(folder, 2)

    return [
        lambda folder, size=size: ended(fork(lambda: limited(folder, size)))
        for size in [0, *spread(count - 2, largest), largest + 1]
    ]


def forbidden(checked: Checked, count: int) -> list[Callable[[Path], int]]:
    """A folder that the user may see but not change; root steps down to be such a user."""

    def write(folder: Path) -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        checked.write(folder, 2)

    def attempt(folder: Path) -> int:
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        code = ended(fork(lambda: write(folder)))
        for path in folders:
            path.chmod(0o755)
        return code

    return [attempt] * count


FAULTS: dict[str, Any] = {
    "forbidden": forbidden,
    "kill": lambda checked, count: at_instructions(checked, kill_at, count),
    "kill-timed": lambda checked, count: at_times(checked, signal.SIGKILL, count),
    "interrupt": lambda checked, count: at_instructions(checked, interrupt_at, count),
    "interrupt-timed": lambda checked, count: at_times(checked, signal.SIGINT, count),
    "full": with_little_room,
}


def main(scenario: str, fault: str, count: int, folder: Path) -> None:
    checked = Checked(scenario, folder)
    bodies = FAULTS[fault](checked, count)
    leave = fault.startswith("kill")
    tally: collections.Counter[str] = collections.Counter()
    for number, body in enumerate(bodies):
        tally[strike(checked, body, number % 2 == 1, leave)] += 1
    print(json.dumps({"outcomes": tally}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
