"""How many faults are tried: few by default, the full count with TRTSEG_SLOW=1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SLOW = os.environ.get("TRTSEG_SLOW") == "1"
ROOT = Path(__file__).parents[2]


def count(default: int, full: int) -> int:
    """How many to try."""
    return full if SLOW else default


def run_child(module: str, *arguments: object) -> Any:
    """Run a module of this folder in a process of its own, of one thread; give the JSON it prints.

    Threads would count in its address space, and must not be there when it forks.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.faults.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    report = json.loads(done.stdout)
    print(f"{module}: {json.dumps(report, sort_keys=True)}")
    return report
