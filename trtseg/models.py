"""Model sets, the folders that hold both checkpoints: how they get here, whether they are intact.

A set is `published` (downloaded or copied, pinned by hash), `demo` (inside the package), or one a
user imported under a name of their own. `pull` is the only function of trtseg that uses the
network, and this is the only module that imports pooch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

from trtseg.architecture import NETWORKS
from trtseg.errors import DownloadError, ModelError, OutputError, UsageError
from trtseg.files import atomic_write_json, git_blob_sha1, make_folder, sha256_file
from trtseg.home import checkpoints_root, demo_folder
from trtseg.locks import locked
from trtseg.modelconfig import read_config

PUBLISHED = "published"
DEMO = "demo"

#: Said wherever a result of the demo weights is shown.
DEMO_NOTICE = "demo weights, synthetic, not for research or clinical use"

#: Said wherever a result of an imported set is shown.
IMPORTED_NOTICE = "unpublished weights, imported by the user"

#: Licence of the published weights.
LICENCE = "BSD 3-Clause, Copyright (c) 2020, Ahmed E. Fetit"

#: What to cite when the published weights are used.
CITATION = (
    'Fetit et al., "A deep learning approach to segmentation of the developing cortex in fetal '
    'brain MRI with minimal manual labeling", MIDL 2020, PMLR 121. '
    "DeepMedic: Kamnitsas et al., Medical Image Analysis 36 (2017) 61-78."
)

#: Commit of github.com/afetit/fetal-mri-segmentation that the published files are pinned to.
PUBLISHED_COMMIT = "409a7bf1d71e1bf7f2abc33dcb19bb56d88226ff"

#: Folder of that repository that holds both networks.
_SYSTEM = "fetal-segmentation-system"

#: Where `pull` looks unless it is given a mirror.
PUBLISHED_URL = (
    f"https://raw.githubusercontent.com/afetit/fetal-mri-segmentation/{PUBLISHED_COMMIT}/{_SYSTEM}"
)


@dataclass(frozen=True)
class PublishedFile:
    """One file of the published set.

    Attributes
    ----------
    path : str
        Its place below the repository's ``fetal-segmentation-system/``, with forward slashes.
    blob_sha1 : str
        Hex SHA-1 of git's blob object for it, which the repository's tree lists.
    size : int
        Its length in bytes.
    """

    path: str
    blob_sha1: str
    size: int

    @property
    def name(self) -> str:
        """The file's name, under which it is stored."""
        return PurePosixPath(self.path).name


#: The published checkpoints. The SHA-1 are those of the tree of `PUBLISHED_COMMIT`; the size of a
#: data file is the end of the last tensor its index lists.
PUBLISHED_FILES = (
    PublishedFile(
        "bdn/checkpoint/bdn.model.ckpt.index",
        "e5309211caa0cbe1ebba411c46c790aa414106a0",
        12_557,
    ),
    PublishedFile(
        "bdn/checkpoint/bdn.model.ckpt.data-00000-of-00001",
        "fdb5b97f44f56e2f4d7a7c5c10505cfc7e49386c",
        24_781_072,
    ),
    PublishedFile(
        "cgm/checkpoint/cgm.model.ckpt.index",
        "f40f58a11816f5ddecd0dd879a5175d3e48bd3fb",
        12_557,
    ),
    PublishedFile(
        "cgm/checkpoint/cgm.model.ckpt.data-00000-of-00001",
        "9945dcdc2aeb1d5467e3f0c82696fd903e29e029",
        24_781_072,
    ),
)

