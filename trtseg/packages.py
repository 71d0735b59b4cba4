"""Versions of the packages that trtseg uses, asked of what is installed; nothing is imported."""

from __future__ import annotations

import importlib.metadata

#: What trtseg calls a package, and the names it is installed under; the first one there counts.
PACKAGES = {
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "nibabel": ("nibabel",),
    "pillow": ("pillow",),
    "openvino": ("openvino",),
    "tensorflow": ("tensorflow-cpu", "tensorflow"),
    "onnx": ("onnx",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    "pycuda": ("pycuda",),
}


def package_version(name: str) -> str | None:
    """Version of one of `PACKAGES`; None where it is not installed."""
    for package in PACKAGES[name]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
