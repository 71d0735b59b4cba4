"""How long a scan takes, stage by stage, and how near that is to what the device can do."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.errors import DeviceError, EngineError, OutputError, UsageError
from trtseg.files import sha256_bytes, sha256_file
from trtseg.logs import stopwatch
from trtseg.nifti import read_scan
from trtseg.output import plan_outputs, save
from trtseg.sidecar import ID_LENGTH, versions

if TYPE_CHECKING:
    from trtseg.chains import Chain
    from trtseg.output import OutputPaths
    from trtseg.pipeline import Segmentation, Segmenter

#: The stages in which the networks run.
NETWORK = ("brain", "cortex")

#: Told of runs that are done, and of all of them.
Progress = Callable[[int, int], None]


def measure(
    load: Callable[[], Segmenter],
    scan: Path,
    *,
    runs: int = 10,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the start, the first scan and then warm runs, from the file to files.

    Parameters
    ----------
    load : callable
        Makes the segmenter; what it imports and loads is the start.
    scan : Path
    runs : int
        Warm runs.
    progress : callable, optional

    Returns
    -------
    dict
        Plain data for JSON: `scan` (its id, shape and voxels), `models`, `device`, `description`,
        `precision`, `versions`; `start_s` and `first_scan_s`; `runs`; `stages`, `total` and
        `network` with ``p50_s``, ``p95_s`` and ``max_s`` each; `voxels_per_second`; `work`,
        `achieved`, `ceilings` and `of_ceilings`, in operations (two a multiply-add) and bytes of
        activations, the latter two None where the device could not be measured, and then
        `not_measured` says why; `memory`; `labels_sha256`.

    Raises
    ------
    UsageError
        Fewer than 1 run.
    InputError, ModelError, EngineError, DeviceError
        As `trtseg.Segmenter` and its `segment`; EngineError also where two runs give other labels.
    OutputError
        The folder for temporary files cannot be written.
    """
    if runs < 1:
        raise UsageError(f"{runs} runs", expected="at least 1")
    tell = progress or (lambda _done, _total: None)
    tell(0, runs)
    started = time.perf_counter()
    with load() as segmenter, _temporary_folder() as folder:
        start = time.perf_counter() - started
        paths = plan_outputs([scan], folder)[0]
        result, first, timed = _timed(segmenter, scan, paths, runs, tell)
        memory = {
            "host_peak_bytes": _peak_bytes(),  # before the ceilings, whose copies may be larger
            "device_bytes": segmenter.chain.device_bytes(),
        }
        totals = summary([sum(one.values()) for one in timed])
        network = summary([sum(one[name] for name in NETWORK) for one in timed])
        return {
            "scan": {
                "id": sha256_file(scan)[:ID_LENGTH],
                "shape": list(result.brain.shape),
                "voxels": result.brain.size,
            },
            "models": segmenter.models,
            "device": segmenter.device,
            "description": segmenter.description,
            "precision": segmenter.precision,
            "versions": versions(),
            "start_s": start,
            "first_scan_s": sum(first.values()),
            "runs": runs,
            "stages": {name: summary([one[name] for one in timed]) for name in timed[0]},
            "total": totals,
            "network": network,
            "voxels_per_second": result.brain.size / totals["p50_s"],
            **_rates(segmenter.chain, scan, result, network["p50_s"]),
            "memory": memory,
            "labels_sha256": _digest(result),
        }


def _timed(
    segmenter: Segmenter, scan: Path, paths: OutputPaths, runs: int, tell: Progress
) -> tuple[Segmentation, dict[str, float], list[dict[str, float]]]:
    """The first result, its stages' seconds, and those of the warm runs after it."""
    first, result = _run(segmenter, scan, paths)
    digest = _digest(result)
    timed = []
    for done in range(1, runs + 1):
        seconds, again = _run(segmenter, scan, paths)
        if _digest(again) != digest:
            raise EngineError(
                f"run {done} gave other labels than the first one",
                expected="one answer, whenever it is asked for",
                action="do not use this device; see the system's log for its errors",
            )
        timed.append(seconds)
        tell(done, runs)
    return result, first, timed