#: Name to hex SHA-256 of the demo checkpoints that this version of trtseg ships.
DEMO_FILES = {
    "bdn.model.ckpt.index": "c4b6cf308b3f76c55e95334ecf86315d005c1207cb38054f8bde93c5a54c3d8b",
    "bdn.model.ckpt.data-00000-of-00001": (
        "9b274ea5a8a0354f0b5487e1d423c142ea820749e5741c470dc070997cb82378"
    ),
    "cgm.model.ckpt.index": "838397a812ae04aec8bf7dc1da00f42df5f2e1f6f1e709b06616ffa38713608f",
    "cgm.model.ckpt.data-00000-of-00001": (
        "5aaf2d30b8694996ae1ac75129e5012a9a135116614bfed1bfa10005b65ba6a6"
    ),
}

_CHECKPOINT_NAMES = tuple(file.name for file in PUBLISHED_FILES)
_CONFIG_NAMES = tuple(f"{net}_model_config.cfg" for net in NETWORKS)
_RECORD = "record.json"
_RECORD_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHUNK = 1 << 16

# To connect, and between two reads: a hospital's proxy may scan a whole file before it passes on
# the first byte.
_TIMEOUT_S = 60.0

_PULL_HELP = (
    "run: trtseg models pull (offline: copy the files over and run: trtseg models import DIR)"
)

#: Called with a file's name, the bytes of it received so far, and its size in bytes.
Progress = Callable[[str, int, int], None]

#: Called with one line a person may want to read while a function works.
Report = Callable[[str], None]


@dataclass(frozen=True)
class ModelSet:
    """A folder with the checkpoints of both networks.

    Attributes
    ----------
    name : str
        What ``--models`` calls it.
    folder : Path
    kind : {"published", "demo", "imported"}
    notice : str
        What to say beside every result of these weights; empty for the published ones.
    """

    name: str
    folder: Path
    kind: Literal["published", "demo", "imported"]
    notice: str

    def checkpoint(self, net: str) -> Path:
        """Prefix of the checkpoint of `net` ("bdn" or "cgm"): its files add a suffix to it."""
        return self.folder / f"{net}.model.ckpt"

    def config(self, net: str) -> Path | None:
        """The stored DeepMedic model config of `net`; None where the published one applies.

        Only imported sets store configs: a file dropped into another set means nothing.
        """
        path = self.folder / f"{net}_model_config.cfg"
        return path if self.kind == "imported" and _is_file(path) else None

    def files(self) -> tuple[Path, ...]:
        """The four checkpoint files, then the configs that are stored."""
        configs = (self.config(net) for net in NETWORKS)
        return (
            *(self.folder / name for name in _CHECKPOINT_NAMES),
            *(path for path in configs if path is not None),
        )

    def digests(self, net: str) -> dict[str, str]:
        """What a build of `net` depends on: file name to hex SHA-256, as the files are now.

        Its two checkpoint files and, where one is stored, its config.

        Raises
        ------
        ModelError
            A file is missing or cannot be read.
        """
        paths = [path for path in self.files() if path.name.startswith((f"{net}.", f"{net}_"))]
        try:
            return {path.name: sha256_file(path) for path in paths}
        except OSError as error:
            raise _unreadable(error, self.folder) from error


@dataclass(frozen=True)
class FileCheck:
    """What became of one file of a set.

    Attributes
    ----------
    path : Path
    ok : bool
        It is there and its content is the expected one.
    detail : str
        The digest found; where `ok` is False, what is wrong and what was expected.
    """

    path: Path
    ok: bool
    detail: str


def list_models() -> list[ModelSet]:
    """The model sets that can be used here: published, demo, then imported ones by name.

    A set counts once it is complete; nothing is hashed.

    Raises
    ------
    ModelError
        The folder of checkpoints cannot be read.
    """
    root = checkpoints_root()
    try:
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise _unreadable(error, root) from error
    imported = [name for name in names if _NAME.fullmatch(name) and not _reserved(name)]
    return [_model(name) for name in (PUBLISHED, DEMO, *imported) if is_present(name)]


