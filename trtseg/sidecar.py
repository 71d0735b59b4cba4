"""What a result was made from, as JSON beside it: digests, versions, options, volumes, checks.

Nothing here names a person or a place: a scan is known by the first 12 characters of its SHA-256,
and file names appear only where `keep_names` asks for them. Folders and dates never do.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trtseg import __version__
from trtseg.errors import InputError, OutputError, UsageError
from trtseg.files import (
    atomic_write,
    atomic_write_json,
    json_bytes,
    json_seal,
    sha256_bytes,
    sha256_file,
)
from trtseg.packages import package_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trtseg.engine import Engine
    from trtseg.gpu_engine import GpuEngine
    from trtseg.qc import Qc

#: Meaning of the fields; a change of meaning raises it, a new field does not.
SCHEMA = 1

#: Characters of the SHA-256 that a scan is called by.
ID_LENGTH = 12

#: What every report must say.
NOT_A_DEVICE = (
    "Research software, not a medical device: validated for no clinical use. Look at every result."
)

#: Options that change what a result or its sidecar says, of those `describe` is given.
DECISIVE = ("reorient", "ga_weeks", "keep_names")

#: Suffixes `write_stats` writes.
STATS_SUFFIXES = (".csv", ".json")

#: Packages whose versions can change a result or a report; those not installed are left out.
_PACKAGES = (
    "numpy",
    "scipy",
    "nibabel",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
    "pillow",
)

_CHUNK = 1 << 20
_PAIR = {".hdr": ".img", ".img": ".hdr"}

# A spreadsheet runs a cell that begins with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Label:
    """One value of a label map.

    Attributes
    ----------
    index : int
        The voxel value.
    name, abbreviation : str
    color : str
        ``#rrggbb``, of Okabe and Ito's palette, which colour-blind people tell apart.
    mapping : int or None
        Index in BIDS's table of common image-derived labels; None where it has none.
    """

    index: int
    name: str
    abbreviation: str
    color: str
    mapping: int | None


BRAIN_COLOR = "#56b4e9"
CORTEX_COLOR = "#e69f00"

#: Lookup tables of the label maps: each map by itself, and both in one (2 wins over 1).
LABELS = {
    "brain": (Label(1, "Brain", "BRAIN", BRAIN_COLOR, None),),
    "cortex": (Label(1, "Cortical Gray Matter", "CGM", CORTEX_COLOR, 8),),
    "dseg": (
        Label(1, "Brain other than Cortical Gray Matter", "BRAINOTHER", BRAIN_COLOR, None),
        Label(2, "Cortical Gray Matter", "CGM", CORTEX_COLOR, 8),
    ),
}


class Result(Protocol):
    """What is described: the part of `trtseg.Segmentation` that matters here."""

    @property
    def brain(self) -> NDArray[np.uint8]:
        """Labels, shape (i, j, k)."""

    @property
    def brain_ml(self) -> float:
        """Volume in mL."""

    @property
    def cortex_ml(self) -> float:
        """Volume in mL."""

    @property
    def times(self) -> Mapping[str, float]:
        """Seconds of each stage."""

    @property
    def models(self) -> str:
        """Name of the model set."""

    @property
    def device(self) -> str:
        """Where it ran."""

    @property
    def description(self) -> str:
        """The very device it ran on, and the library."""

    @property
    def precision(self) -> str:
        """What the networks computed in."""

    @property
    def notice(self) -> str:
        """What must be said of the weights."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know."""


def request(
    *,
    inputs: Mapping[str, Path | NDArray[Any]],
    engines: Mapping[str, Engine | GpuEngine],
    models: str,
    device: str,
    precision: str,
    options: Mapping[str, Any],
    keep_names: bool = False,
) -> dict[str, Any]:
    """Say what is going to be made of what: the part of `describe` known before anything runs.

    Parameters
    ----------
    models, device, precision : str
        As in the result.
    inputs, engines, options, keep_names
        As for `describe`.

    Returns
    -------
    dict
        `schema`; `id`, the first 12 characters of the scan's SHA-256; `inputs`, a digest each;
        `models`, with the digests of checkpoint and engine files; `versions`; `device`;
        `precision`; `options`.

    Raises
    ------
    InputError
        A file cannot be read to take its digest.
    """
    given = {role: _input_digest(one, keep_names) for role, one in inputs.items()}
    return {
        "schema": SCHEMA,
        "id": given["scan"]["sha256"][:ID_LENGTH],
        "inputs": given,
        "models": {
            "set": models,
            "networks": {net: _network(engine) for net, engine in engines.items()},
        },
        "versions": versions(),
        "device": device,
        "precision": precision,
        "options": {name: _option(value, keep_names) for name, value in options.items()},
    }