def _rates(chain: Chain, scan: Path, result: Segmentation, seconds: float) -> dict[str, Any]:
    """What the networks executed in these seconds, beside what the device reaches at its best."""
    work = chain.work(read_scan(scan), result.brain)
    achieved = {
        "operations_per_second": 2 * work.multiply_adds / seconds,
        "bytes_per_second": work.bytes / seconds,
    }
    found: dict[str, Any] = {
        "work": asdict(work),
        "achieved": achieved,
        "ceilings": None,
        "of_ceilings": None,
    }
    try:
        ceilings = asdict(chain.ceilings())
    except (DeviceError, MemoryError) as error:  # the large product and copy may find no room
        return {**found, "not_measured": str(error) or "there is not enough memory"}
    share = {name: achieved[name] / best for name, best in ceilings.items()}
    return {**found, "ceilings": ceilings, "of_ceilings": share, "not_measured": None}


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="trtseg-")
    except OSError as error:
        raise OutputError(
            f"no temporary folder can be made ({error.strerror or error})",
            expected="a folder for temporary files that can be written",
            action="name another one: TMPDIR=FOLDER trtseg bench ...",
        ) from error
    with folder as name:
        yield Path(name)


def _run(
    segmenter: Segmenter, scan: Path, paths: OutputPaths
) -> tuple[dict[str, float], Segmentation]:
    """Seconds of each stage, from the file to the files; what is in no stage is ``other``."""
    started = time.perf_counter()
    result = segmenter.segment(scan)
    times = dict(result.times)
    with stopwatch(times, "write"):
        save(result, paths)
    times["other"] = max(0.0, time.perf_counter() - started - sum(times.values()))
    return times, result


def _digest(result: Segmentation) -> str:
    return sha256_bytes(np.stack([result.brain, result.cortex]).tobytes())


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile by nearest rank, and maximum: `p50_s`, `p95_s` and `max_s`."""
    ordered = sorted(seconds)
    return {
        "p50_s": statistics.median(ordered),
        "p95_s": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max_s": ordered[-1],
    }


def _peak_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB but on macOS


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What `measure` found, for people, line by line."""
    shape = " x ".join(map(str, report["scan"]["shape"]))
    yield f"{shape} voxels, models {report['models']}, {report['precision']}"
    yield str(report["description"])
    yield f"start {report['start_s']:.2f} s, first scan {report['first_scan_s']:.2f} s"
    yield f"{report['runs']} warm run{'s' * (report['runs'] > 1)}, seconds"
    yield f"{'stage':<10} {'p50':>9} {'p95':>9} {'max':>9}"
    rows = {**report["stages"], "network": report["network"], "total": report["total"]}
    for name, row in rows.items():
        yield f"{name:<10} {row['p50_s']:9.4f} {row['p95_s']:9.4f} {row['max_s']:9.4f}"
    yield f"{report['voxels_per_second'] / 1e6:.2f} million voxels a second, end to end"
    yield from _rate_lines(report)
    memory = report["memory"]
    device = memory["device_bytes"]
    on_device = "" if device is None else f", {device / 2**30:.2f} GiB on the device"
    yield f"peak memory: {memory['host_peak_bytes'] / 2**30:.2f} GiB{on_device}"


def _rate_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The networks' rates, beside what the device reaches where that was measured."""
    achieved, best, share = report["achieved"], report["ceilings"], report["of_ceilings"]
    operations = f"network: {achieved['operations_per_second'] / 1e12:.2f} TFLOP/s"
    moved = f"network: {achieved['bytes_per_second'] / 1e9:.1f} GB/s of activations"
    if best is None:
        yield operations
        yield moved
        yield f"what the device reaches at its best: not measured: {report['not_measured']}"
        return
    yield (
        f"{operations}, {share['operations_per_second']:.0%} of the "
        f"{best['operations_per_second'] / 1e12:.2f} that one large product reaches"
    )
    yield (
        f"{moved}, {share['bytes_per_second']:.0%} of the {best['bytes_per_second'] / 1e9:.1f} "
        "that one large copy reaches"
    )