def find_models(name: str | None = None) -> ModelSet:
    """The model set called `name`; the published one for None.

    The demo set is never a default: who wants it names it.

    Raises
    ------
    ModelError
        It is not here, incomplete, or unknown; the message says how to get it.
    """
    if name is None:
        name = PUBLISHED
    if _NAME.fullmatch(name):
        if is_present(name):
            return _model(name)
        _refuse_absent(name)
    known = ", ".join(models.name for models in list_models())
    raise ModelError(
        f"no model set is called {name!r}",
        expected=f"one of: {known}",
        action="import it: trtseg models import DIR --unpublished --name NAME",
    )


def is_present(name: str = PUBLISHED) -> bool:
    """Whether all files of the set called `name` are there. Nothing is hashed.

    Parameters
    ----------
    name : str
        A valid name; others are never present.
    """
    return _NAME.fullmatch(name) is not None and not _missing(_model(name))


def verify(models: ModelSet, files: tuple[PublishedFile, ...] = PUBLISHED_FILES) -> list[FileCheck]:
    """Hash every file of a set again.

    Published files are compared with their git blob SHA-1, the demo with the SHA-256 this version
    ships, an imported set with the SHA-256 recorded when it was imported.

    Parameters
    ----------
    models : ModelSet
    files : tuple of PublishedFile
        What the published set consists of.

    Returns
    -------
    list of FileCheck
        One per file, whether it matches or not; no exception for one that does not.
    """
    if models.kind == "published":
        return [_check_published(models.folder / file.name, file) for file in files]
    if models.kind == "demo":
        return [_check_sha256(models.folder / name, digest) for name, digest in DEMO_FILES.items()]
    return _verify_imported(models.folder)


def pull(
    *,
    base_url: str = PUBLISHED_URL,
    files: tuple[PublishedFile, ...] = PUBLISHED_FILES,
    progress: Progress | None = None,
    report: Report | None = None,
) -> ModelSet:
    """Download the published weights, verify them, and only then make them visible.

    Files go to a private folder first. A new set appears by one rename of that folder; in a set
    that is damaged or incomplete, the files that do not verify are fetched and replaced, each by
    one rename. A set that verifies is left alone, and the network with it.

    Parameters
    ----------
    base_url : str
        An http or https URL below which the files lie under their `path`: the public repository
        or a mirror of it. The hashes decide what is accepted, not the server.
    files : tuple of PublishedFile
        What the set consists of.
    progress : callable, optional
        Called while a file arrives.
    report : callable, optional
        Called where there was nothing to do, and where another process has to be waited for.

    Raises
    ------
    UsageError
        `base_url` is not a plain http or https URL.
    DownloadError
        A file could not be fetched, or is not the published one.
    OutputError
        The files could not be written.
    """
    _check_url(base_url)
    base_url = base_url.rstrip("/")

    def obtain(file: PublishedFile, target: Path) -> None:
        url = f"{base_url}/{file.path}"
        _download(file, url, target, progress)
        if fault := _fault(target, file):
            raise _download_error(file, url, fault)

    return _install_published(files, obtain, report)


