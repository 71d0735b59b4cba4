from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_setting
import numpy as np
import pytest
from gpu_setting import Setting, box, fitted, phantom

from trtseg.architecture import PUBLISHED
from trtseg.errors import NotCompiledError


def setting(library: str | None = None) -> Setting:
    return Setting("demo", library, "8.9", 16, 1, 60, Path())


def test_the_scan_is_a_reflected_phantom() -> None:
    small = np.arange(8).reshape(2, 2, 2)
    large = fitted(small, (3, 2, 2))
    np.testing.assert_array_equal(large[:2], small)
    np.testing.assert_array_equal(large[2], small[0])
    raw = phantom()
    assert raw.shape == (200, 200, 180)
    assert raw.flags.f_contiguous


def test_the_box() -> None:
    mask = box((10, 10, 20), 0.125)
    assert mask.sum() == 5 * 5 * 10
    assert mask[5, 5, 10]
    assert not mask[0].any()


def test_architectures_need_no_build() -> None:
    assert setting().specs() == {"bdn": PUBLISHED, "cgm": PUBLISHED}


@pytest.mark.parametrize(
    ("asked", "compiled_by", "opened"),
    [
        ("tensorrt", "tensorrt_rtx", "tensorrt"),
        (None, "tensorrt", "tensorrt"),
        (None, None, None),
    ],
)
def test_which_library(asked: Any, compiled_by: Any, opened: Any, monkeypatch) -> None:
    def compiled(self: Setting) -> Any:
        if compiled_by is None:
            raise NotCompiledError("nothing is compiled")
        return {"bdn": SimpleNamespace(manifest={"library": {"name": compiled_by}})}

    monkeypatch.setattr(Setting, "compiled", compiled)
    monkeypatch.setattr(gpu_setting, "open_library", lambda name: ("opened", name))
    assert setting(asked).opened_library() == ("opened", opened)
