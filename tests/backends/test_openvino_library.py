from __future__ import annotations

import os

import numpy as np
import pytest

from trtseg.backends.openvino_library import (
    available_threads,
    calling,
    graph_refused,
    maps_of,
    no_cpu,
    openvino_module,
    tensor_of,
    version,
)
from trtseg.errors import DeviceError, EngineError


def test_version_is_that_of_the_runtime() -> None:
    assert version() == openvino_module().__version__


def test_threads_are_those_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert available_threads() == 3


def test_threads_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_threads() == 1


def test_a_failure_without_words_is_a_device_error() -> None:
    with pytest.raises(DeviceError, match="RuntimeError"), calling():
        raise RuntimeError


def test_a_failure_is_the_error_asked_for_with_its_last_line() -> None:
    said = "Exception from core.cpp:1:\nno such layer\n\n"
    with pytest.raises(DeviceError, match=r"no CPU device \(no such layer\)"), calling(no_cpu):
        raise RuntimeError(said)
    with (
        pytest.raises(EngineError, match=r"fc\.onnx: OpenVINO cannot run it \(no such layer\)"),
        calling(lambda last: graph_refused("fc.onnx", last)),
    ):
        raise RuntimeError(said)


def test_want_of_memory_is_a_memory_error_whatever_is_asked_for() -> None:
    with pytest.raises(MemoryError, match="bad_alloc"), calling(no_cpu):
        raise RuntimeError("std::bad_alloc")


def test_float32_is_taken_as_it_is() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert tensor_of(values) is values


def test_bits_of_bfloat16_go_in_and_out_in_their_own_memory() -> None:
    bits = np.array([[0x3F80, 0xC000, 0x0000]], np.uint16)  # 1, -2 and 0
    tensor = tensor_of(bits)
    assert tensor.element_type == openvino_module().Type.bf16
    assert list(tensor.shape) == [1, 3]
    found = maps_of(tensor)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, bits)
    assert np.shares_memory(found, bits)