def import_folder(
    source: Path,
    *,
    unpublished: bool = False,
    name: str | None = None,
    config: Path | None = None,
    files: tuple[PublishedFile, ...] = PUBLISHED_FILES,
    report: Report | None = None,
) -> ModelSet:
    """Copy a set of checkpoints from a folder.

    The folder holds either the published layout, ``{net}/checkpoint/{net}.model.ckpt.*`` with
    ``{net}/architecture/{net}_model_config.cfg``, possibly below ``fetal-segmentation-system/``,
    or the plain files ``{net}.model.ckpt.*`` and ``{net}_model_config.cfg``. Configs are optional;
    those of an unpublished set are read before anything is stored.

    Parameters
    ----------
    source : Path
    unpublished : bool
        The weights are not the published ones: store them as `name`, with a record of their
        SHA-256. Otherwise they must verify as the published ones, and are stored as those.
    name : str, optional
        Name of an unpublished set.
    config : Path, optional
        A DeepMedic model config for both networks of an unpublished set; it replaces those found
        in `source`.
    files : tuple of PublishedFile
        What the published set consists of.
    report : callable, optional
        As for `pull`.

    Raises
    ------
    UsageError
        A name that is missing, not allowed, or given for the published set.
    ModelError
        A file is missing, cannot be read, or is not the published one; a config is out of scope;
        or another set has the name already.
    OutputError
        The copies could not be written.
    """
    source = source.expanduser().absolute()
    if unpublished:
        return _import_unpublished(source, _check_import_name(name), config, report)
    if config is not None or name not in (None, PUBLISHED):
        raise UsageError(
            "a name or a config for the published weights",
            expected="neither: their name and architecture are fixed",
            action="add --unpublished to import weights of your own",
        )
    layout = _find_layout(source, tuple(file.path for file in files))

    def obtain(file: PublishedFile, target: Path) -> None:
        place = layout.place(file.path)
        _write(target, _chunks(place))
        if fault := _fault(target, file):
            raise ModelError(
                f"{place}: {fault}",
                expected=_pinned(file),
                action="copy the published file again, or import weights of your own with "
                "--unpublished --name NAME",
            )

    return _install_published(files, obtain, report)


def _model(name: str) -> ModelSet:
    if name == DEMO:
        return ModelSet(DEMO, demo_folder(), "demo", DEMO_NOTICE)
    if name == PUBLISHED:
        return ModelSet(PUBLISHED, checkpoints_root() / PUBLISHED, "published", "")
    return ModelSet(name, checkpoints_root() / name, "imported", IMPORTED_NOTICE)


def _reserved(name: str) -> bool:
    # Regardless of case, as some file systems see names.
    return name.lower() in (PUBLISHED, DEMO)


def _required(models: ModelSet) -> tuple[str, ...]:
    return (*_CHECKPOINT_NAMES, _RECORD) if models.kind == "imported" else _CHECKPOINT_NAMES


def _missing(models: ModelSet) -> list[str]:
    return [name for name in _required(models) if not _is_file(models.folder / name)]


def _refuse_absent(name: str) -> None:
    """Raise the error that says how to complete the set `name`, if it is known or half there."""
    models = _model(name)
    missing = _missing(models)
    here = len(missing) < len(_required(models))
    if models.kind == "demo":
        raise ModelError(
            f"the demo weights of this installation lack {missing[0]}",
            expected=f"{len(_CHECKPOINT_NAMES)} files in {models.folder}",
            action="install trtseg again",
        )
    if models.kind == "published":
        state = f"are incomplete, without {', '.join(missing)}" if here else "are not here"
        raise ModelError(
            f"the published weights {state}",
            expected=f"{', '.join(_CHECKPOINT_NAMES)} in {models.folder}",
            action=f"{_PULL_HELP}, or name the demo weights with --models demo",
        )
    if here:
        raise ModelError(
            f"model set {name!r} is incomplete, without {', '.join(missing)}",
            expected=f"it in {models.folder}",
            action=f"delete {models.folder} and import the set again",
        )


def _check_import_name(name: str | None) -> str:
    if name is None or not _NAME.fullmatch(name):
        raise UsageError(
            "no name for the unpublished weights" if name is None else f"the name {name!r}",
            expected="1 to 64 letters, digits, dots, dashes or underscores, the first a letter or "
            "a digit",
            action="choose one with --name NAME",
        )
    if _reserved(name):
        raise UsageError(
            f"the name {name!r}, which is reserved",
            expected="any other name for unpublished weights",
            action="choose one with --name NAME",
        )
    return name


