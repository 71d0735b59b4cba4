from __future__ import annotations

import pytest

from trtseg.backends import ceilings
from trtseg.backends.openvino import OpenVINOBackend


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_CONVOLUTION", (8, 16, 6))
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 16)


def test_rates_are_work_by_time(monkeypatch):
    monkeypatch.setattr(ceilings, "_median_seconds", lambda action: (action() and None) or 0.5)
    found = ceilings.cpu_ceilings(2, "f32")
    assert found.operations_per_second == 2 * 6**3 * 27 * 8 * 16 / 0.5
    assert found.bytes_per_second == 2 * (1 << 16) / 0.5


def test_the_backend_measures_with_its_own_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(ceilings, "cpu_ceilings", lambda *given: asked.append(given))
    OpenVINOBackend(threads=3).ceilings()
    assert asked == [(3, "f32")]


def test_it_runs():
    found = ceilings.cpu_ceilings(1, "f32")
    assert found.operations_per_second > 0
    assert found.bytes_per_second > 0
