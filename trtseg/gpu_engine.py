"""A network compiled for a GPU, on disk: its files, their origin, and who may have changed them.

``<root>/<models>/<net>/cuda/``, beside the built network it was compiled from, holds

- ``b1.engine``, ``b4.engine``, ``b16.engine``: the network, each for one fixed batch of tiles;
- ``kernels.ptx`` and, where nvcc compiled them, ``kernels.fatbin``: trtseg's own kernels;
- ``selftest.npz``: the inputs of one tile and its float32 answer;
- ``manifest.json``: what all of it was made from, and the SHA-256 of each file.

An engine is executable code. It is loaded only from a folder and files that belong to the user or
to root and that nobody else can write, and only where its bytes are those the manifest names.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.architecture import NetworkSpec
from trtseg.engine import MANIFEST, engine_folder, seal, swap_folder, unwritable
from trtseg.errors import EngineError, EngineMissingError, ModelError
from trtseg.files import atomic_write, atomic_write_json, make_folder, sha256_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Layout of the folder and meaning of the manifest; a change makes older builds stale.
SCHEMA = 1
FOLDER = "cuda"
SELFTEST = "selftest.npz"
#: Tiles per run that engines are compiled for, unless others are asked for.
BATCHES = (1, 4, 16)
#: Name of the array of a self-test that holds the answer; the others are the inputs.
ANSWER = "logit"

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

#: What the manifest says besides the files; `write_gpu_engine` explains each.
_FACTS = {
    "recipe": dict,
    "checkpoint": dict,
    "library": dict,
    "compute_capabilities": list,
    "batches": list,
    "form": str,
    "precision": str,
    "selftest": dict,
    "notice": str,
}


@dataclass(frozen=True)
class GpuEngine:
    """An intact compiled network.

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
    def batches(self) -> tuple[int, ...]:
        """Tiles per run that there is an engine for, ascending."""
        return tuple(self.manifest["batches"])

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the files with trtseg's own kernels."""
        return tuple(sorted(name for name in self.manifest["files"] if name.startswith("kernels.")))

    @property
    def notice(self) -> str:
        """What a person must be told of these weights; empty for the published ones."""
        return str(self.manifest["notice"])

    def read(self, name: str) -> bytes:
        """Content of one of the files the manifest lists, checked as it is read.

        What is executed must come from here: the bytes returned are the very bytes checked.

        Raises
        ------
        EngineError
            The file is missing, damaged, or someone else could have changed it.
        """
        digests = self.manifest["files"]
        again = _again(self.models)
        if name not in digests:
            raise EngineError(
                f"{self.folder / name}: not listed in the manifest",
                expected=", ".join(sorted(digests)),
                action=again,
            )
        try:
            content = _read(self.folder, name, again)
        except FileNotFoundError as error:
            raise EngineError(
                f"{self.folder / name}: {error.strerror}",
                expected="a readable file listed in the manifest",
                action=again,
            ) from error
        found = sha256_bytes(content)
        if found != digests[name]:
            raise EngineError(
                f"{self.folder / name}: SHA-256 {found[:16]}...",
                expected=f"{str(digests[name])[:16]}... by the manifest; it is damaged or foreign",
                action=again,
            )
        return content

    def selftest(self) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
        """Inputs of one tile, each (1, 1, n, n, n), and its float32 answer, (out, out, out).

        Raises
        ------
        EngineError
            As `read`.
        """
        with np.load(io.BytesIO(self.read(SELFTEST)), allow_pickle=False) as archive:
            arrays = dict(archive.items())
        answer = arrays.pop(ANSWER)
        return arrays, answer

    def check_selftest(self, logits: NDArray[np.float32]) -> dict[str, float]:
        """Judge what an engine makes of the self-test's inputs.

        Parameters
        ----------
        logits : ndarray, shape (out, out, out), float32

        Returns
        -------
        dict of str to float
            ``labels_equal``, the part of the voxels with the same label, and
            ``largest_difference``, in logits.

        Raises
        ------
        EngineError
            It is further from the float32 answer than the manifest allows.
        """
        _, answer = self.selftest()
        limits = self.manifest["selftest"]
        if logits.shape != answer.shape or not np.isfinite(logits).all():
            raise EngineError(
                f"{self.folder}: the self-test gave {logits.shape} logits, "
                f"{int(np.isfinite(logits).sum())} of them finite",
                expected=f"{answer.shape}, all finite",
                action=_again(self.models),
            )
        equal = float(((logits > 0) == (answer > 0)).mean())
        largest = float(np.abs(logits - answer).max())
        if equal < limits["labels_equal"] or largest > limits["largest_difference"]:
            raise EngineError(
                f"{self.folder}: in the self-test {equal:.4%} of the labels agree with float32, "
                f"and logits differ by up to {largest:.3g}",
                expected=f"at least {limits['labels_equal']:.4%}, and at most "
                f"{limits['largest_difference']:.3g}",
                action=f"{_again(self.models)}, or run with --device cpu",
            )
        return {"labels_equal": equal, "largest_difference": largest}

    def check_library(self, name: str, version: str) -> None:
        """Check that the engine was compiled by this very library.

        Raises
        ------
        EngineError
            By another one, or another version of it.
        """
        library = self.manifest["library"]
        if (library["name"], library["version"]) != (name, version):
            raise EngineError(
                f"{self.folder}: compiled by {library['name']} {library['version']}",
                expected=f"{name} {version}, which is installed",
                action=_again(self.models),
            )

    def check_device(self, capability: tuple[int, int], device: str) -> None:
        """Check that the engine was compiled for a GPU like this one.

        Parameters
        ----------
        capability : tuple of int
            The GPU's compute capability, major and minor.
        device : str
            Its name, for the message.

        Raises
        ------
        EngineError
            It was not.
        """
        known = self.manifest["compute_capabilities"]
        later = self.manifest.get("later_than")
        if "{}.{}".format(*capability) in known:
            return
        if later is not None and capability > tuple(map(int, str(later).split("."))):
            return
        raise EngineError(
            f"{self.folder}: compiled for compute capability {', '.join(known)}"
            + ("" if later is None else f" and above {later}"),
            expected="{}.{}, that of {}".format(*capability, device),
            action=f"{_again(self.models)} on this machine",
        )


