from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import gpu_torch
import pytest

from tests.build.networks import TINY, random_variables
from trtseg.build.freeze import freeze


def stub(*, available: bool = True) -> Any:
    """As much of PyTorch as is asked before anything is run."""
    return SimpleNamespace(
        __version__="9.8",
        contiguous_format="one",
        channels_last_3d="other",
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(is_available=lambda: available),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91000)),
    )


@pytest.fixture
def setting() -> Any:
    content = freeze(random_variables(TINY, 1), TINY).to_bytes()
    engine = SimpleNamespace(spec=TINY, read=lambda name: content)
    return SimpleNamespace(
        batch=16,
        tiles=lambda: {"bdn": 33, "cgm": 16},
        frozen=lambda: {"bdn": engine, "cgm": engine},
    )


@pytest.mark.parametrize("figures", [gpu_torch.eager, gpu_torch.compiled])
def test_pytorch_is_not_installed(setting: Any, monkeypatch, figures: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert figures(setting) is None


def test_pytorch_that_cannot_use_the_gpu(setting: Any, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", stub(available=False))
    with pytest.raises(RuntimeError, match=r"PyTorch 9\.8 finds no GPU"):
        gpu_torch.eager(setting)


@pytest.mark.parametrize("compile_it", [False, True])
def test_the_faster_memory_order_counts(setting: Any, monkeypatch, compile_it: bool) -> None:
    seconds = iter([0.2, 0.1, 0.3, 0.4])
    asked = []

    def batch_seconds(torch: Any, network: Any, spec: Any, *rest: Any) -> float:
        asked.append(rest)
        return next(seconds)

    monkeypatch.setitem(sys.modules, "torch", stub())
    monkeypatch.setattr(gpu_torch, "batch_seconds", batch_seconds)
    found = (gpu_torch.compiled if compile_it else gpu_torch.eager)(setting)
    assert found["seconds_a_batch"] == {
        "bdn": {"contiguous": 0.2, "channels_last_3d": 0.1},
        "cgm": {"contiguous": 0.3, "channels_last_3d": 0.4},
    }
    assert found["seconds_by_network"] == pytest.approx({"bdn": 0.3, "cgm": 0.3})
    assert found["seconds"] == pytest.approx(0.6)
    assert asked == [(16, "one", compile_it), (16, "other", compile_it)] * 2
