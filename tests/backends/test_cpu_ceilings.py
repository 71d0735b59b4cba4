from __future__ import annotations

import threading

import pytest

from trtseg.backends import cpu_ceilings
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.openvino_library import openvino_module
from trtseg.errors import DeviceError


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ceilings, "_CONVOLUTION", (8, 16, 6))
    monkeypatch.setattr(cpu_ceilings, "_COPY_BYTES", 1 << 16)


def test_rates_are_work_by_time(monkeypatch):
    monkeypatch.setattr(cpu_ceilings, "_median_seconds", lambda action: (action() and None) or 0.5)
    found = cpu_ceilings.measure(2, "f32")
    assert found.operations_per_second == 2 * 6**3 * 27 * 8 * 16 / 0.5
    assert found.bytes_per_second == 2 * (1 << 16) / 0.5


def test_the_backend_measures_with_its_own_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_ceilings, "measure", lambda *given: asked.append(given))
    OpenVINOBackend(threads=3).ceilings()
    assert asked == [(3, "f32")]


def test_it_runs():
    found = cpu_ceilings.measure(1, "f32")
    assert found.operations_per_second > 0
    assert found.bytes_per_second > 0


@pytest.mark.parametrize("method", ["compile_model", "infer"])
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Check 'ptr' failed:\nFailed to allocate 33554432 bytes of memory\n\n", MemoryError),
        ("[CPU] Convolution node with name 'ceiling' can't alloc\n\n", MemoryError),
        ("could not execute a primitive", DeviceError),
    ],
)
def test_what_openvino_fails_with_is_told(monkeypatch, method, said, expected):
    def fail(*_given, **_options):
        raise RuntimeError(said)

    openvino = openvino_module()
    owner = openvino.Core if method == "compile_model" else openvino.InferRequest
    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(expected):
        cpu_ceilings.measure(1, "f32")


def test_a_thread_there_is_no_room_for_is_a_memory_error(monkeypatch):
    def fail(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(MemoryError):
        cpu_ceilings.measure(2, "f32")
