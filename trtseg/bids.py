"""BIDS datasets: their T2w images, and how the derivatives are named and described.

Names and fields follow the BIDS specification, "Derivatives", version `BIDS_VERSION`
(https://bids-specification.readthedocs.io).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtseg import __version__
from trtseg.errors import InputError, OutputError, UsageError
from trtseg.files import atomic_write, atomic_write_json, make_folder
from trtseg.logs import LOG

if TYPE_CHECKING:
    from trtseg.batch import Outcome
    from trtseg.output import OutputPaths

#: Version of the specification that is followed.
BIDS_VERSION = "1.10.1"

DESCRIPTION = "dataset_description.json"

#: What the source dataset is called in BIDS URIs (``bids:raw:sub-01/anat/...``).
SOURCE = "raw"

#: Files that are written beside the derivatives and that BIDS has no names for.
IGNORED = ("*_trtseg.json", "*_report.html", "*_report.png")

#: Entities that images are chosen by, and what the options for their labels are named after:
#: ``--participant-label`` and so on.
KINDS = {
    "sub": "participant",
    "ses": "session",
    "acq": "acquisition",
    "rec": "reconstruction",
    "run": "run",
}

#: What can be done where a file of the dataset cannot be written.
_ELSEWHERE = "choose another OUT_DIR, or make room"

_LABEL = "[0-9A-Za-z+]+"
_SUBJECT = re.compile(f"sub-({_LABEL})")
_SESSION = re.compile(f"ses-({_LABEL})")
_T2W = re.compile(rf"(sub-{_LABEL}(?:_[a-z]+-{_LABEL})*)_T2w\.nii(?:\.gz)?")
_DOI = re.compile(r"(?:doi:|https?://(?:dx\.)?doi\.org/)?(10\.[0-9]{4,9}/[!-~]+)", re.IGNORECASE)

_README = """\
# Brain and cortex of fetal T2w scans, by trtseg

BIDS derivatives. Beside each other, for every T2w image of the source dataset:

- `*_label-brain_mask.nii.gz`: brain, 1 inside, 0 outside;
- `*_label-CGM_mask.nii.gz`: cortical grey matter, 1 inside, 0 outside;
- `*_dseg.nii.gz`: both in one, with the labels of `dseg.tsv`;
- `*_trtseg.json`: what they were made of, digests, volumes and checks.

All maps are on the grid of the image they were made from.
"""


# What may be written where


def check_out_dir(bids_dir: Path, out_dir: Path) -> None:
    """Refuse, by a `UsageError`, a folder that holds, or is, somebody else's dataset."""
    inside = _inside(bids_dir, out_dir)
    if inside is not None and inside.parts[:1] != ("derivatives",):
        raise UsageError(
            f"OUT_DIR {out_dir} is {'BIDS_DIR' if not inside.parts else 'a part of BIDS_DIR'}",
            expected="a folder outside of the source dataset, or below its derivatives folder",
            action=f"write to {bids_dir / 'derivatives' / 'trtseg'}",
        )
    if os.path.lexists(out_dir / DESCRIPTION) and not _is_ours(out_dir):
        raise UsageError(
            f"OUT_DIR {out_dir} holds a dataset that trtseg did not make",
            expected="a new or empty folder, or derivatives of trtseg",
            action="choose another OUT_DIR",
        )


def check_log_file(bids_dir: Path, out_dir: Path, log_file: Path) -> None:
    """Refuse, by a `UsageError`, a log that would make either dataset invalid."""
    inside = _inside(bids_dir, log_file)
    in_source = inside is not None and inside.parts[:1] != ("derivatives",)
    if in_source or _inside(out_dir, log_file) is not None:
        raise UsageError(
            f"--log-file {log_file} is in {'BIDS_DIR' if in_source else 'OUT_DIR'}",
            expected="a file outside of both datasets, for BIDS has no name for it",
            action="write the log elsewhere",
        )