def engine_file(batch: int) -> str:
    """File name of the engine for a batch of tiles."""
    return f"b{batch}.engine"


def gpu_build_command(models: str) -> str:
    """The command that compiles a model set for a GPU."""
    return f"trtseg engines build --models {models} --device cuda"


def gpu_engine_folder(root: Path, models: str, net: str) -> Path:
    """Where the compiled network lies."""
    return engine_folder(root, models, net) / FOLDER


def load_gpu_engine(root: Path, models: str, net: str, *, frozen_sha256: str) -> GpuEngine:
    """Open a compiled network and check every byte of it against its manifest.

    Parameters
    ----------
    root : Path
        The engines folder.
    models, net : str
    frozen_sha256 : str
        SHA-256 of ``weights.npz`` of the built network as it is now.

    Returns
    -------
    GpuEngine

    Raises
    ------
    EngineMissingError
        Nothing is compiled there.
    EngineError
        It is damaged, stale, of another layout, or someone else could have changed it.
    """
    folder = gpu_engine_folder(root, models, net)
    again = _again(models)
    try:
        text = _read(folder, MANIFEST, again)
    except FileNotFoundError:
        raise EngineMissingError(
            f"{folder}: nothing is compiled for a GPU for {net.upper()} of model set {models!r}",
            expected=f"{MANIFEST} and the files it lists",
            action=f"compile it: {gpu_build_command(models)}",
        ) from None
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            f"{folder / MANIFEST}: not readable ({error})",
            expected="the manifest of a compiled network",
            action=again,
        ) from error
    spec = _check_manifest(folder, manifest, models, net)
    engine = GpuEngine(folder, models, net, spec, manifest)
    if manifest["recipe"].get("frozen_sha256") != frozen_sha256:
        raise EngineError(
            f"{folder}: compiled from other weights than are built now",
            expected="an engine of the present build",
            action=again,
        )
    for name in manifest["files"]:
        engine.read(name)
    return engine


