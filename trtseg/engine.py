"""A built network on disk: what files it has, what it was built from, and whether it is intact.

This is where the build step and the runtime meet. ``<root>/<models>/<net>/`` holds

- ``weights.npz``: folded weights, the one source of every graph form;
- ``normal.onnx``, ``sub.onnx``, ``fc.onnx``: the parts the CPU runs (see `trtseg.build.parts`);
- ``manifest.json``: what all of it was made from, and the SHA-256 of each file;
- ``cuda/``, once compiled for a GPU: see `trtseg.gpu_engine`. A newer build takes it over: the same
  checkpoint gives the same weights, and where they changed, loading it refuses.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trtseg import __version__
from trtseg.architecture import NETWORKS, NetworkSpec
from trtseg.errors import EngineError
from trtseg.files import make_folder
from trtseg.locks import locked
from trtseg.sealed import MANIFEST, Kind, SealedNetwork, looking, unwritable

WEIGHTS = "weights.npz"
NORMAL_PART = "normal.onnx"
SUB_PART = "sub.onnx"
FC_PART = "fc.onnx"
#: Folder, inside a built network's, of what was compiled from it for a GPU.
GPU_FOLDER = "cuda"


def build_command(models: str) -> str:
    """The command that builds a model set."""
    return f"trtseg engines build --models {models}"


class Engine(SealedNetwork):
    """An intact built network."""

    kind = Kind(
        schema=1,
        noun="a built network",
        made="built",
        verb="build",
        command=build_command,
        facts={dict: ("checkpoint",)},
        needed=lambda _, spec: (
            {WEIGHTS, NORMAL_PART, FC_PART} | ({SUB_PART} if len(spec.pathways) > 1 else set())
        ),
        fetch=lambda folder, name, _: (folder / name).read_bytes(),
        kept=GPU_FOLDER,
    )


def engine_folder(root: Path, models: str, net: str) -> Path:
    """Where the engine of one network lies."""
    return root / models / net


@looking()
def is_built(root: Path, models: str) -> bool:
    """Whether both networks have a manifest; EngineError where that cannot be seen."""
    return all((engine_folder(root, models, net) / MANIFEST).is_file() for net in NETWORKS)


@looking()
def built_models(root: Path) -> list[str]:
    """Names of the model sets built under `root`, sorted; EngineError where it cannot be read."""
    if not root.is_dir():
        return []
    names = []
    for folder in root.iterdir():
        with contextlib.suppress(EngineError):  # another user's, or the disk's own (lost+found)
            if is_built(root, folder.name):
                names.append(folder.name)
    return sorted(names)


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

    Raises
    ------
    EngineMissingError
        Nothing is built there.
    EngineError
        The build is damaged, of another version's layout, or stale.
    """
    engine = Engine.open(engine_folder(root, models, net), models, net)
    if checkpoint is not None and dict(checkpoint) != engine.manifest["checkpoint"]:
        raise engine.refusal(
            f"built from another checkpoint than model set {models!r} holds now",
            "a build of the present checkpoint",
        )
    return engine


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
    """Put a built network in place, whole, replacing an older one but for what is compiled from it.

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

    Raises
    ------
    OutputError
        The folder cannot be written; the older build, if any, stays.
    """
    facts = {
        "notice": notice,
        "checkpoint": dict(checkpoint),
        "proof": dict(proof),
        "versions": {"trtseg": __version__, "python": platform.python_version(), **versions},
    }
    return Engine(engine_folder(root, models, net), models, net, spec, facts).write(files)


@contextlib.contextmanager
def build_lock(root: Path, models: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the only right to build a model set; others wait, then find it built.

    On a file system without locks two may build at once; what is put in place is whole all the
    same.

    Parameters
    ----------
    root : Path
        The engines folder; made if missing.
    models : str
    report : callable
        Told where another process is waited for.

    Raises
    ------
    OutputError
        The engines folder cannot be written.
    """
    make_folder(root)
    with contextlib.ExitStack() as stack:
        waiting = functools.partial(report, f"waiting for another trtseg that builds {models}")
        try:
            stack.enter_context(locked(root / f".{models}.lock", waiting))
        except OSError as error:
            raise unwritable(root, error) from error
        yield
