"""Enough of pycuda to see what `trtseg.cuda.device` asks of it, and in which order."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class FakePycuda:
    """Puts itself in pycuda's place; `calls` is what was asked, `failures` what is to fail.

    Attributes
    ----------
    calls : list of tuple
    failures : dict of str to Exception
        Name of a call to what it raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, gpus: int = 2) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, Exception] = {}
        self.stack: list[str] = []
        self.held: set[str] = set()
        self.gpus = gpus
        self.streams = 0
        self.free = 5000
        self.cuda = 12020
        self.driver = self._module()
        package = ModuleType("pycuda")
        package.driver = self.driver
        monkeypatch.setitem(sys.modules, "pycuda", package)
        monkeypatch.setitem(sys.modules, "pycuda.driver", self.driver)
        monkeypatch.setattr("trtseg.cuda.device._pop_current", self._pop_current)

    def call(self, name: str, *arguments: Any, current: bool = True) -> None:
        """Note a call; nearly all need a current context."""
        assert self.stack or not current, f"{name} without a current context"
        self.calls.append((name, *arguments))
        if name in self.failures:
            raise self.failures[name]

    def _pop_current(self) -> None:
        self.call("pop current")
        self.stack.pop()

    def names(self) -> list[str]:
        return [one[0] for one in self.calls]

    def _module(self) -> Any:
        fake = self
        module = ModuleType("pycuda.driver")

        class Error(Exception):
            pass

        class MemoryError(Error):
            pass

        class LogicError(Error):
            pass

        class RuntimeError(Error):
            pass

        class Context:
            def push(self) -> None:
                fake.call("push", current=False)
                fake.stack.append("primary")

            @staticmethod
            def pop() -> None:
                fake.call("pop")
                fake.stack.pop()

            def detach(self) -> None:
                fake.call("detach", current=False)
                assert not fake.held, "detached with memory still held"
                assert not fake.stack, "detached while the driver has it as current"

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            @staticmethod
            def count() -> int:
                fake.call("count", current=False)
                return fake.gpus

            def name(self) -> str:
                return f"GPU {self.index}"

            def compute_capability(self) -> tuple[int, int]:
                return (8, 9)

            def total_memory(self) -> int:
                return 8000

            def retain_primary_context(self) -> Context:
                fake.call("retain", self.index, current=False)
                return Context()

        class Stream:
            def __init__(self, flags: int) -> None:
                assert flags == 1, "a stream that waits for the default one"
                fake.call("stream")
                self.handle = 4242 + fake.streams
                self.name = " aside" if fake.streams % 2 else ""
                fake.streams += 1

            def synchronize(self) -> None:
                fake.call("synchronize" + self.name)

            def wait_for_event(self, event: Event) -> None:
                assert isinstance(event, Event)
                fake.call("join" + self.name)

        class Event:
            def __init__(self) -> None:
                fake.call("event")

            def record(self, stream: Stream) -> None:
                assert isinstance(stream, Stream)
                fake.call("record" + stream.name)

            def synchronize(self) -> None:
                fake.call("wait")

            def time_since(self, other: Event) -> float:
                fake.call("time")
                return 2.5

        class Allocation:
            def __init__(self, kind: str) -> None:
                self.kind = kind
                fake.held.add(kind)

            def __int__(self) -> int:
                return 0x1000

            def free(self) -> None:
                fake.held.discard(self.kind)
                fake.call("free", self.kind)

        def mem_alloc(size: int) -> Allocation:
            fake.call("mem_alloc", size)
            return Allocation("device")

        def pagelocked_empty(size: int, dtype: Any) -> Any:
            fake.call("pagelocked_empty", size)

            class Pinned(np.ndarray):
                base = Allocation("pinned")

            return np.zeros(size, dtype).view(Pinned)

        class Function:
            def __init__(self, name: str) -> None:
                self.name = name

            def prepare(self, types: list[str]) -> None:
                fake.call("prepare", self.name, *types)

            def prepared_async_call(self, grid: Any, block: Any, stream: Any, *values: Any) -> None:
                assert isinstance(stream, Stream)
                assert not stream.name
                fake.call("launch", self.name, grid, block, *values)

        class Module:
            def get_function(self, name: str) -> Function:
                fake.call("get_function", name)
                return Function(name)

        def module_from_buffer(content: bytes) -> Module:
            fake.call("module", content)
            if content.startswith(b"bad"):
                raise LogicError("cuModuleLoadDataEx failed: no kernel image - \nmore")
            return Module()

        def mem_get_info() -> tuple[int, int]:
            fake.call("mem_get_info")
            return fake.free, 8000

        module.__dict__.update(
            Error=Error,
            MemoryError=MemoryError,
            LogicError=LogicError,
            RuntimeError=RuntimeError,
            Context=Context,
            Device=Device,
            Stream=Stream,
            Event=Event,
            get_driver_version=lambda: fake.cuda,
            init=lambda: fake.call("init", current=False),
            mem_alloc=mem_alloc,
            mem_get_info=mem_get_info,
            pagelocked_empty=pagelocked_empty,
            module_from_buffer=module_from_buffer,
            memcpy_htod_async=lambda to, source, stream: fake.call(
                "htod" + stream.name, to, len(source)
            ),
            memcpy_dtoh_async=lambda target, source, stream: fake.call("dtoh", len(target), source),
            memcpy_dtod_async=lambda to, source, size, stream: fake.call("dtod", to, source, size),
            memset_d8_async=lambda to, value, size, stream: fake.call("memset", to, value, size),
        )
        return module