def write_gpu_engine(
    root: Path,
    models: str,
    net: str,
    *,
    spec: NetworkSpec,
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
) -> GpuEngine:
    """Put a compiled network in place, whole, replacing an older one.

    Parameters
    ----------
    root : Path
        The engines folder; the network must be built there.
    models, net : str
    spec : NetworkSpec
        The published architecture, whatever the graph form pads it to.
    files : mapping of str to bytes
        Plain file name to content.
    facts : mapping
        What the manifest says besides. Needed are ``recipe`` (all that the files follow from, with
        ``frozen_sha256``; its digest is the cache key), ``checkpoint`` (file name to SHA-256),
        ``library`` (``name``, ``version``), ``compute_capabilities`` (list such as ``"8.6"``),
        optionally ``later_than`` (GPUs above this one will do as well), ``batches`` (ascending),
        ``form``, ``precision``, ``selftest`` (``labels_equal`` and ``largest_difference``: the
        limits) and ``notice``.

    Returns
    -------
    GpuEngine

    Raises
    ------
    OutputError
        The folder cannot be written; the older engine, if any, stays.
    """
    final = gpu_engine_folder(root, models, net)
    make_folder(final.parent)
    # Named before it is made, so that an interrupt in between still finds what to remove.
    staging = final.with_name(f".{FOLDER}.{secrets.token_hex(8)}")
    try:
        staging.mkdir(0o755)
        for name, content in files.items():
            with atomic_write(staging / name) as stream:
                stream.write(content)
        manifest: dict[str, Any] = {
            **facts,
            "schema": SCHEMA,
            "models": models,
            "network": net,
            "architecture": spec.to_dict(),
            "tile": spec.tile,
            "cache_key": cache_key(facts["recipe"]),
            "files": {name: sha256_bytes(content) for name, content in files.items()},
        }
        manifest = json.loads(json.dumps(manifest))
        manifest["sha256"] = seal(manifest)
        atomic_write_json(staging / MANIFEST, manifest)
        # Readable as the user's umask says, but never writable by a group: loading refuses that.
        for path in staging.iterdir():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_OTHERS_MAY_WRITE)
        swap_folder(staging, final)
    except OSError as error:
        raise unwritable(final, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return GpuEngine(final, models, net, spec, manifest)


def cache_key(recipe: Mapping[str, Any]) -> str:
    """Hex SHA-256 of all that a compiled network follows from."""
    return sha256_bytes(json.dumps(recipe, sort_keys=True).encode())


def read_owned(path: Path) -> bytes:
    """Read a file beside an engine that no manifest lists (a cache of compiled kernels).

    Raises
    ------
    FileNotFoundError
        There is none.
    EngineError
        It cannot be read, or someone else could have changed it or its folder.
    """
    return _read(path.parent, path.name, "remove it")


def _check_manifest(folder: Path, manifest: Any, models: str, net: str) -> NetworkSpec:
    def refuse(what: str, expected: str) -> EngineError:
        return EngineError(f"{folder / MANIFEST}: {what}", expected=expected, action=_again(models))

    if not isinstance(manifest, dict):
        raise refuse("not a JSON object", "the manifest of a compiled network")
    if manifest.get("schema") != SCHEMA:
        raise refuse(f"layout {manifest.get('schema')!r}", f"layout {SCHEMA} (this version's)")
    if manifest.get("sha256") != seal(manifest):
        raise refuse("changed after it was written", "the manifest as the build wrote it")
    for name, value in (("models", models), ("network", net)):
        if manifest.get(name) != value:
            raise refuse(f"{name} {manifest.get(name)!r}", repr(value))
    for name, kind in _FACTS.items():
        if not isinstance(manifest.get(name), kind):
            raise refuse(f"{name} {manifest.get(name)!r}", f"a {kind.__name__}")
    files = manifest.get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise refuse("files are not listed", "plain names with their SHA-256")
    needed = {SELFTEST, *map(engine_file, manifest["batches"])}
    if not manifest["batches"] or not needed <= set(files):
        raise refuse(f"files {', '.join(files)}", ", ".join(sorted(needed)))
    try:
        return NetworkSpec.from_dict(manifest["architecture"])
    except (KeyError, ModelError) as error:
        raise refuse(f"architecture not readable ({error})", "an architecture") from error


def _again(models: str) -> str:
    return f"compile again: {gpu_build_command(models)}"


def _read(folder: Path, name: str, action: str) -> bytes:
    """Read a file that only the user or root can have written, without following links.

    Raises FileNotFoundError where it is not there.
    """
    try:
        where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_owner(folder, os.fstat(where), action)
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=where)
        finally:
            os.close(where)
        with os.fdopen(handle, "rb") as stream:
            _check_owner(folder / name, os.fstat(handle), action)
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EngineError(
            f"{folder / name}: {error.strerror or error}",
            expected="a readable file in a folder, neither of them a link",
            action=action,
        ) from error


def _check_owner(path: Path, found: os.stat_result, action: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise EngineError(
            f"{path}: belongs to user {found.st_uid}",
            expected=f"user {os.geteuid()}, who runs this, or root: an engine is executable code",
            action=action,
        )
    if found.st_mode & _OTHERS_MAY_WRITE:
        raise EngineError(
            f"{path}: others than its owner can write it (mode {stat.S_IMODE(found.st_mode):o})",
            expected="a mode such as 755 or 644: an engine is executable code",
            action=f"{action}, or if you trust it: chmod go-w {path}",
        )