def _is_ours(out_dir: Path) -> bool:
    try:
        makers = read_description(out_dir).get("GeneratedBy")
    except InputError:
        return False
    return isinstance(makers, list) and any(
        isinstance(maker, dict) and maker.get("Name") == "trtseg" for maker in makers
    )


def _inside(folder: Path, path: Path) -> Path | None:
    """Where `path` lies in `folder`; None for outside."""
    try:
        return Path(os.path.realpath(path)).relative_to(os.path.realpath(folder))
    except ValueError:
        return None


# The source dataset


@dataclass(frozen=True)
class T2w:
    """A T2w image of a BIDS dataset.

    Attributes
    ----------
    path : Path
    source : str
        Its place in the dataset, with forward slashes.
    entities : tuple of str
        Such as ``("sub-01", "rec-svr")``, in the order of its name.
    """

    path: Path
    source: str
    entities: tuple[str, ...]

    @property
    def uri(self) -> str:
        """BIDS URI."""
        return f"bids:{SOURCE}:{self.source}"

    def derived(self, ending: str, *, label: str = "") -> str:
        """Name of a file derived from it: all of its entities, and `label`, which precedes desc."""
        entities = list(self.entities)
        if label:
            last = len(entities) - entities[-1].startswith("desc-")
            entities.insert(last, f"label-{label}")
        return "_".join([*entities, ending])


@dataclass(frozen=True)
class Found:
    """T2w images to segment, and what a person should know of the rest, a line each."""

    scans: tuple[T2w, ...]
    notes: tuple[str, ...]


def read_description(bids_dir: Path) -> dict[str, Any]:
    """The dataset_description.json of a dataset.

    Raises
    ------
    InputError
        The file is missing, cannot be read, or holds no JSON object.
    """
    path = bids_dir / DESCRIPTION
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}",
            expected="the file that every BIDS dataset has at its top",
            action="give the top folder of a BIDS dataset",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: no JSON", expected="a JSON object", action="mend the file"
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: JSON, but no object",
            expected='an object such as {"Name": ..., "BIDSVersion": ...}',
            action="mend the file",
        )
    return found


def find_t2w(
    bids_dir: Path,
    participants: Sequence[str],
    sessions: Sequence[str],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Found:
    """Find ``sub-*/[ses-*/]anat/sub-*_T2w.nii[.gz]``.

    Parameters
    ----------
    bids_dir : Path
    participants, sessions : sequence of str
        Labels, with or without ``sub-`` and ``ses-``; none for all.
    labels : mapping of str to sequence of str, optional
        Of an entity, ``"acq"``, ``"rec"`` or ``"run"``, the labels that an image must have one of,
        with or without ``acq-`` and so on; none for all images, also those without the entity.

    Returns
    -------
    Found
        Scans in the order of their names.

    Raises
    ------
    UsageError
        A label is unknown.
    InputError
        A folder cannot be read, there is no T2w image, or one is there twice.
    """
    subjects = _chosen(_matching(bids_dir, _SUBJECT), participants, "sub")
    folders = {
        (subject, session): bids_dir / subject / session / "anat"
        for subject in subjects
        for session in ("", *_matching(bids_dir / subject, _SESSION))
    }
    known = sorted({session for _, session in folders if session})
    asked = _chosen(known, sessions, "ses") if sessions else ["", *known]
    scans: list[T2w] = []
    notes: list[str] = []
    for (subject, session), folder in folders.items():
        if session in asked:
            for path in _children(folder):
                scan = _parse(bids_dir, path, subject, session)
                if scan is not None:
                    scans.append(scan)
                elif path.name.endswith(("_T2w.nii", "_T2w.nii.gz")):
                    notes.append(f"{path}: no BIDS name for its place; passed over")
    scans = _filtered(scans, labels or {})
    if not scans:
        raise InputError(
            f"{bids_dir}: no T2w image of what is asked for",
            expected="sub-LABEL/[ses-LABEL/]anat/sub-LABEL[_...]_T2w.nii[.gz]",
        )
    _check_twins(scans)
    with_scans = {scan.entities[0] for scan in scans}
    notes += [f"{one}: no T2w image to segment" for one in subjects if one not in with_scans]
    return Found(tuple(scans), tuple(notes))


def _filtered(scans: list[T2w], labels: Mapping[str, Sequence[str]]) -> list[T2w]:
    """The scans that have, of each entity with labels, one of them."""
    kept = scans
    for entity, wanted in labels.items():
        prefix = f"{entity}-"
        known = sorted({one for scan in scans for one in scan.entities if one.startswith(prefix)})
        if wanted:
            chosen = set(_chosen(known, wanted, entity))
            kept = [scan for scan in kept if chosen & set(scan.entities)]
    return kept


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    return [child.name for child in _children(folder) if pattern.fullmatch(child.name)]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror or error}",
            expected="a folder that can be read",
            action="check its permissions",
        ) from error


