"""Fetal-brain cortex segmentation from 3-D T2w MRI.

``trtseg.segment("scan.nii.gz")`` segments one scan; `trtseg.Segmenter` loads the networks once and
segments many. Importing the package imports nothing heavy: the names below load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

__all__ = ["Segmentation", "Segmenter", "TrtsegError", "__version__", "segment"]

if TYPE_CHECKING:
    from trtseg.errors import TrtsegError
    from trtseg.pipeline import Segmentation, Segmenter, segment


def __getattr__(name: str) -> Any:
    # Late, so that `trtseg --help` does not pay for numpy and the readers.
    if name in ("Segmentation", "Segmenter", "segment"):
        from trtseg import pipeline

        return getattr(pipeline, name)
    if name == "TrtsegError":
        from trtseg.errors import TrtsegError

        return TrtsegError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
