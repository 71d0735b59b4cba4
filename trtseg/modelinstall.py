"""How model sets get here: the published one is downloaded or copied, others are imported.

`pull` is the only function of trtseg that uses the network, and this is the only module that
imports pooch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from trtseg.architecture import NETWORKS
from trtseg.errors import DownloadError, ModelError, OutputError, UsageError
from trtseg.files import make_folder, sha256_file
from trtseg.home import checkpoints_root
from trtseg.locks import locked
from trtseg.modelconfig import read_config
from trtseg.models import (
    PUBLISHED,
    PUBLISHED_COMMIT,
    PUBLISHED_FILES,
    PULL_HELP,
    ModelSet,
    PublishedFile,
    check_import_name,
    config_name,
    is_file,
    model_set,
    read_record,
    unreadable,
    verify,
    write_record,
)

#: Folder of the repository of the published weights that holds both networks.
_SYSTEM = "fetal-segmentation-system"

#: Where `pull` looks unless it is given a mirror.
PUBLISHED_URL = (
    f"https://raw.githubusercontent.com/afetit/fetal-mri-segmentation/{PUBLISHED_COMMIT}/{_SYSTEM}"
)

_CHUNK = 1 << 16

# To connect, and between two reads: a hospital's proxy may scan a whole file before it passes on
# the first byte.
_TIMEOUT_S = 60.0

#: Called with a file's name, the bytes of it received so far, and its size in bytes.
Progress = Callable[[str, int, int], None]

#: Called with one line a person may want to read while a function works.
Report = Callable[[str], None]


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
        if fault := file.fault(target):
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
        return _import_unpublished(source, check_import_name(name), config, report)
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
        if fault := file.fault(target):
            raise ModelError(
                f"{place}: {fault}",
                expected=file.expected,
                action="copy the published file again, or import weights of your own with "
                "--unpublished --name NAME",
            )

    return _install_published(files, obtain, report)


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


# The published set


def _install_published(
    files: tuple[PublishedFile, ...],
    obtain: Callable[[PublishedFile, Path], None],
    report: Report | None,
) -> ModelSet:
    """Bring the published set to a state that verifies.

    `obtain` writes one file to the path it is given, and raises unless that is the pinned one.
    """
    models = model_set(PUBLISHED)

    def wanted() -> list[PublishedFile]:
        return [file for file in files if file.fault(models.folder / file.name)]

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
        expected=file.expected,
        action=f"to try again, {PULL_HELP}",
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
        layout: [path for path in paths if not is_file(layout.place(path))] for layout in layouts
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
    models = model_set(name)
    if source.resolve() == models.folder.resolve():
        raise ModelError(
            f"{source} is the place the set {name!r} is to be stored in",
            expected="a folder outside of trtseg's own",
            action="move it elsewhere, then import it",
        )
    layout = _find_layout(source, tuple(file.path for file in PUBLISHED_FILES))
    sources = _unpublished_sources(layout, config)
    for net in NETWORKS:
        if place := sources.get(config_name(net)):
            read_config(place)
    with _alone(name, report), _staging(name) as staged:
        for target, place in sources.items():
            _write(staged / target, _chunks(place))
        with _disk_errors(staged):
            digests = {target: sha256_file(staged / target) for target in sources}
            kind = "plain files" if layout.flat else "published layout"
            write_record(staged, name, kind, digests)
        with _disk_errors(models.folder):
            added = _rename_folder(staged, models.folder)
        if not added:
            _check_same(models, digests)
            _say(report, f"the same weights are already in {models.folder} and verify")
    return models


def _unpublished_sources(layout: _Layout, config: Path | None) -> dict[str, Path]:
    """Stored name to source file."""
    sources = {file.name: layout.place(file.path) for file in PUBLISHED_FILES}
    for net in NETWORKS:
        stored = config_name(net)
        place = config or layout.place(f"{net}/architecture/{stored}")
        if config is not None or is_file(place):
            sources[stored] = place
    return sources


def _check_same(models: ModelSet, digests: dict[str, str]) -> None:
    recorded, _ = read_record(models.folder)
    if recorded != digests or not all(check.ok for check in verify(models)):
        raise ModelError(
            f"{models.folder} holds another or a damaged set",
            expected="the weights that are being imported, or nothing",
            action=f"choose another --name, or delete {models.folder} first",
        )


# Files


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise unreadable(error, path) from error


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