def _chosen(known: list[str], labels: Sequence[str], entity: str) -> list[str]:
    kind, prefix = KINDS[entity], f"{entity}-"
    wanted = {prefix + label.removeprefix(prefix) for label in labels}
    unknown = sorted(wanted - set(known))
    if unknown and not known:
        article = "an" if kind.startswith("a") else "a"
        raise UsageError(
            f"--{kind}-label: no image has {article} {kind} label",
            action="leave it out, or choose images by other labels",
        )
    if unknown:
        here = " ".join(name.removeprefix(prefix) for name in known)
        raise UsageError(
            f"--{kind}-label: {' '.join(unknown)} not in the dataset",
            expected=f"labels out of: {here}",
        )
    return [name for name in known if name in wanted] if wanted else known


def _parse(bids_dir: Path, path: Path, subject: str, session: str) -> T2w | None:
    """The T2w image of that name; None for another file, or a name that belongs elsewhere."""
    match = _T2W.fullmatch(path.name)
    if match is None:
        return None
    entities = tuple(match[1].split("_"))
    keys = [entity.partition("-")[0] for entity in (*entities, "label-")]
    sessions = [entity for entity in entities if entity.startswith("ses-")]
    if entities[0] != subject or sessions != [session][: bool(session)]:
        return None
    if len(set(keys)) < len(keys):
        return None
    return T2w(path, path.relative_to(bids_dir).as_posix(), entities)


def _check_twins(scans: Sequence[T2w]) -> None:
    seen: dict[tuple[str, ...], T2w] = {}
    for scan in scans:
        twin = seen.setdefault(scan.entities, scan)
        if twin is not scan:
            raise InputError(
                f"{twin.path} and {scan.path.name}: the same image twice",
                expected="either .nii or .nii.gz",
                action="remove one of them",
            )


# The derivatives


def write_dataset(bids_dir: Path, out_dir: Path, source: dict[str, Any]) -> None:
    """Write what describes the derivatives as a whole; a README that is there stays as it is.

    Parameters
    ----------
    bids_dir, out_dir : Path
    source : dict
        From `read_description`.

    Raises
    ------
    InputError, OutputError
        A file cannot be read or written.
    """
    from trtseg.sidecar import NOT_A_DEVICE, write_lookup

    make_folder(out_dir)
    atomic_write_json(
        out_dir / DESCRIPTION, describe_dataset(bids_dir, out_dir, source), action=_ELSEWHERE
    )
    write_lookup(out_dir / "dseg.tsv", "dseg")
    if not any(child.name.split(".")[0] == "README" for child in _children(out_dir)):
        with atomic_write(out_dir / "README.md", action=_ELSEWHERE) as stream:
            stream.write(f"{_README}\n{NOT_A_DEVICE}\n".encode())
    ignore = out_dir / ".bidsignore"
    kept = [] if not os.path.lexists(ignore) else _read_lines(ignore)
    with atomic_write(ignore, action=_ELSEWHERE) as stream:
        lines = [*kept, *(line.encode() for line in IGNORED if line.encode() not in kept)]
        stream.write(b"\n".join(lines) + b"\n")


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}",
            expected="a file that can be read, to add lines to it",
            action="check its permissions",
        ) from error


