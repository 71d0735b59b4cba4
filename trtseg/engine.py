"""A built network on disk: what files it has, what it was built from, and whether it is intact.

This is where the build step and the runtime meet. ``<root>/<models>/<net>/`` holds

- ``weights.npz``: folded weights, the one source of every graph form;
- ``normal.onnx``, ``sub.onnx``, ``fc.onnx``: the parts the CPU runs (see `trtseg.build.parts`);
- ``manifest.json``: what all of it was made from, and the SHA-256 of each file.
"""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtseg import __version__
from trtseg.architecture import NETWORKS, NetworkSpec
from trtseg.errors import EngineError, EngineMissingError, ModelError, OutputError
from trtseg.files import (
    atomic_write,
    atomic_write_json,
    make_folder,
    sha256_bytes,
    sha256_file,
)

#: Layout of the engine folder and meaning of the manifest; a change makes older builds stale.
SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.npz"
NORMAL_PART = "normal.onnx"
SUB_PART = "sub.onnx"
FC_PART = "fc.onnx"


@dataclass(frozen=True)
class Engine:
    """An intact built network.

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

    @property
    def notice(self) -> str:
        """What a person must be told of these weights; empty for the published ones."""
        return str(self.manifest.get("notice", ""))

    def file(self, name: str) -> Path:
        """Path of one of the engine's files."""
        return self.folder / name


def build_command(models: str) -> str:
    """The command that builds a model set."""
    return f"trtseg engines build --models {models}"


def engine_folder(root: Path, models: str, net: str) -> Path:
    """Where the engine of one network lies."""
    return root / models / net


def is_built(root: Path, models: str) -> bool:
    """Whether both networks of a model set have a manifest; `load_engine` says if it is sound."""
    return all((engine_folder(root, models, net) / MANIFEST).is_file() for net in NETWORKS)