def describe(
    result: Result,
    *,
    inputs: Mapping[str, Path | NDArray[Any]],
    outputs: Mapping[str, Path],
    engines: Mapping[str, Engine | GpuEngine],
    qc: Qc,
    options: Mapping[str, Any],
    times: Mapping[str, float] | None = None,
    keep_names: bool = False,
) -> dict[str, Any]:
    """Say all that made a result, as plain data for JSON: `request` and `complete` in one call.

    Parameters
    ----------
    result : trtseg.Segmentation
    inputs : mapping of str to Path or ndarray
        ``"scan"``, and ``"mask"`` where one was given.
    outputs : mapping of str to Path
        What each written file holds, such as ``"cortex"``, to the file.
    engines : mapping of str to Engine or GpuEngine
        ``"bdn"`` and ``"cgm"``.
    qc : Qc
    options : mapping of str to None, bool, int, float, str or Path
        As the user gave them. Of a Path, or a str that is a path, only the name is kept, and only
        with `keep_names`; else it is ``"given"``.
    times : mapping of str to float, optional
        Seconds of each stage, writing included; default ``result.times``.
    keep_names : bool
        Whether file names may appear.

    Returns
    -------
    dict
        What `request` and `complete` say.

    Raises
    ------
    InputError, OutputError
        A file cannot be read to take its digest.
    """
    asked = request(
        inputs=inputs,
        engines=engines,
        models=result.models,
        device=result.device,
        precision=result.precision,
        options=options,
        keep_names=keep_names,
    )
    return complete(asked, result, outputs=outputs, qc=qc, times=times, keep_names=keep_names)


def complete(
    asked: Mapping[str, Any],
    result: Result,
    *,
    outputs: Mapping[str, Path],
    qc: Qc,
    times: Mapping[str, float] | None = None,
    keep_names: bool = False,
) -> dict[str, Any]:
    """Add to what was asked what came of it.

    Parameters
    ----------
    asked : mapping
        From `request`.
    result, outputs, qc, times, keep_names
        As for `describe`.

    Returns
    -------
    dict
        What `request` says, and `ran_on`, the very device and library; `outputs`, a digest each;
        `labels`, the meaning of the values in each map; `shape`; `times_s`; `volumes_ml`; `qc`;
        `suspect`; `notice`; `warnings`; `disclaimer`.

    Raises
    ------
    OutputError
        A file cannot be read to take its digest.
    """
    return {
        **asked,
        "ran_on": result.description,
        "outputs": {role: _output_digest(one, keep_names) for role, one in outputs.items()},
        "labels": {
            role: {str(label.index): label.name for label in LABELS[role]}
            for role in outputs
            if role in LABELS
        },
        "shape": list(result.brain.shape),
        "times_s": dict(result.times if times is None else times),
        "volumes_ml": {"brain": result.brain_ml, "cortex": result.cortex_ml},
        "qc": {"suspect": qc.suspect, "checks": [check.to_dict() for check in qc.checks]},
        "suspect": qc.suspect,
        "notice": result.notice,
        "warnings": list(result.warnings),
        "disclaimer": NOT_A_DEVICE,
    }


def add_outputs(
    description: Mapping[str, Any],
    outputs: Mapping[str, Path],
    times: Mapping[str, float],
    *,
    keep_names: bool = False,
) -> dict[str, Any]:
    """A description with more files, such as the report that was made of it, and their times.

    Raises
    ------
    OutputError
        A file cannot be read to take its digest.
    """
    more = {role: _output_digest(one, keep_names) for role, one in outputs.items()}
    return {
        **description,
        "outputs": {**description["outputs"], **more},
        "times_s": {**description["times_s"], **times},
    }


