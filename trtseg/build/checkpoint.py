"""Reads variables out of a TensorFlow checkpoint. The only module that imports tensorflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A TensorFlow tensor bundle of one shard: an index and its data.
SUFFIXES = (".index", ".data-00000-of-00001")

#: What TensorFlow's reader raises besides its own errors; IndexError where a file ends too early.
_RAISED = (IndexError, RuntimeError, ValueError)


def read_schema(prefix: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors the index lists; the data file is not opened.

    Raises
    ------
    ModelError
        The index is missing or damaged.
    MissingExtraError
        TensorFlow is not installed.
    """
    reader, _ = _open(prefix)
    return {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}


def read_variables(
    prefix: Path, required: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """Read the required tensors, each checked against its shape, dtype and stored crc32c.

    Parameters
    ----------
    prefix : Path
        The checkpoint's path without ``.index`` or ``.data-00000-of-00001``.
    required : mapping of str to tuple of int
        Tensor name to shape. Other tensors of the checkpoint are ignored.

    Returns
    -------
    dict of str to ndarray, float32

    Raises
    ------
    ModelError
        A file is missing, truncated or damaged; a tensor is missing, of another shape or dtype, or
        holds values that are not finite.
    MissingExtraError
        TensorFlow is not installed.
    """
    for suffix in SUFFIXES:
        file = Path(f"{prefix}{suffix}")
        if not file.is_file():
            raise ModelError(
                f"{file}: no such file",
                expected="a DeepMedic checkpoint of two files, .index and .data-00000-of-00001",
                action="import the model set again: trtseg models import DIR",
            )
    reader, errors = _open(prefix)
    shapes = reader.get_variable_to_shape_map()
    variables = {}
    for name, shape in required.items():
        if name not in shapes:
            raise ModelError(
                f"{prefix.name}: tensor {name} is missing",
                expected=f"shape {shape}",
                action="check that the checkpoint belongs to this architecture (import --config)",
            )
        if tuple(shapes[name]) != tuple(shape):
            raise ModelError(
                f"{prefix.name}: tensor {name} has shape {tuple(shapes[name])}",
                expected=f"{tuple(shape)}",
                action="check that the checkpoint belongs to this architecture (import --config)",
            )
        variables[name] = _read(reader, errors, prefix, name)
    return variables


def tensorflow_version() -> str:
    """Version of the TensorFlow that reads checkpoints here."""
    return str(_tensorflow().__version__)


def is_available() -> bool:
    """Whether TensorFlow is installed, without importing it."""
    import importlib.util

    return importlib.util.find_spec("tensorflow") is not None


def _read(reader: Any, errors: Any, prefix: Path, name: str) -> NDArray[np.float32]:
    try:
        value = reader.get_tensor(name)
    except (errors, *_RAISED) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{prefix.name}: tensor {name} cannot be read ({reason})",
            expected="a data file that matches its index, checksum included",
            action="the file is truncated or damaged: fetch or import it again",
        ) from error
    if value.dtype != np.float32:
        raise ModelError(f"{prefix.name}: tensor {name} is {value.dtype}", expected="float32")
    if not np.isfinite(value).all():
        raise ModelError(
            f"{prefix.name}: tensor {name} holds values that are not finite",
            expected="finite weights",
            action="the training that made this checkpoint diverged; use another",
        )
    result: NDArray[np.float32] = value
    return result


def _open(prefix: Path) -> tuple[Any, Any]:
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise ModelError(
            f"{index}: no such file",
            expected="the index of a DeepMedic checkpoint",
            action="import the model set again: trtseg models import DIR",
        )
    tensorflow = _tensorflow()
    errors = tensorflow.errors.OpError
    try:
        return tensorflow.train.load_checkpoint(str(prefix)), errors
    except (errors, *_RAISED) as error:
        raise ModelError(
            f"{index}: not a readable checkpoint index ({str(error).splitlines()[0]})",
            expected="the index of a TensorFlow tensor bundle",
            action="the file is truncated or damaged: fetch or import it again",
        ) from error


def _tensorflow() -> ModuleType:
    # Quiet, and never on a GPU: reading a file must not take device memory from a running job.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow prints a notice of it
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        import tensorflow
    except ImportError as error:
        raise MissingExtraError(
            "freezing a checkpoint needs tensorflow, which is not installed",
            expected="the build extra",
            action="pip install 'trtseg[build]'",
        ) from error
    finally:
        if hidden is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    module: ModuleType = tensorflow
    return module