def built_models(root: Path) -> list[str]:
    """Names of the model sets built under `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(folder.name for folder in root.iterdir() if is_built(root, folder.name))


def load_engine(
    root: Path, models: str, net: str, *, checkpoint: Mapping[str, str] | None = None
) -> Engine:
    """Open a built network and check every byte of it against its manifest.

    Parameters
    ----------
    root : Path
        The engines folder.
    models, net : str
    checkpoint : mapping of str to str, optional
        File name to SHA-256 of the checkpoint as it is now; a build from another one is stale.

    Returns
    -------
    Engine

    Raises
    ------
    EngineMissingError
        Nothing is built there.
    EngineError
        The build is damaged, of another version's layout, or stale.
    """
    folder = engine_folder(root, models, net)
    again = f"build again: {build_command(models)}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineMissingError(
            f"{folder}: nothing is built for {net.upper()} of model set {models!r}",
            expected=f"{MANIFEST} and the files it lists",
            action=f"build it: {build_command(models)}",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(
            f"{folder / MANIFEST}: not readable ({error})",
            expected="the manifest of a built network",
            action=again,
        ) from error
    spec = _check_manifest(folder, manifest, models, net, again)
    for name, digest in manifest["files"].items():
        path = folder / name
        try:
            found = sha256_file(path)
        except OSError as error:
            raise EngineError(
                f"{path}: {error.strerror or error}",
                expected="a readable file listed in the manifest",
                action=again,
            ) from error
        if found != digest:
            raise EngineError(
                f"{path}: SHA-256 {found[:16]}...",
                expected=f"{str(digest)[:16]}... by the manifest; it is damaged or foreign",
                action=again,
            )
    if checkpoint is not None and dict(checkpoint) != manifest["checkpoint"]:
        raise EngineError(
            f"{folder}: built from another checkpoint than model set {models!r} holds now",
            expected="a build of the present checkpoint",
            action=again,
        )
    return Engine(folder, models, net, spec, manifest)


def _check_manifest(folder: Path, manifest: Any, models: str, net: str, again: str) -> NetworkSpec:
    def refuse(what: str, expected: str) -> EngineError:
        return EngineError(f"{folder / MANIFEST}: {what}", expected=expected, action=again)

    if not isinstance(manifest, dict):
        raise refuse("not a JSON object", "the manifest of a built network")
    if manifest.get("schema") != SCHEMA:
        raise refuse(f"layout {manifest.get('schema')!r}", f"layout {SCHEMA} (this version's)")
    for name, value in (("models", models), ("network", net)):
        if manifest.get(name) != value:
            raise refuse(f"{name} {manifest.get(name)!r}", repr(value))
    files, checkpoint = manifest.get("files"), manifest.get("checkpoint")
    if not isinstance(files, dict) or not {WEIGHTS, NORMAL_PART, FC_PART} <= set(files):
        raise refuse(
            "files are not listed", f"{WEIGHTS}, {NORMAL_PART} and {FC_PART} with their SHA-256"
        )
    if any(Path(name).name != name for name in files) or not isinstance(checkpoint, dict):
        raise refuse("file names with a folder, or no checkpoint", "plain names and SHA-256")
    try:
        spec = NetworkSpec.from_dict(manifest["architecture"])
    except (KeyError, ModelError) as error:
        raise refuse(f"architecture not readable ({error})", "an architecture") from error
    if len(spec.pathways) > 1 and SUB_PART not in files:
        raise refuse(f"{SUB_PART} is not listed", "a graph of the subsampled pathways")
    if manifest.get("sha256") != seal(manifest):
        raise refuse("changed after it was written", "the manifest as the build wrote it")
    return spec


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all the manifest says, so that no flipped byte of it passes."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return sha256_bytes(json.dumps(rest, sort_keys=True).encode())


def write_engine(
    root: Path,
    models: str,
    net: str,
    *,
    spec: NetworkSpec,
    files: Mapping[str, bytes],
    checkpoint: Mapping[str, str],
    notice: str,
    proof: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Engine:
    """Put a built network in place, whole, replacing an older one.

    Parameters
    ----------
    root : Path
        The engines folder; made if missing.
    models, net : str
    spec : NetworkSpec
    files : mapping of str to bytes
        Plain file name to content.
    checkpoint : mapping of str to str
        Checkpoint file name to SHA-256.
    notice : str
        What results must say of these weights; may be empty.
    proof : mapping
        How the build was compared with the checkpoint and what came out.
    versions : mapping of str to str
        Library to version.

    Returns
    -------
    Engine

    Raises
    ------
    OutputError
        The folder cannot be written; the older build, if any, stays.
    """
    final = engine_folder(root, models, net)
    make_folder(final.parent)
    # Named before it is made, so that an interrupt in between still finds what to remove.
    staging = final.with_name(f".{net}.{secrets.token_hex(8)}")
    try:
        staging.mkdir()
        for name, content in files.items():
            with atomic_write(staging / name) as stream:
                stream.write(content)
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "models": models,
            "network": net,
            "notice": notice,
            "architecture": spec.to_dict(),
            "tile": spec.tile,
            "files": {name: sha256_bytes(content) for name, content in files.items()},
            "checkpoint": dict(checkpoint),
            "proof": dict(proof),
            "versions": {
                "trtseg": __version__,
                "python": platform.python_version(),
                **versions,
            },
        }
        manifest = json.loads(json.dumps(manifest))
        manifest["sha256"] = seal(manifest)
        atomic_write_json(staging / MANIFEST, manifest)
        swap_folder(staging, final)
    except OSError as error:
        raise unwritable(final, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Engine(final, models, net, spec, manifest)


def swap_folder(staging: Path, final: Path) -> None:
    """Put `staging` in the place of `final`; on any failure the older folder is put back."""
    # A folder cannot be renamed over a filled one, so the old build steps aside first; a process
    # that looks in between finds nothing built, never half a build.
    aside = staging.with_name(f"{staging.name}.old")
    try:
        if final.exists():
            final.rename(aside)
        staging.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    finally:  # an interrupt in between must not cost the older build, nor leave it aside
        if aside.exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(aside, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to raise where a build cannot be written."""
    return OutputError(
        f"{path}: {error.strerror or error}",
        expected="a folder that can be written, with room on the disk",
        action="choose another with --out, or set TRTSEG_HOME",
    )


@contextlib.contextmanager
def build_lock(root: Path, models: str) -> Iterator[None]:
    """Hold the only right to build a model set; others wait, then find it built.

    Raises
    ------
    OutputError
        The engines folder cannot be written.
    """
    import fcntl

    make_folder(root)
    try:
        stream = (root / f".{models}.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise unwritable(root, error) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