def describe_dataset(bids_dir: Path, out_dir: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The dataset_description.json of the derivatives; it holds no path that leads elsewhere.

    The source dataset is linked by its place where the derivatives lie within it (a chain of
    ``..``); else by its DOI where it gives one; else by the SHA-256 of its description, as the URI
    of RFC 6920, which names it without saying where it is.
    """
    name = _name_of(bids_dir, source)
    inside = _inside(bids_dir, out_dir)
    return {
        "Name": "Brain and cortex of fetal T2w scans",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "trtseg",
                "Version": __version__,
                "Description": "Fetal brain and cortex from 3-D T2w MRI by two networks",
            }
        ],
        "SourceDatasets": [{"URL": name}],
        "DatasetLinks": {SOURCE: name if inside is None else "/".join([".."] * len(inside.parts))},
    }


def _name_of(bids_dir: Path, source: dict[str, Any]) -> str:
    doi = _DOI.fullmatch(str(source.get("DatasetDOI", "")).strip())
    if doi:
        return f"https://doi.org/{doi[1]}"
    try:
        digest = hashlib.sha256((bids_dir / DESCRIPTION).read_bytes()).digest()
    except OSError as error:
        raise InputError(
            f"{bids_dir / DESCRIPTION}: {error.strerror or error}",
            expected="a file that stays there",
        ) from error
    return "ni:///sha-256;" + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def plan(scan: T2w, out_dir: Path, *, report: bool = False) -> OutputPaths:
    """Where the derivatives of a scan go: ``OUT_DIR/sub-LABEL/[ses-LABEL/]anat``."""
    from trtseg.output import OutputPaths

    folder = (out_dir / scan.source).parent
    return OutputPaths(
        cortex=folder / scan.derived("mask.nii.gz", label="CGM"),
        brain=folder / scan.derived("mask.nii.gz", label="brain"),
        cortex_probabilities=None,
        brain_probabilities=None,
        sidecar=folder / scan.derived("trtseg.json"),
        dseg=folder / scan.derived("dseg.nii.gz"),
        report=folder / scan.derived("report.html") if report else None,
        picture=folder / scan.derived("report.png") if report else None,
    )


def write_sidecars(scan: T2w, paths: OutputPaths, notice: str) -> None:
    """Write the BIDS sidecar of each map of a scan.

    `SpatialReference` is the scan itself, for all maps are on its grid; the specification asks for
    it wherever a name has no ``space``.

    Parameters
    ----------
    scan : T2w
    paths : OutputPaths
        From `plan`.
    notice : str
        What must be said of the weights; may be empty.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    said = f" ({notice})" if notice else ""
    kinds = {
        "brain": {"Type": "Brain", "Description": "Brain"},
        "cortex": {"Type": "ROI", "Description": "Cortical grey matter within the brain"},
        "dseg": {"Description": "Brain without its cortical grey matter (1), and that (2)"},
    }
    maps = paths.maps()
    for role, fields in kinds.items():
        name = maps[role].name.removesuffix(".nii.gz") + ".json"
        content = {
            **fields,
            "Description": fields["Description"] + said,
            "Manual": False,
            "Sources": [scan.uri],
            "SpatialReference": scan.uri,
        }
        atomic_write_json(maps[role].with_name(name), content, action=_ELSEWHERE)


def add_sidecars(scan: T2w, outcome: Outcome) -> Outcome:
    """Write the BIDS sidecars of what came of a scan.

    Also for one that was complete before: a run may have ended between the two.

    Returns
    -------
    Outcome
        The same; or, where they cannot be written, a failed one: it must not stop the others.
    """
    if outcome.status == "failed":
        return outcome
    try:
        write_sidecars(scan, outcome.paths, outcome.description["notice"])
    except OutputError as error:
        LOG.error("scan %s: failed, OutputError, exit code %d", outcome.id, error.exit_code)
        return dataclasses.replace(
            outcome, status="failed", exit_code=error.exit_code, error=str(error), description={}
        )
    return outcome
