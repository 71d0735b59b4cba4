"""Model sets, the folders that hold both checkpoints: which ones are here, are they intact.

A set is `published` (pinned by hash), `demo` (inside the package), or one a user imported under a
name of their own. How they get here: `trtseg.modelinstall`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from trtseg.architecture import NETWORKS
from trtseg.errors import ModelError, UsageError
from trtseg.files import atomic_write_json, git_blob_sha1, sha256_file
from trtseg.home import checkpoints_root, demo_folder

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

    @property
    def expected(self) -> str:
        """Its size and digest, as messages say what is expected."""
        return f"{self.size} bytes with git blob SHA-1 {self.blob_sha1}"

    def fault(self, path: Path) -> str:
        """What is wrong with the copy of it at `path`; empty if nothing is."""
        try:
            size = path.stat().st_size
            if size != self.size:
                return f"{size} bytes"
            digest = git_blob_sha1(path)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return error.strerror or str(error)
        return "" if digest == self.blob_sha1 else f"git blob SHA-1 {digest}"


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

#: How to get the published weights, as messages say it.
PULL_HELP = (
    "run: trtseg models pull (offline: copy the files over and run: trtseg models import DIR)"
)

_CHECKPOINT_NAMES = tuple(file.name for file in PUBLISHED_FILES)
_RECORD = "record.json"
_RECORD_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
        path = self.folder / config_name(net)
        return path if self.kind == "imported" and is_file(path) else None

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
            raise unreadable(error, self.folder) from error


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
        raise unreadable(error, root) from error
    imported = [name for name in names if _NAME.fullmatch(name) and not _reserved(name)]
    return [model_set(name) for name in (PUBLISHED, DEMO, *imported) if is_present(name)]


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
            return model_set(name)
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
    return _NAME.fullmatch(name) is not None and not _missing(model_set(name))


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


def model_set(name: str) -> ModelSet:
    """The set called `name`, whether it is here or not.

    Parameters
    ----------
    name : str
        A valid name.
    """
    if name == DEMO:
        return ModelSet(DEMO, demo_folder(), "demo", DEMO_NOTICE)
    if name == PUBLISHED:
        return ModelSet(PUBLISHED, checkpoints_root() / PUBLISHED, "published", "")
    return ModelSet(name, checkpoints_root() / name, "imported", IMPORTED_NOTICE)


def check_import_name(name: str | None) -> str:
    """The name for a set that a user imports.

    Raises
    ------
    UsageError
        It is missing, not allowed, or that of a set which is not imported.
    """
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


def config_name(net: str) -> str:
    """Name of the DeepMedic model config of `net` ("bdn" or "cgm")."""
    return f"{net}_model_config.cfg"


def _reserved(name: str) -> bool:
    # Regardless of case, as some file systems see names.
    return name.lower() in (PUBLISHED, DEMO)


def _required(models: ModelSet) -> tuple[str, ...]:
    return (*_CHECKPOINT_NAMES, _RECORD) if models.kind == "imported" else _CHECKPOINT_NAMES


def _missing(models: ModelSet) -> list[str]:
    return [name for name in _required(models) if not is_file(models.folder / name)]


def _refuse_absent(name: str) -> None:
    """Raise the error that says how to complete the set `name`, if it is known or half there."""
    models = model_set(name)
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
            action=f"{PULL_HELP}, or name the demo weights with --models demo",
        )
    if here:
        raise ModelError(
            f"model set {name!r} is incomplete, without {', '.join(missing)}",
            expected=f"it in {models.folder}",
            action=f"delete {models.folder} and import the set again",
        )


def _check_published(path: Path, file: PublishedFile) -> FileCheck:
    if fault := file.fault(path):
        return FileCheck(path, False, f"{fault}; expected {file.expected}")
    return FileCheck(path, True, f"git blob SHA-1 {file.blob_sha1}")


def _verify_imported(folder: Path) -> list[FileCheck]:
    recorded, fault = read_record(folder)
    checks = [FileCheck(folder / _RECORD, False, fault)] if fault else []
    for name in (*_CHECKPOINT_NAMES, *(config_name(net) for net in NETWORKS)):
        path = folder / name
        if name in _CHECKPOINT_NAMES or name in recorded or is_file(path):
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


# The record of an import, by which it is verified


def write_record(folder: Path, name: str, source: str, digests: dict[str, str]) -> None:
    """Write the record of the imported set `name` into the folder that holds its files.

    Parameters
    ----------
    folder : Path
    name : str
    source : str
        The kind of folder it was imported from.
    digests : dict of str to str
        File name to hex SHA-256.

    Raises
    ------
    OSError
        A file is not there.
    OutputError
        The record cannot be written.
    """
    files = {
        file: {"sha256": digest, "bytes": (folder / file).stat().st_size}
        for file, digest in digests.items()
    }
    record = {"format": _RECORD_FORMAT, "name": name, "source": source, "files": files}
    atomic_write_json(folder / _RECORD, record)


def read_record(folder: Path) -> tuple[dict[str, str], str]:
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


# Files


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False also where that cannot be found out."""
    try:
        return path.is_file()
    except OSError:
        return False


def unreadable(error: OSError, path: Path) -> ModelError:
    """The error to raise where a model's file or folder, `path`, cannot be read."""
    return ModelError(
        f"{error.filename or path}: {error.strerror or error}",
        expected="a file or folder that can be read",
        action="check the path and its permissions",
    )