def find_complete(
    path: Path, asked: Mapping[str, Any], outputs: Mapping[str, Path]
) -> dict[str, Any] | None:
    """The description in a sidecar, if what is asked for has been done and is still there, intact.

    Parameters
    ----------
    path : Path
        The sidecar; need not exist.
    asked : mapping
        From `request`.
    outputs : mapping of str to Path
        The files that must be there.

    Returns
    -------
    dict or None
        The description, if it is of the same inputs, networks, version of trtseg, kind of device,
        precision and options (those in `DECISIVE`), each of `outputs` has the digest it says, and
        the sidecar has its seal and is, to the byte, as `write_sidecar` wrote it. None where
        anything is missing, differs or cannot be read.
    """
    try:
        content = path.read_bytes()
        found: dict[str, Any] = json.loads(content)
        sealed = found.pop("seal") == json_seal(found) and content == json_bytes(_sealed(found))
        same = _decisive(found) == _decisive(asked) and all(
            found["outputs"][role]["sha256"] == sha256_file(file) for role, file in outputs.items()
        )
        whole = isinstance(found["suspect"], bool) and "id" in stats_row(found)
    # The last three are what reading a description of another shape raises.
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return found if sealed and same and whole else None


def _decisive(description: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides about every byte of a result, times aside."""
    return (
        *(description[key] for key in ("schema", "inputs", "models", "precision")),
        description["versions"]["trtseg"],
        description["device"].partition(":")[0],  # the second of two like GPUs is as good
        [description["options"][name] for name in DECISIVE],
    )


def scan_name(description: Mapping[str, Any]) -> str:
    """What to call the scan of a description: its file name where kept, else its id."""
    return str(description["inputs"]["scan"].get("name", description["id"]))


def write_sidecar(path: Path, description: Mapping[str, Any]) -> None:
    """Write a description as JSON, atomically, with a seal over the rest of it.

    The field `seal` is the SHA-256 of all other fields as JSON: keys sorted, no line breaks, what
    is not ASCII escaped, ``", "`` and ``": "`` between items, as Python's ``json.dumps`` writes it.

    Parameters
    ----------
    path : Path
    description : mapping
        From `complete` or `describe`.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    atomic_write_json(path, _sealed(description))


def _sealed(description: Mapping[str, Any]) -> dict[str, Any]:
    return {**description, "seal": json_seal(description)}


def write_lookup(path: Path, kind: str) -> None:
    """Write the BIDS lookup table (``*_dseg.tsv``) of a label map, atomically.

    Parameters
    ----------
    path : Path
    kind : str
        ``"brain"``, ``"cortex"`` or ``"dseg"`` (both in one), see `LABELS`.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    rows = ["index\tname\tabbreviation\tcolor\tmapping"]
    for label in LABELS[kind]:
        mapping = "n/a" if label.mapping is None else str(label.mapping)
        rows.append(
            "\t".join((str(label.index), label.name, label.abbreviation, label.color, mapping))
        )
    with atomic_write(path) as stream:
        stream.write(("\n".join(rows) + "\n").encode())


def stats_row(description: Mapping[str, Any]) -> dict[str, Any]:
    """One scan's row of a table across scans.

    Parameters
    ----------
    description : mapping
        From `describe`.

    Returns
    -------
    dict
        `id` (the file name where kept), `status` (``"ok"`` or ``"suspect"``), `brain_ml`,
        `cortex_ml`, ``qc_<check>`` with each verdict, ``time_<stage>_s``, `models`, `device`,
        `precision`, `trtseg` (its version), `notice`.
    """
    verdicts = {f"qc_{one['name']}": one["verdict"] for one in description["qc"]["checks"]}
    times = {
        f"time_{stage.replace('-', '_')}_s": seconds
        for stage, seconds in description["times_s"].items()
    }
    return {
        "id": scan_name(description),
        "status": "suspect" if description["suspect"] else "ok",
        "brain_ml": description["volumes_ml"]["brain"],
        "cortex_ml": description["volumes_ml"]["cortex"],
        **verdicts,
        **times,
        "models": description["models"]["set"],
        "device": description["device"],
        "precision": description["precision"],
        "trtseg": description["versions"]["trtseg"],
        "notice": description["notice"],
    }


def failed_row(scan: Path, exit_code: int, *, keep_names: bool = False) -> dict[str, Any]:
    """Row of a scan that could not be segmented; the id is empty if it cannot even be read."""
    try:
        identity = scan.name if keep_names else _file_digest(scan)[:ID_LENGTH]
    except (OSError, ValueError):
        identity = ""
    return {"id": identity, "status": f"failed with exit code {exit_code}"}


def check_stats_path(path: Path) -> None:
    """Refuse a table of a kind that is not written, before anything runs.

    Raises
    ------
    UsageError
        The name ends neither in .csv nor in .json, or is a folder's.
    """
    if path.suffix.lower() not in STATS_SUFFIXES or os.path.isdir(path):  # noqa: PTH112 (no errors)
        raise UsageError(
            f"--stats {path.name}",
            expected=f"the name of a file ending in {' or '.join(STATS_SUFFIXES)}",
        )


def write_stats(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table across scans, atomically.

    Parameters
    ----------
    path : Path
        .csv, with a column for every key in the order they first appear, or .json, a list.
    rows : sequence of mapping
        From `stats_row` and `failed_row`.

    Raises
    ------
    UsageError
        The suffix is another one.
    OutputError
        The file cannot be written.
    """
    check_stats_path(path)
    if path.suffix.lower() == ".csv":
        text = _as_csv(rows)
    else:
        text = json.dumps(list(rows), indent=2) + "\n"
    with atomic_write(path, action="choose another --stats, or make room") as stream:
        # A file name may hold bytes that are no text; they are shown as escapes.
        stream.write(text.encode("utf-8", "backslashreplace"))


def versions() -> dict[str, str]:
    """Versions of trtseg, Python and the installed packages a result depends on."""
    found = {"trtseg": __version__, "python": platform.python_version()}
    packages = {name: package_version(name) for name in _PACKAGES}
    return found | {name: version for name, version in packages.items() if version is not None}


def _input_digest(source: Path | NDArray[Any], keep_names: bool) -> dict[str, Any]:
    if isinstance(source, np.ndarray):
        # Little-endian, last index fastest: the same on every machine.
        data = np.ascontiguousarray(source, dtype=source.dtype.newbyteorder("<"))
        return {"sha256": sha256_bytes(data.tobytes()), "of": f"array of {data.dtype.name}"}
    try:
        digest = _file_digest(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise InputError(
            f"{source}: {getattr(error, 'strerror', None) or error}",
            expected="a NIfTI file that can be read",
            action="check the name and its permissions",
        ) from error
    return _named({"sha256": digest, "of": "file"}, source, keep_names)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of an .hdr/.img pair, of the header's and then the image's."""
    files = [path]
    other = _PAIR.get(path.suffix.lower())
    if other is not None:
        partner = path.with_suffix(other.upper() if path.suffix.isupper() else other)
        files = [path, partner] if other == ".img" else [partner, path]
    digest = hashlib.sha256()
    for file in files:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait for ever
            raise OSError("a folder" if file.is_dir() else "not a regular file")
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _output_digest(path: Path, keep_names: bool) -> dict[str, Any]:
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}",
            expected="the file that was just written, to take its digest",
            action="run it again, with nothing else writing to that folder",
        ) from error
    return _named({"sha256": digest}, path, keep_names)


def _named(entry: dict[str, Any], path: Path, keep_names: bool) -> dict[str, Any]:
    return {**entry, "name": path.name} if keep_names else entry


def _network(engine: Engine | GpuEngine) -> dict[str, Any]:
    manifest = engine.manifest
    return {
        # The part of a checkpoint, not its file name, which is the user's for unpublished ones.
        "checkpoint_sha256": {
            name.rpartition(".")[2]: digest for name, digest in manifest["checkpoint"].items()
        },
        "engine_sha256": dict(manifest["files"]),
        "built_with": dict(manifest["versions"]),
    }


def _option(value: Any, keep_names: bool) -> Any:
    is_path = isinstance(value, os.PathLike) or (
        isinstance(value, str) and any(mark in value for mark in ("/", "\\"))
    )
    if not is_path:
        return value
    return Path(value).name if keep_names else "given"


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    # Lines end in CR LF, as RFC 4180 has it; with another end, a lone CR would not be quoted.
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell no spreadsheet takes for a formula: text that looks like one gets a leading quote."""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return value
