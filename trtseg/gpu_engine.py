"""A network compiled for a GPU, on disk: its files, their origin, and who may have changed them.

``<root>/<models>/<net>/cuda/``, beside the built network it was compiled from, holds

- ``b1.engine``, ``b4.engine``, ``b16.engine``: the network, each for one fixed batch of tiles;
- ``kernels.ptx``, with ``kernels.fatbin`` where nvcc compiled them and else ``kernels.sm_XX.cubin``
  for each GPU: trtseg's own kernels;
- ``ceiling.engine``: one large matrix product, by which the GPU's ceiling is measured;
- ``selftest.npz``: the inputs of one tile and its float32 answer;
- ``manifest.json``: what all of it was made from, and the SHA-256 of each file.

An engine is executable code. It is loaded only from a folder and files that belong to the user or
to root and that nobody else can write, and only where its bytes are those the manifest names.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.architecture import NETWORKS, NetworkSpec
from trtseg.engine import GPU_FOLDER, engine_folder
from trtseg.errors import EngineError, NotCompiledError
from trtseg.files import json_seal
from trtseg.sealed import MANIFEST, Kind, SealedNetwork, looking

if TYPE_CHECKING:
    from numpy.typing import NDArray

SELFTEST = "selftest.npz"
#: The engine of one large matrix product, by whose rate the GPU's ceiling is measured.
CEILING = "ceiling.engine"
#: Tiles per run that engines are compiled for, unless others are asked for.
BATCHES = (1, 4, 16)
#: Name of the array of a self-test that holds the answer; the others are the inputs.
ANSWER = "logit"

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def engine_file(batch: int) -> str:
    """File name of the engine for a batch of tiles."""
    return f"b{batch}.engine"


def gpu_build_command(models: str) -> str:
    """The command that compiles a model set for a GPU."""
    return f"trtseg engines build --models {models} --device cuda"


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


class GpuEngine(SealedNetwork):
    """An intact compiled network."""

    kind = Kind(
        schema=1,
        noun="a compiled network",
        made="compiled for a GPU",
        verb="compile",
        command=gpu_build_command,
        facts={  # `write_gpu_engine` explains each
            dict: ("recipe", "checkpoint", "library", "selftest", "cost", "versions"),
            list: ("compute_capabilities", "batches"),
            str: ("form", "precision", "notice"),
        },
        needed=lambda manifest, _: {SELFTEST, CEILING, *map(engine_file, manifest["batches"])},
        fetch=_read,
        missing=NotCompiledError,
        forbidden=_OTHERS_MAY_WRITE,
    )

    @property
    def batches(self) -> tuple[int, ...]:
        """Tiles per run that there is an engine for, ascending."""
        return tuple(self.manifest["batches"])

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the files with trtseg's own kernels."""
        return tuple(sorted(name for name in self.manifest["files"] if name.startswith("kernels.")))

    @property
    def summary(self) -> str:
        """By what, how and for which GPUs it was compiled, in one line."""
        library = "{name} {version}".format(**self.manifest["library"])
        batches = ", ".join(map(str, self.batches))
        kept = ", ".join(sorted(self.manifest.get("float32_layers", {})))
        exceptions = kept and f" ({kept} in float32)"
        return f"{library}, {self.manifest['form']}{exceptions}, batches {batches}, {self._devices}"

    @property
    def _devices(self) -> str:
        later = self.manifest.get("later_than")
        known = ", ".join(self.manifest["compute_capabilities"])
        return f"compute capability {known}" + ("" if later is None else f" and above {later}")

    @cached_property
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
        _, answer = self.selftest
        limits = self.manifest["selftest"]
        if logits.shape != answer.shape or not np.isfinite(logits).all():
            finite = int(np.isfinite(logits).sum())
            raise self.refusal(
                f"the self-test gave {logits.shape} logits, {finite} of them finite",
                f"{answer.shape}, all finite",
            )
        equal = float(((logits > 0) == (answer > 0)).mean())
        largest = float(np.abs(logits - answer).max())
        if equal < limits["labels_equal"] or largest > limits["largest_difference"]:
            raise self.refusal(
                f"in the self-test {equal:.4%} of the labels agree with float32, and logits differ "
                f"by up to {largest:.3g}",
                f"at least {limits['labels_equal']:.4%}, and at most "
                f"{limits['largest_difference']:.3g}",
                hint=", or run with --device cpu",
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
            raise self.refusal(
                f"compiled by {library['name']} {library['version']}",
                f"{name} {version}, which is installed",
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
        if not covers(known, self.manifest.get("later_than"), capability):
            raise self.refusal(
                f"compiled for {self._devices}",
                f"{capability_text(capability)}, that of {device}",
                hint=" on this machine, with TensorRT if TensorRT-RTX names no such GPU: pip "
                "install 'trtseg[tensorrt]'",
            )


def capability_text(capability: tuple[int, int]) -> str:
    """Compute capability as NVIDIA writes it, such as ``8.9``."""
    major, minor = capability
    return f"{major}.{minor}"


def covers(known: Sequence[str], later_than: str | None, capability: tuple[int, int]) -> bool:
    """Whether engines for the `known` compute capabilities, and those above one, are for this."""
    if capability_text(capability) in known:
        return True
    return later_than is not None and capability > tuple(map(int, later_than.split(".")))


def gpu_engine_folder(root: Path, models: str, net: str) -> Path:
    """Where the compiled network lies."""
    return engine_folder(root, models, net) / GPU_FOLDER


@looking()
def gpu_built(root: Path, models: str) -> bool:
    """Whether both networks are compiled for a GPU; EngineError where that cannot be seen."""
    return all((gpu_engine_folder(root, models, net) / MANIFEST).is_file() for net in NETWORKS)


def load_gpu_engine(root: Path, models: str, net: str, *, frozen_sha256: str) -> GpuEngine:
    """Open a compiled network and check every byte of it against its manifest.

    Parameters
    ----------
    root : Path
        The engines folder.
    models, net : str
    frozen_sha256 : str
        SHA-256 of ``weights.npz`` of the built network as it is now.

    Raises
    ------
    NotCompiledError
        Nothing is compiled there.
    EngineError
        It is damaged, stale, of another layout, or someone else could have changed it.
    """
    engine = GpuEngine.open(gpu_engine_folder(root, models, net), models, net)
    if engine.manifest["recipe"].get("frozen_sha256") != frozen_sha256:
        raise engine.refusal(
            "compiled from other weights than are built now", "an engine of the present build"
        )
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
        ``form``, ``precision``, optionally ``float32_layers`` (layer to the list of its parts that
        are kept in float32), ``cost`` (``multiply_adds`` and ``bytes`` of a tile), ``versions``,
        ``selftest`` (``labels_equal`` and ``largest_difference``: the limits) and ``notice``; and
        for people ``float16_on_cpu`` (what rounding did to the self-test's tile), ``built`` (when)
        and ``compile_seconds``.

    Raises
    ------
    OutputError
        The folder cannot be written; the older engine, if any, stays.
    """
    facts = {**facts, "cache_key": cache_key(facts["recipe"])}
    return GpuEngine(gpu_engine_folder(root, models, net), models, net, spec, facts).write(files)


def cache_key(recipe: Mapping[str, Any]) -> str:
    """Hex SHA-256 of all that a compiled network follows from."""
    return json_seal(recipe)


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
