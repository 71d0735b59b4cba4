from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.cuda.host_device import HostDevice
from trtseg.cuda.device import OutOfDeviceMemory
from trtseg.cuda.memory import Memory


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice(capacity=1000)
    with device.active():
        yield device


def test_what_is_large_enough_is_kept(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"a": 300, "b": 100}, "a scan")
    address, made = memory["a"], device.allocations
    memory.reserve({"a": 200, "b": 100}, "a scan")
    assert memory["a"] == address
    assert memory.size("a") == 300
    assert device.allocations == made
    assert sorted(memory.names()) == ["a", "b"]


def test_growing_frees_first(device: HostDevice) -> None:
    """600 and 700 do not fit together."""
    memory = Memory(device)
    memory.reserve({"a": 600}, "a scan")
    memory.reserve({"a": 700}, "a scan")
    assert memory.size("a") == 700
    assert device.in_use == 700


def test_nothing_is_reserved_for_no_bytes(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"a": 0}, "a scan")
    assert memory.names() == []
    assert memory.size("a") == 0


def test_too_little_memory_says_what_was_free_and_needed(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"kept": 200, "grown": 100}, "a scan")
    with pytest.raises(OutOfDeviceMemory, match="for a scan of 9") as caught:
        memory.reserve({"kept": 200, "grown": 400, "new": 500}, "a scan of 9")
    assert (caught.value.needed, caught.value.free) == (900, 800)
    assert memory.names() == ["kept"]
    assert device.in_use == 200


def test_dropped_memory_is_given_back(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"a": 300}, "a scan")
    memory.drop("a")
    memory.drop("a")
    assert device.in_use == 0


def test_swapped_buffers_change_names(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"a": 300, "b": 100}, "a scan")
    a, b = memory["a"], memory["b"]
    memory.swap("a", "b")
    assert (memory["a"], memory.size("a")) == (b, 100)
    assert (memory["b"], memory.size("b")) == (a, 300)


def test_a_buffer_swapped_with_none_is_renamed(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"b": 100}, "a scan")
    address = memory["b"]
    memory.swap("a", "b")
    assert memory.names() == ["a"]
    assert memory["a"] == address
    memory.swap("a", "b")
    assert memory.names() == ["b"]


def test_pinned_memory_is_reused_and_grows(device: HostDevice) -> None:
    memory = Memory(device)
    first = memory.pinned("up", 100)
    again = memory.pinned("up", 60)
    other = memory.pinned("down", 60)
    assert len(again) == 60
    assert np.shares_memory(first, again)
    assert not np.shares_memory(first, other)
    assert device.buffers == 2
    assert len(memory.pinned("up", 101)) == 101
    assert device.buffers == 2


def test_release_gives_all_back(device: HostDevice) -> None:
    memory = Memory(device)
    memory.reserve({"a": 300, "b": 100}, "a scan")
    memory.pinned("up", 100)
    memory.release()
    assert device.buffers == 0
