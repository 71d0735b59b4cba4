"""A network's folder that is written whole, and whose every byte is checked before it is used.

Its ``manifest.json`` says what the files were made from and the SHA-256 of each, and is sealed by
the SHA-256 of all it says. Built networks (`trtseg.engine`) and networks compiled for a GPU
(`trtseg.gpu_engine`) are two kinds of it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from trtseg.architecture import NetworkSpec
from trtseg.errors import EngineError, EngineMissingError, ModelError, OutputError
from trtseg.files import atomic_write, atomic_write_json, json_seal, make_folder, sha256_bytes

MANIFEST = "manifest.json"

_Sealed = TypeVar("_Sealed", bound="SealedNetwork")


@dataclass(frozen=True)
class Kind:
    """In what the kinds of networks on disk differ."""

    #: Layout of the folder and meaning of the manifest; a change makes older ones stale.
    schema: int
    #: For messages: "a built network", "built", "build".
    noun: str
    made: str
    verb: str
    #: Gives the command that makes a model set.
    command: Callable[[str], str]
    #: What the manifest must say besides the files, by its type; no list may be empty.
    facts: Mapping[type, tuple[str, ...]]
    #: Gives the files that a manifest with such facts must list.
    needed: Callable[[Mapping[str, Any], NetworkSpec], set[str]]
    #: Reads a file of a folder, or raises OSError, or EngineError with the action it is given.
    fetch: Callable[[Path, str, str], bytes]
    #: What to raise where there is none.
    missing: type[EngineMissingError] = EngineMissingError
    #: Permissions that the folder and its files never have, whatever the umask.
    forbidden: int = 0
    #: Folder inside that a newer network takes over from the older one.
    kept: str | None = None

    def again(self, models: str) -> str:
        """What to do where one is unfit."""
        return f"{self.verb} again: {self.command(models)}"

    def refusal(self, path: Path, models: str, found: str, expected: str) -> EngineError:
        """What to raise where one is unfit."""
        return EngineError(f"{path}: {found}", expected=expected, action=self.again(models))


@dataclass(frozen=True)
class SealedNetwork:
    """An intact network on disk.

    Attributes
    ----------
    folder : Path
    models, net : str
        Name of the model set, and ``bdn`` or ``cgm``.
    spec : NetworkSpec
    manifest : mapping
        The whole manifest, for reports.
    """

    folder: Path
    models: str
    net: str
    spec: NetworkSpec
    manifest: Mapping[str, Any]

    kind: ClassVar[Kind]

    @property
    def notice(self) -> str:
        """What a person must be told of these weights; empty for the published ones."""
        return str(self.manifest.get("notice", ""))

    def refusal(self, found: str, expected: str, name: str = "", hint: str = "") -> EngineError:
        """What to raise if it, or the file `name` of it, is unfit."""
        action = self.kind.again(self.models) + hint
        return EngineError(f"{self.folder / name}: {found}", expected=expected, action=action)

    def read(self, name: str) -> bytes:
        """Content of one of the files the manifest lists, checked as it is read.

        What is executed must come from here: the bytes returned are the very bytes checked.

        Raises
        ------
        EngineError
            The file is missing, damaged, or someone else could have changed it.
        """
        digests = self.manifest["files"]
        if name not in digests:
            raise self.refusal("not listed in the manifest", ", ".join(sorted(digests)), name)
        try:
            content = self.kind.fetch(self.folder, name, self.kind.again(self.models))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = str(getattr(error, "strerror", None) or error)
            raise self.refusal(reason, "a readable file listed in the manifest", name) from error
        found = sha256_bytes(content)
        if found != digests[name]:
            expected = f"{str(digests[name])[:16]}... by the manifest; it is damaged or foreign"
            raise self.refusal(f"SHA-256 {found[:16]}...", expected, name)
        return content

    @classmethod
    def open(cls: type[_Sealed], folder: Path, models: str, net: str) -> _Sealed:
        """Open a folder and check every byte of it; raises `Kind.missing` or EngineError."""
        kind = cls.kind
        try:
            manifest = json.loads(kind.fetch(folder, MANIFEST, kind.again(models)))
        except FileNotFoundError:
            raise kind.missing(
                f"{folder}: nothing is {kind.made} for {net.upper()} of model set {models!r}",
                expected=f"{MANIFEST} and the files it lists",
                action=f"{kind.verb} it: {kind.command(models)}",
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            found, expected = f"not readable ({error})", f"the manifest of {kind.noun}"
            raise kind.refusal(folder / MANIFEST, models, found, expected) from error
        spec = _check_manifest(kind, folder, manifest, models, net)
        network = cls(folder, models, net, spec, manifest)
        for name in manifest["files"]:
            network.read(name)
        return network

    def write(self: _Sealed, files: Mapping[str, bytes]) -> _Sealed:
        """Put it in place with these files, whole, and its facts completed to a sealed manifest.

        Raises OutputError where that cannot be written; the older network, if any, stays.
        """
        make_folder(self.folder.parent)
        # Named before it is made, so that an interrupt in between still finds what to remove.
        staging = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(8)}")
        forbidden = self.kind.forbidden
        try:
            staging.mkdir(0o777 & ~forbidden)
            for name, content in files.items():
                with atomic_write(staging / name) as stream:
                    stream.write(content)
            manifest: dict[str, Any] = {
                **self.manifest,
                "schema": self.kind.schema,
                "models": self.models,
                "network": self.net,
                "architecture": self.spec.to_dict(),
                "tile": self.spec.tile,
                "files": {name: sha256_bytes(content) for name, content in files.items()},
            }
            manifest = json.loads(json.dumps(manifest))
            manifest["sha256"] = _seal(manifest)
            atomic_write_json(staging / MANIFEST, manifest)
            for path in staging.iterdir() if forbidden else ():
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~forbidden)
            _swap(staging, self.folder, self.kind.kept)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return replace(self, manifest=manifest)


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Raise EngineError where it cannot be seen what is built, inside or in what it decorates."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"{error.filename}: {error.strerror or error}",
            expected="a folder of built networks that can be read",
            action="choose another with --engines, or set TRTSEG_HOME",
        ) from error


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to raise where a build cannot be written."""
    return OutputError(
        f"{path}: {error.strerror or error}",
        expected="a folder that can be written, with room on the disk",
        action="choose another with --out, or set TRTSEG_HOME",
    )