def _check_url(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        plain = bool(
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.username is None
            and not parts.query
            and not parts.fragment
        )
    except ValueError:
        plain = False
    if not plain:
        # The URL is not repeated: it may hold a password.
        raise UsageError(
            "a base URL that files cannot be fetched from",
            expected="http://HOST/PATH or https://HOST/PATH, without user, query or fragment",
            action="give the URL of the folder that holds bdn/ and cgm/",
        )


# Published files


def _pinned(file: PublishedFile) -> str:
    return f"{file.size} bytes with git blob SHA-1 {file.blob_sha1}"


def _fault(path: Path, file: PublishedFile) -> str:
    """What is wrong with a copy of a published file; empty if nothing is."""
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{size} bytes"
        digest = git_blob_sha1(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or str(error)
    return "" if digest == file.blob_sha1 else f"git blob SHA-1 {digest}"


def _check_published(path: Path, file: PublishedFile) -> FileCheck:
    if fault := _fault(path, file):
        return FileCheck(path, False, f"{fault}; expected {_pinned(file)}")
    return FileCheck(path, True, f"git blob SHA-1 {file.blob_sha1}")


def _install_published(
    files: tuple[PublishedFile, ...],
    obtain: Callable[[PublishedFile, Path], None],
    report: Report | None,
) -> ModelSet:
    """Bring the published set to a state that verifies.

    `obtain` writes one file to the path it is given, and raises unless that is the pinned one.
    """
    models = _model(PUBLISHED)

    def wanted() -> list[PublishedFile]:
        return [file for file in files if _fault(models.folder / file.name, file)]

    # Asked before the lock as well: whoever may only read a shared set needs no lock.
    if wanted():
        with _alone(PUBLISHED, report):
            needed = wanted()
            if needed:
                with _staging(PUBLISHED) as staged:
                    for file in needed:
                        obtain(file, staged / file.name)
                    whole = len(needed) == len(files)
                    _publish(staged, models.folder, [file.name for file in needed], whole)
                return models
    _say(report, f"the published weights are already in {models.folder} and verify")
    return models


def _publish(staged: Path, final: Path, names: list[str], whole: bool) -> None:
    """Move verified files to the set's folder: all by one rename, or one by one into a set.

    Every file is the pinned one, so that a set that is being repaired, or that another process
    completes at the same time, only ever gains good files.
    """
    with _disk_errors(final):
        if whole and _rename_folder(staged, final):
            return
        for name in names:
            os.replace(staged / name, final / name)


def _rename_folder(staged: Path, final: Path) -> bool:
    """Rename a folder; False where `final` is a folder that already holds something."""
    try:
        staged.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


# Download


class _Receiver:
    """The file pooch writes a download to.

    It ends a download that exceeds the pinned size, reports the progress exactly, and tells an
    error of the disk from one of the network, which are both OSError by the time pooch raises.
    """

    def __init__(
        self, stream: BinaryIO, path: Path, file: PublishedFile, url: str, progress: Progress | None
    ) -> None:
        self._stream = stream
        self._path = path
        self._file = file
        self._url = url
        self._progress = progress
        self._received = 0

    def write(self, chunk: bytes) -> int:
        self._received += len(chunk)
        if self._received > self._file.size:
            raise _download_error(self._file, self._url, f"more than {self._file.size} bytes")
        with _disk_errors(self._path):
            self._stream.write(chunk)
        if self._progress is not None:
            self._progress(self._file.name, self._received, self._file.size)
        return len(chunk)

    def flush(self) -> None:
        """Nothing: pooch calls it after every chunk, and the whole file is flushed at its end."""


def _download(file: PublishedFile, url: str, target: Path, progress: Progress | None) -> None:
    from pooch import HTTPDownloader

    responses: list[Any] = []
    downloader = HTTPDownloader(
        chunk_size=_CHUNK,
        timeout=_TIMEOUT_S,
        headers={"Accept-Encoding": "identity"},
        # pooch leaves an interrupted response open, and with it the connection.
        hooks={"response": lambda response, **_: responses.append(response)},
    )
    with _disk_errors(target), target.open("xb") as stream:
        receiver = _Receiver(stream, target, file, url, progress)
        try:
            downloader(url, receiver, None)
        except (OSError, ValueError) as error:
            # requests derives its exceptions from OSError, and a garbled header or redirect is a
            # ValueError.
            raise _download_error(file, url, _reason(error, responses)) from error
        finally:
            for response in responses:
                response.close()
        _sync(stream)


def _reason(error: BaseException, responses: list[Any]) -> str:
    """Why a download failed, in a few words on one line."""
    if responses and responses[-1].status_code >= 400:
        return f"HTTP status {responses[-1].status_code}"
    # requests wraps the system's error, which says best what happened, several times over.
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return " ".join(str(error).split())


def _download_error(file: PublishedFile, url: str, found: str) -> DownloadError:
    return DownloadError(
        f"{file.name} from {url}: {found}",
        expected=_pinned(file),
        action=f"to try again, {_PULL_HELP}",
    )


# Import


@dataclass(frozen=True)
class _Layout:
    """Where a folder keeps the files of a set; `paths` are those of the published layout."""

    base: Path
    flat: bool

    def place(self, path: str) -> Path:
        return self.base / (PurePosixPath(path).name if self.flat else path)


def _find_layout(source: Path, paths: tuple[str, ...]) -> _Layout:
    layouts = (_Layout(source, True), _Layout(source, False), _Layout(source / _SYSTEM, False))
    missing = {
        layout: [path for path in paths if not _is_file(layout.place(path))] for layout in layouts
    }
    whole = [layout for layout in layouts if not missing[layout]]
    if len(whole) > 1:
        raise ModelError(
            f"{source} holds {len(whole)} sets, for instance {whole[0].place(paths[0])} and "
            f"{whole[1].place(paths[0])}",
            expected="one",
            action="give a folder that holds only the set to import",
        )
    if not whole:
        best = min(layouts, key=lambda layout: len(missing[layout]))
        absent = ", ".join(str(best.place(path)) for path in missing[best])
        raise ModelError(
            f"not there: {absent}",
            expected="four checkpoint files, plain ({net}.model.ckpt.*) or as published "
            "({net}/checkpoint/{net}.model.ckpt.*), {net} being bdn and cgm",
            action="give the folder that holds them",
        )
    return whole[0]


def _import_unpublished(
    source: Path, name: str, config: Path | None, report: Report | None
) -> ModelSet:
    models = _model(name)
    if source.resolve() == models.folder.resolve():
        raise ModelError(
            f"{source} is the place the set {name!r} is to be stored in",
            expected="a folder outside of trtseg's own",
            action="move it elsewhere, then import it",
        )
    layout = _find_layout(source, tuple(file.path for file in PUBLISHED_FILES))
    sources = _unpublished_sources(layout, config)
    for stored in _CONFIG_NAMES:
        if stored in sources:
            read_config(sources[stored])
    with _alone(name, report), _staging(name) as staged:
        for target, place in sources.items():
            _write(staged / target, _chunks(place))
        with _disk_errors(staged):
            digests = {target: sha256_file(staged / target) for target in sources}
            record = {
                "format": _RECORD_FORMAT,
                "name": name,
                "source": "plain files" if layout.flat else "published layout",
                "files": {
                    target: {"sha256": digest, "bytes": (staged / target).stat().st_size}
                    for target, digest in digests.items()
                },
            }
        atomic_write_json(staged / _RECORD, record)
        with _disk_errors(models.folder):
            added = _rename_folder(staged, models.folder)
        if not added:
            _check_same(models, digests)
            _say(report, f"the same weights are already in {models.folder} and verify")
    return models


def _unpublished_sources(layout: _Layout, config: Path | None) -> dict[str, Path]:
    """Stored name to source file."""
    sources = {file.name: layout.place(file.path) for file in PUBLISHED_FILES}
    for net, stored in zip(NETWORKS, _CONFIG_NAMES, strict=True):
        place = config or layout.place(f"{net}/architecture/{stored}")
        if config is not None or _is_file(place):
            sources[stored] = place
    return sources


def _check_same(models: ModelSet, digests: dict[str, str]) -> None:
    recorded, _ = _read_record(models.folder)
    if recorded != digests or not all(check.ok for check in verify(models)):
        raise ModelError(
            f"{models.folder} holds another or a damaged set",
            expected="the weights that are being imported, or nothing",
            action=f"choose another --name, or delete {models.folder} first",
        )


def _read_record(folder: Path) -> tuple[dict[str, str], str]:
    """File name to hex SHA-256, as recorded at import; empty, with the reason, if unreadable."""
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        if record["format"] != _RECORD_FORMAT:
            return {}, f"format {record['format']!r}; expected {_RECORD_FORMAT}"
        return {str(name): str(entry["sha256"]) for name, entry in record["files"].items()}, ""
    except OSError as error:
        return {}, error.strerror or str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return {}, f"not a record of an import ({error!r})"


def _verify_imported(folder: Path) -> list[FileCheck]:
    recorded, fault = _read_record(folder)
    checks = [FileCheck(folder / _RECORD, False, fault)] if fault else []
    for name in (*_CHECKPOINT_NAMES, *_CONFIG_NAMES):
        path = folder / name
        if name in _CHECKPOINT_NAMES or name in recorded or _is_file(path):
            checks.append(_check_sha256(path, recorded.get(name)))
    return checks


def _check_sha256(path: Path, expected: str | None) -> FileCheck:
    try:
        digest = sha256_file(path)
    except FileNotFoundError:
        return FileCheck(path, False, "missing")
    except OSError as error:
        return FileCheck(path, False, error.strerror or str(error))
    if expected is None:
        return FileCheck(path, False, f"SHA-256 {digest}; expected no such file: not recorded")
    if digest != expected:
        return FileCheck(path, False, f"SHA-256 {digest}; expected {expected}")
    return FileCheck(path, True, f"SHA-256 {digest}")


# Files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _unreadable(error, path) from error


def _unreadable(error: OSError, path: Path) -> ModelError:
    return ModelError(
        f"{error.filename or path}: {error.strerror or error}",
        expected="a file or folder that can be read",
        action="check the path and its permissions",
    )


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with _disk_errors(path), path.open("xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        _sync(stream)


def _sync(stream: BinaryIO) -> None:
    # Before the rename that makes the file visible, or a power cut could leave an empty one there.
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}",
            expected="a folder that can be written, with room on the disk",
            action="make room, or set TRTSEG_HOME to another folder",
        ) from error


# Staging. Names of sets hold no "~" and do not begin with a dot, so that none of the names below
# can be that of a set, or belong to two sets.


@contextlib.contextmanager
def _alone(name: str, report: Report | None) -> Iterator[None]:
    """Wait until no other process adds the set `name`, then remove what dead ones left."""
    root = checkpoints_root()
    make_folder(root)
    with contextlib.ExitStack() as stack:
        with _disk_errors(root):
            held = stack.enter_context(
                locked(
                    root / f".{name}~lock",
                    lambda: _say(report, f"waiting for another trtseg that is adding {name!r}"),
                )
            )
        # Where the file system has no locks, nothing is visible half-way either: the renames see
        # to that. Staging folders are made under this lock only, so that these have no owner left.
        for leftover in root.glob(f".{name}~*.part") if held else ():
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def _staging(name: str) -> Iterator[Path]:
    """A new folder beside the final ones, to be renamed; removed with all that is left in it."""
    root = checkpoints_root()
    with _disk_errors(root):
        private = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}~", suffix=".part"))
    try:
        # The folder to be renamed is one inside: mkdtemp's own is closed to everyone else.
        staged = private / "set"
        with _disk_errors(staged):
            staged.mkdir()
        yield staged
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _say(report: Report | None, line: str) -> None:
    if report is not None:
        report(line)
