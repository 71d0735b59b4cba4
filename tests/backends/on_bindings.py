"""Run by test_bindings.py, in a process whose ``tensorrt`` is NVIDIA's bindings on a stub."""

from __future__ import annotations

import onnx
import pytest

from tests.backends.fake_tensorrt import assert_like
from tests.build.networks import TINY, random_variables
from tests.cuda.host_device import HostDevice
from trtseg.backends.tensorrt import TensorRTBackend
from trtseg.backends.tensorrt_library import Library, open_library
from trtseg.build.forms import FORMS, form_graph
from trtseg.build.freeze import FrozenNetwork, freeze
from trtseg.build.tensorrt import build_engine
from trtseg.errors import DeviceError, EngineError


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("tensorrt")


@pytest.fixture(scope="module")
def network() -> FrozenNetwork:
    return freeze(random_variables(TINY, 1), TINY)


def release(library: Library) -> tuple[int, int]:
    major, minor = library.version.split(".")[:2]
    return int(major), int(minor)


def test_the_double_is_like_the_library(library: Library) -> None:
    assert_like(library.trt, "11" if release(library) >= (10, 12) else "10.3")


def test_what_the_library_offers(library: Library) -> None:
    assert library.has_progress_monitor
    for lacks in ("user_allocation", "runtime_cache", "cuda_graph_strategy", "engine_validity"):
        assert not getattr(library, f"has_{lacks}")
    assert not library.compiles_without_gpu


def test_no_compiling_without_a_gpu(library: Library) -> None:
    with pytest.raises(DeviceError, match=r"tensorrt .* cannot start \(no reason given\)"):
        build_engine(library, b"")


def test_no_running_without_a_gpu(library: Library) -> None:
    with pytest.raises(DeviceError, match=r"tensorrt .* cannot start on host"):
        TensorRTBackend(library=library, device=HostDevice())


@pytest.mark.parametrize("form", FORMS)
def test_the_builder_compiles(library: Library, network: FrozenNetwork, form: str) -> None:
    graph = form_graph(network, form, batch=2)
    built = build_engine(library, graph, detailed=True, report=lambda phase, part: None)
    assert len(built.content) > 1e5
    assert built.messages.lines
    assert built.messages.errors == []


def test_the_builder_names_the_node(library: Library, network: FrozenNetwork) -> None:
    model = onnx.load_from_string(form_graph(network, "plain", batch=1))
    model.graph.node[3].op_type = "Unheard"
    with pytest.raises(EngineError, match=rf"\(node Unheard {model.graph.node[3].name}: "):
        build_engine(library, model.SerializeToString())
    with pytest.raises(EngineError, match=r"cannot read the graph \((?!node).*parse"):
        build_engine(library, b"not a graph" * 10)


def test_the_builder_is_interrupted(library: Library, network: FrozenNetwork) -> None:
    def interrupt(phase: str, part: float) -> None:
        raise KeyboardInterrupt

    if release(library) < (11, 0):
        pytest.skip("the TensorRT-RTX beneath tells no progress")
    with pytest.raises(KeyboardInterrupt):
        build_engine(library, form_graph(network, "plain", batch=1), report=interrupt)
