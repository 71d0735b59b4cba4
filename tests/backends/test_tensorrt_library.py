from __future__ import annotations

import sys
from enum import Enum
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from tests.backends.fake_tensorrt import assert_like
from trtseg.backends import tensorrt_library
from trtseg.backends.tensorrt_library import (
    LIBRARIES,
    Library,
    Messages,
    installed_libraries,
    open_library,
)
from trtseg.errors import DeviceError, UsageError

CAPABILITIES = (
    "compiles_without_gpu",
    "has_user_allocation",
    "has_runtime_cache",
    "has_cuda_graph_strategy",
    "has_engine_validity",
    "has_progress_monitor",
)

needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in installed_libraries(), reason="TensorRT-RTX is not installed"
)


def enum(**members: int) -> type[Enum]:
    return Enum("Members", members)  # type: ignore[return-value]


def full_tensorrt() -> SimpleNamespace:
    """What TensorRT 10 offers of what is asked for."""
    return SimpleNamespace(
        NetworkDefinitionCreationFlag=enum(EXPLICIT_BATCH=0, STRONGLY_TYPED=1),
        BuilderFlag=enum(TF32=7, FP16=0),
        IRuntimeConfig=type("IRuntimeConfig", (), {}),
        IExecutionContext=type("IExecutionContext", (), {}),
        Runtime=type("Runtime", (), {}),
        IProgressMonitor=object,
    )


def test_capabilities_are_asked_of_the_library() -> None:
    found = Library(full_tensorrt(), "tensorrt", "10.13")
    assert {name for name in CAPABILITIES if getattr(found, name)} == {
        "has_progress_monitor",
    }
    nothing = Library(SimpleNamespace(), "tensorrt", "12.0")
    assert not any(getattr(nothing, name) for name in CAPABILITIES)


def test_enum_members_are_found_by_name() -> None:
    found = Library(full_tensorrt(), "tensorrt", "10.13")
    assert found.flag("BuilderFlag", "TF32").value == 7
    for missing in (("BuilderFlag", "REFIT"), ("MemoryPoolType", "WORKSPACE")):
        with pytest.raises(DeviceError, match=r"tensorrt 10\.13 has no .*trtseg\[tensorrt\]"):
            found.flag(*missing)


@pytest.mark.parametrize(
    ("asked", "installed", "expected"),
    [
        (None, ["tensorrt_rtx", "tensorrt"], "tensorrt_rtx"),
        (None, ["tensorrt"], "tensorrt"),
        ("tensorrt", ["tensorrt_rtx", "tensorrt"], "tensorrt"),
    ],
)
def test_which_library_is_opened(
    asked: str | None, installed: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_library, "installed_libraries", lambda: installed)
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="1.2.3", of=name))
    opened = open_library(asked)
    assert (opened.name, opened.version, opened.trt.of) == (expected, "1.2.3", expected)


@pytest.mark.parametrize(
    ("asked", "commands"),
    [
        (None, "pip install 'trtseg[rtx]' or pip install 'trtseg[tensorrt]'"),
        ("tensorrt_rtx", "pip install 'trtseg[rtx]'"),
        ("tensorrt", "pip install 'trtseg[tensorrt]'"),
    ],
)
def test_a_missing_library_gives_the_pip_command(
    asked: str | None, commands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    assert installed_libraries() == []
    with pytest.raises(DeviceError) as caught:
        open_library(asked)
    assert caught.value.action == f"install it: {commands}"
    assert "not installed" in caught.value.found


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_a_library_that_does_not_load_is_told(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error("libnvinfer.so.10: cannot open\nshared object file")

    monkeypatch.setattr(tensorrt_library, "installed_libraries", lambda: ["tensorrt"])
    monkeypatch.setattr(tensorrt_library, "_import", fail)
    with pytest.raises(DeviceError) as caught:
        open_library()
    assert "libnvinfer.so.10: cannot open shared object file" in caught.value.found
    assert "trtseg[tensorrt]" in caught.value.action


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'tensorflow'.*tensorrt_rtx or tensorrt"):
        open_library("tensorflow")


def test_messages_tell_the_first_failure_on_one_line() -> None:
    messages = Messages([("INFO", "fine"), ("WARNING", "careful")])
    assert (messages.errors, messages.reason) == ([], "no reason given")
    messages.lines += [("INTERNAL_ERROR", "first\n  line"), ("ERROR", "second")]
    assert messages.errors == ["first\n  line", "second"]
    assert messages.reason == "first line"
    messages.raise_if_interrupted()
    messages.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        messages.raise_if_interrupted()


@needs_rtx
def test_tensorrt_rtx_as_it_is_installed() -> None:
    opened = open_library("tensorrt_rtx")
    assert opened.version == version("tensorrt-rtx")
    assert all(getattr(opened, name) for name in CAPABILITIES)
    assert opened.flag("ComputeCapability", "SM86").name == "SM86"


@needs_rtx
def test_the_logger_keeps_what_it_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    opened, messages = open_library("tensorrt_rtx"), Messages()
    logger = opened.logger(messages)
    network = opened.trt.Builder(logger).create_network(0)
    assert not opened.trt.OnnxParser(network, logger).parse(b"not a graph" * 20)
    assert messages.errors
    assert {severity for severity, _ in messages.lines} <= {
        "VERBOSE",
        "INFO",
        "WARNING",
        "ERROR",
        "INTERNAL_ERROR",
    }
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_ctrl_c_in_a_callback_waits_until_the_library_returns() -> None:
    opened, messages = open_library("tensorrt_rtx"), Messages()

    def interrupted(phase: str, part: float) -> None:
        raise KeyboardInterrupt

    monitor = opened.progress_monitor(messages, interrupted)
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("Within", "Building", 9)
    assert monitor.step_complete("Within", 3) is True
    assert monitor.step_complete("Building", 0) is False
    assert messages.interrupted


@needs_rtx
def test_progress_is_that_of_the_outermost_phase() -> None:
    opened, told = open_library("tensorrt_rtx"), []
    monitor = opened.progress_monitor(Messages(), lambda *what: told.append(what))
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("Within", "Building", 9)
    for step in range(2):
        assert monitor.step_complete("Within", step)
        assert monitor.step_complete("Building", step)
    monitor.phase_finish("Building")
    monitor.phase_finish("Within")
    assert told == [("Building", 0.25), ("Building", 0.5), ("Building", 1.0)]


@needs_rtx
def test_the_double_is_like_the_library() -> None:
    assert_like(open_library("tensorrt_rtx").trt, "rtx")


@needs_rtx
def test_what_it_compiles_for() -> None:
    known = open_library("tensorrt_rtx").compute_capabilities
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(known)
    assert Library(full_tensorrt(), "tensorrt", "10.13").compute_capabilities == ()
