"""One scan after another: which ones, what is done already, and what came of each."""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtseg import nifti
from trtseg.errors import (
    EXIT_DEVICE,
    EXIT_OK,
    EXIT_SUSPECT,
    InputError,
    TrtsegError,
    UsageError,
)
from trtseg.logs import LOG, stopwatch
from trtseg.output import SIDECAR_ENDING, is_folder, map_of, remove_stale, save
from trtseg.report import write_report
from trtseg.sidecar import (
    add_outputs,
    complete,
    failed_row,
    find_complete,
    request,
    stats_row,
    write_sidecar,
)
from trtseg.volumefile import check_files, volume_files, volume_stem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtseg.backends.base import ChainProgress
    from trtseg.output import OutputPaths
    from trtseg.pipeline import Segmentation, Segmenter
    from trtseg.scan import Scan

#: What an error of too little memory says of a scan.
OUT_OF_MEMORY = "out of memory; expected more free memory for this scan; close other programs"

_SCANS = (".nii", ".nii.gz")


# Which scans


@dataclass(frozen=True)
class Found:
    """Scans to segment, and files that were passed over as results of trtseg."""

    scans: tuple[Path, ...]
    passed_over: tuple[Path, ...]


def find_scans(arguments: Sequence[Path]) -> Found:
    """Find the scans that are meant by files, folders and patterns.

    Parameters
    ----------
    arguments : sequence of Path
        A file is taken as it is. A folder stands for the .nii and .nii.gz files in it, but not in
        folders below it; a pattern (``*``, ``?``, ``[...]``, and ``**`` for any depth) for the
        files and folders it matches.

    Returns
    -------
    Found
        In the order given, sorted within a folder or pattern; what folders and patterns have in
        common with what was named before is taken once. A map of trtseg is passed over if its
        sidecar lies beside it; in folders and patterns also if its scan does.

    Raises
    ------
    InputError
        A folder cannot be read.
    UsageError
        A folder or pattern holds no scan, or nothing is left.
    """
    scans: list[Path] = []
    passed: list[Path] = []
    seen: set[str] = set()
    for argument in arguments:
        searched = is_folder(argument) or _is_pattern(argument)
        files = sorted(_searched(argument)) if searched else [argument]
        if not files:
            raise UsageError(
                f"{argument}: no scan in it", expected="files ending in .nii or .nii.gz"
            )
        for file in files:
            key = os.path.realpath(file)
            if not (searched and key in seen):
                (passed if _is_result(file, by_scan=searched) else scans).append(file)
            seen.add(key)
    if not scans:
        raise UsageError(
            "nothing to segment: all that was found are trtseg's own results",
            expected="a scan",
            action="name the scan itself",
        )
    return Found(tuple(scans), tuple(passed))


def _is_pattern(argument: Path) -> bool:
    """Whether it is one and not, as brackets are allowed there, the name of a file."""
    return glob.has_magic(str(argument)) and not os.path.lexists(argument)


def _searched(argument: Path) -> Iterator[Path]:
    """Scan-like files of a folder, or of what a pattern matches."""
    matches = [argument]
    if not is_folder(argument):
        found = glob.iglob(str(argument), recursive=True)  # noqa: PTH207 (no absolute patterns)
        matches = [Path(match) for match in found]
    for match in matches:
        for path in _children(match) if is_folder(match) else [match]:
            name = path.name.lower()
            if name.endswith(_SCANS) and not name.startswith(".") and not is_folder(path):
                yield path


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror or error}",
            expected="a folder that can be read",
            action="check its permissions",
        ) from error


def _is_result(path: Path, *, by_scan: bool) -> bool:
    start = map_of(volume_stem(path))
    beside = [SIDECAR_ENDING, *(_SCANS if by_scan else ())]
    return start is not None and any(
        os.path.lexists(path.parent / f"{start}{other}") for other in beside
    )


# What is done with each


@dataclass(frozen=True)
class Options:
    """What is asked of every scan of a run; names and meaning are those of the command line."""

    models: str | None = None
    device: str = "auto"
    threads: int | None = None
    precision: str | None = None
    mask: Path | None = None
    save_probabilities: bool = False
    save_dseg: bool = False
    reorient: bool = False
    report: bool = False
    ga_weeks: float | None = None
    keep_names: bool = False
    resume: bool = False

    def record(self) -> dict[str, Any]:
        """What the sidecar says of them: all but `resume`, which changes no result."""
        return {name: value for name, value in vars(self).items() if name != "resume"}