def _check_manifest(kind: Kind, folder: Path, manifest: Any, models: str, net: str) -> NetworkSpec:
    refuse = partial(kind.refusal, folder / MANIFEST, models)
    if not isinstance(manifest, dict):
        raise refuse("not a JSON object", f"the manifest of {kind.noun}")
    if manifest.get("schema") != kind.schema:
        raise refuse(f"layout {manifest.get('schema')!r}", f"layout {kind.schema} (this version's)")
    for name, value in (("models", models), ("network", net)):
        if manifest.get(name) != value:
            raise refuse(f"{name} {manifest.get(name)!r}", repr(value))
    for form, name in ((form, name) for form, names in kind.facts.items() for name in names):
        fact = manifest.get(name)
        if not isinstance(fact, form) or fact == []:
            raise refuse(f"{name} {fact!r}", f"a {form.__name__}" + ", not empty" * (form is list))
    files = manifest.get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise refuse("files are not listed, or file names with a folder", "plain names and SHA-256")
    try:
        spec = NetworkSpec.from_dict(manifest["architecture"])
    except (KeyError, ModelError) as error:
        raise refuse(f"architecture not readable ({error})", "an architecture") from error
    needed = kind.needed(manifest, spec)
    if not needed <= set(files):
        lacking = ", ".join(sorted(needed - set(files)))
        raise refuse(f"files are not listed: {lacking}", ", ".join(sorted(needed)))
    if manifest.get("sha256") != _seal(manifest):
        raise refuse("changed after it was written", "the manifest as the build wrote it")
    return spec


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all the manifest says, so that no flipped byte of it passes."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return json_seal(rest)


def _swap(staging: Path, final: Path, kept: str | None) -> None:
    """Put `staging` in the place of `final`; on any failure the older folder is put back."""
    # A folder cannot be renamed over a filled one, so the old one steps aside first; a process
    # that looks in between finds nothing built, never half a build. What is kept moves just then:
    # whichever of the two is in place has it.
    aside = staging.with_name(f"{staging.name}.old")
    try:
        if final.exists():
            final.rename(aside)
        if kept and (aside / kept).exists():
            (aside / kept).rename(staging / kept)
        staging.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    finally:  # an interrupt in between must not cost the older build, nor leave it aside
        if aside.exists() and not final.exists():
            aside.rename(final)
            if kept and (staging / kept).exists():
                (staging / kept).rename(final / kept)
        shutil.rmtree(aside, ignore_errors=True)