@dataclass(frozen=True)
class Outcome:
    """What came of one scan.

    Attributes
    ----------
    scan : Path
    id : str
        The first 12 characters of its SHA-256; empty for one that cannot be read.
    paths : OutputPaths
    status : str
        ``"ok"``, ``"suspect"``, or ``"failed"``.
    exit_code : int
    resumed : bool
        It was complete before this run.
    description : mapping
        From `trtseg.sidecar.complete`; empty for a scan that failed.
    error : str
        Why it failed; else empty.
    """

    scan: Path
    id: str
    paths: OutputPaths
    status: Literal["ok", "suspect", "failed"]
    exit_code: int
    resumed: bool = False
    description: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the suspect checks."""
        checks = self.description["qc"]["checks"] if self.description else ()
        return tuple(check["line"] for check in checks if check["verdict"] == "suspect")

    def row(self, *, keep_names: bool) -> dict[str, Any]:
        """The row of this scan in the table of ``--stats``."""
        if not self.description:
            return failed_row(self.scan, self.exit_code, keep_names=keep_names)
        return stats_row(self.description)


class Reading:
    """A scan that is being read in the background, while another one is segmented.

    Parameters
    ----------
    segmenter : Segmenter
    scan : Path
    paths : OutputPaths
    options : Options

    Attributes
    ----------
    following : Reading or None
        Of the scan that comes next.
    """

    def __init__(
        self, segmenter: Segmenter, scan: Path, paths: OutputPaths, options: Options
    ) -> None:
        self.scan = scan
        self.paths = paths
        self.following: Reading | None = None
        self._asked: Future[dict[str, Any]] = Future()
        self._done: Future[dict[str, Any] | None] = Future()
        self._image: Future[Scan] = Future()
        # A daemon: it writes nothing, so that an interrupt need not wait for it.
        work = (segmenter, options)
        threading.Thread(target=self._read, args=work, daemon=True).start()

    def asked(self) -> dict[str, Any]:
        """What will be made of what (`trtseg.sidecar.request`); waits, raises its errors."""
        return self._asked.result()

    def done(self) -> dict[str, Any] | None:
        """The description of a result that is complete already; None also where none counts."""
        return self._done.result()

    def image(self) -> Scan:
        """The scan; waits, raises what `trtseg.nifti.read_scan` raises."""
        return self._image.result()

    def ready(self) -> Scan | None:
        """The scan if it has been read, else None, as where that failed; does not wait."""
        if not self._image.done() or self._image.exception() is not None:
            return None
        return self._image.result()

    def _read(self, segmenter: Segmenter, options: Options) -> None:
        try:
            asked = _request(segmenter, self.scan, options)
            self._asked.set_result(asked)
            done = None
            if options.resume:
                done = find_complete(self.paths.sidecar, asked, self.paths.results())
            self._done.set_result(done)
            if done is None:
                self._image.set_result(nifti.read_scan(self.scan))
        except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
            for one in (self._asked, self._done, self._image):
                if not one.done():
                    one.set_exception(error)


def read_ahead(
    segmenter: Segmenter, plans: Sequence[tuple[Path, OutputPaths]], options: Options
) -> Iterator[Reading]:
    """Give the scans in order; while one is worked on, the next one is read."""
    following: Reading | None = None
    for scan, paths in plans:
        reading, following = following, Reading(segmenter, scan, paths, options)
        if reading is not None:
            reading.following = following
            yield reading
    if following is not None:
        yield following


def process(
    segmenter: Segmenter,
    reading: Reading,
    options: Options,
    *,
    progress: ChainProgress | None = None,
) -> Outcome:
    """Segment one scan and write all that was asked for; or find that this has been done.

    The maps are written first, the cortex last of them, then the report; then goes what an earlier
    result has and this one has not; and the sidecar is written at the end: where it is and its
    digests hold, the result is complete.

    Returns
    -------
    Outcome
        An error of this scan is one too: it must not stop the others.
    """
    name, scan, paths = "", reading.scan, reading.paths
    try:
        name = reading.asked()["id"]
        LOG.debug("scan %s: file name %r", name, scan.name)
        found = reading.done()
        if found is not None:
            LOG.info("scan %s: complete, not run again", name)
            return _outcome(scan, paths, found, resumed=True)
        LOG.info("scan %s: started", name)
        outcome = _outcome(scan, paths, _segment(segmenter, reading, options, progress))
    except TrtsegError as error:
        _log_failure(name, type(error).__name__, error.exit_code, _reason(error, scan))
        return Outcome(scan, name, paths, "failed", error.exit_code, error=str(error))
    except MemoryError:
        _log_failure(name, "MemoryError", EXIT_DEVICE, "out of memory")
        return Outcome(scan, name, paths, "failed", EXIT_DEVICE, error=f"{scan}: {OUT_OF_MEMORY}")
    _log_outcome(name, outcome)
    return outcome


def _request(segmenter: Segmenter, scan: Path, options: Options) -> dict[str, Any]:
    inputs = {"scan": scan, **({} if options.mask is None else {"mask": options.mask})}
    for path in inputs.values():
        check_files(path)
    return request(
        inputs=inputs,
        engines=segmenter.engines,
        models=segmenter.models,
        device=segmenter.device,
        precision=segmenter.precision,
        options=options.record(),
        keep_names=options.keep_names,
    )


def _segment(
    segmenter: Segmenter, reading: Reading, options: Options, progress: ChainProgress | None
) -> dict[str, Any]:
    """Run the networks, write everything, give the description that was written."""
    scan, paths, asked = reading.scan, reading.paths, reading.asked()
    result = segmenter.segment(
        reading.image,
        mask=options.mask,
        probabilities=options.save_probabilities,
        reorient=options.reorient,
        ga_weeks=options.ga_weeks,
        progress=progress,
        following=None if reading.following is None else reading.following.ready,
        name=str(scan),
    )
    # Files were read between two looks at their digests: these are the bytes that were segmented.
    if _request(segmenter, scan, options)["inputs"] != asked["inputs"]:
        raise InputError(
            f"{scan}: changed while it was segmented",
            expected="a scan that stays as it is",
            action="run it again when nothing writes to it; no result was written",
        )
    times = dict(result.times)
    with stopwatch(times, "check"):
        qc = result.qc
    with stopwatch(times, "write"):
        save(result, paths)
    described = complete(
        asked,
        result,
        outputs=paths.maps(),
        qc=qc,
        times=times,
        keep_names=options.keep_names,
    )
    if options.report:
        described = _report(reading.image(), result, paths, described, options.keep_names)
    removed = remove_stale(paths, [scan, *([] if options.mask is None else [options.mask])])
    if removed:
        LOG.info("scan %s: removed of an earlier result: %s", asked["id"], ", ".join(removed))
    write_sidecar(paths.sidecar, described)
    return described


def _report(
    scan: Scan,
    result: Segmentation,
    paths: OutputPaths,
    described: dict[str, Any],
    keep_names: bool,
) -> dict[str, Any]:
    """Write the page and its picture; give the description with both of them."""
    times: dict[str, float] = {}
    pages = paths.pages()
    with stopwatch(times, "report"):
        write_report(
            pages["report"],
            pages["picture"],
            scan=scan,
            brain=result.brain,
            cortex=result.cortex,
            description=described,
        )
    return add_outputs(described, pages, times, keep_names=keep_names)


def _outcome(
    scan: Path, paths: OutputPaths, description: Mapping[str, Any], *, resumed: bool = False
) -> Outcome:
    suspect = bool(description["suspect"])
    return Outcome(
        scan,
        description["id"],
        paths,
        "suspect" if suspect else "ok",
        EXIT_SUSPECT if suspect else EXIT_OK,
        resumed,
        description,
    )


def _log_outcome(name: str, outcome: Outcome) -> None:
    description = outcome.description
    for warning in description["warnings"]:
        LOG.warning("scan %s: %s", name, warning)
    for reason in outcome.reasons:
        LOG.warning("scan %s: suspect: %s", name, reason)
    volumes = description["volumes_ml"]
    LOG.info(
        "scan %s: %s, brain %.1f mL, cortex %.1f mL",
        name,
        outcome.status,
        volumes["brain"],
        volumes["cortex"],
    )


def _log_failure(name: str, kind: str, exit_code: int, reason: str) -> None:
    said = f": {reason}" if reason else ""
    LOG.error("scan %s: failed, %s, exit code %d%s", name or "unreadable", kind, exit_code, said)


def _reason(error: TrtsegError, scan: Path) -> str:
    """What an error says of the scan without its name; empty where that cannot be told apart.

    What stands in brackets is left out: it may quote the file.
    """
    for file in volume_files(scan):
        start = f"{file}: "
        if error.found.startswith(start):
            return error.found[len(start) :].partition(" (")[0]
    return ""
