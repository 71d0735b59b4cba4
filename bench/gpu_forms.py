"""The graph forms on a GPU, part by part: compiled, then run and timed, then inspected.

Engines are compiled in detail, so that the library's inspector tells of their layers; that costs
each of them the same little at every run. All but the last layer is float16, whatever the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from gpu_setting import Setting
from numpy.typing import NDArray

from trtseg import tiling
from trtseg.architecture import NetworkSpec
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.tensorrt import NetworkSession
from trtseg.backends.tensorrt_library import Library, Messages
from trtseg.build.forms import form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.tensorrt import TURING, build_engine, inspect_engine
from trtseg.cuda.chain import Chain
from trtseg.cuda.device import CudaDevice, Device
from trtseg.engine import WEIGHTS, Engine
from trtseg.errors import DeviceError
from trtseg.files import atomic_write, sha256_bytes
from trtseg.gpu_engine import GpuEngine, engine_file
from trtseg.home import demo_folder
from trtseg.nifti import read_scan
from trtseg.normalise import z_score

#: Rows of batches that are timed, the fastest of which counts, and batches of a row.
ROWS, ROW = 5, 10


def compiling(setting: Setting, form: str) -> dict[str, Any]:
    """Compile both networks for `timing` and `inspecting`, and say how long it took."""
    library = setting.opened_library()
    # As trtseg compiles: TensorRT-RTX must be asked for Turing by name.
    turing = library.compiles_without_gpu and setting.capability == TURING
    found = {}
    for net, engine in setting.frozen().items():
        network = FrozenNetwork.from_bytes(engine.read(WEIGHTS), engine.spec)
        built = build_engine(
            library,
            form_graph(network, form, batch=setting.batch),
            compute_capabilities=[TURING] if turing else (),
            detailed=True,
        )
        folder = setting.folder / form / net
        folder.mkdir(0o700, parents=True, exist_ok=True)
        path = folder / engine_file(setting.batch)
        with atomic_write(path) as stream:
            stream.write(built.content)
        path.chmod(0o600)
        found[net] = {"compile_seconds": built.seconds, "engine_bytes": len(built.content)}
    return found


def kept(setting: Setting, form: str, engine: Engine) -> GpuEngine:
    """What `compiling` left of a network."""
    folder = setting.folder / form / engine.net
    name = engine_file(setting.batch)
    facts = {
        "files": {name: sha256_bytes((folder / name).read_bytes())},
        "compute_capabilities": [setting.capability],
    }
    return GpuEngine(folder, engine.models, engine.net, engine.spec, facts)


def timing(setting: Setting, form: str) -> dict[str, Any]:
    """Run what `compiling` left: seconds a batch, and how far the answer is from float32."""
    library = setting.opened_library()
    found = {}
    for net, engine in setting.frozen().items():
        inputs = tile_inputs(engine.spec)
        with closing(OpenVINOBackend()) as host:
            answer = host.load(engine).tile_logits(inputs)
        one = kept(setting, form, engine)
        with CudaDevice() as device, device.active():
            found[net] = measured(device, library, one, setting.batch, inputs, answer)
    return found


def inspecting(setting: Setting, form: str) -> dict[str, Any]:
    """What the library's inspector tells of the layers of what `compiling` left."""
    library = setting.opened_library()
    found = {}
    for net, engine in setting.frozen().items():
        content = kept(setting, form, engine).read(engine_file(setting.batch))
        told = inspect_engine(library, content)
        found[net] = [layer_facts(one) for one in told["Layers"]] if "Layers" in told else told
    return found


def tile_inputs(spec: NetworkSpec) -> dict[str, NDArray[np.float32]]:
    """Inputs of the tile that decides the centre of the bundled phantom, each (1, 1, n, n, n)."""
    scores = z_score(read_scan(demo_folder() / "phantom_23w.nii.gz")).data
    centre = np.zeros(scores.shape, bool)
    centre[tuple(n // 2 for n in scores.shape)] = True
    plan = tiling.plan_tiles(scores.shape, spec, centre)
    return tiling.gather(tiling.pad(scores, plan), plan.starts, spec)


def measured(
    device: Device,
    library: Library,
    engine: GpuEngine,
    batch: int,
    inputs: Mapping[str, NDArray[np.float32]],
    answer: NDArray[np.float32],
) -> dict[str, Any]:
    """Run an engine over batches of one tile; `device` is active."""
    messages = Messages()
    logger = library.logger(messages)
    begun = time.perf_counter()
    try:
        runtime = library.trt.Runtime(logger)
    except (RuntimeError, TypeError) as error:  # pybind11's words for a null runtime
        raise DeviceError(f"{library.name} does not start ({messages.reason})") from error
    means = {"library": library, "runtime": runtime, "messages": messages, "device": device}
    with (
        closing(Chain(device)) as chain,
        closing(NetworkSession(engine, batch, **means)) as session,
    ):
        # Where the library captures a graph, the third run is the first that replays it.
        for _ in range(3):
            logits = chain.evaluate(session, inputs)
        return {
            "batch": batch,
            "seconds_to_the_third_run": time.perf_counter() - begun,
            "seconds_a_batch": row_seconds(device, session.enqueue),
            "scratch_bytes": session.scratch_bytes,
            **likeness(logits, answer),
        }


def row_seconds(device: Device, action: Callable[[], None]) -> float:
    """Seconds of one of a row of actions, in the fastest of some rows, by the device's clock."""
    begun, ended = device.event(), device.event()
    seconds = []
    for _ in range(1 + ROWS):  # the first one warms up
        device.record(begun)
        for _ in range(ROW):
            action()
        device.record(ended)
        device.synchronize()
        seconds.append(device.seconds(begun, ended) / ROW)
    return min(seconds[1:])


def likeness(logits: NDArray[np.float32], answer: NDArray[np.float32]) -> dict[str, Any]:
    """How near the logits of a batch are to the answer of its one tile; JSON has no NaN."""
    finite = np.isfinite(logits)
    return {
        "not_finite": int((~finite).sum()),
        "labels_equal": float(((logits > 0) == (answer > 0)).mean()),
        "largest_difference": float(np.abs(logits - answer).max()) if finite.all() else None,
    }


def layer_facts(layer: Any) -> Any:
    """A layer's name, kernel and the like, and its results; neither its operands nor weights."""
    if not isinstance(layer, dict):
        return layer
    return {
        name: value
        for name, value in layer.items()
        if name == "Outputs" or isinstance(value, str | int | float)
    }


def fastest(
    timed: Mapping[str, Mapping[str, Any]], tiles: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """By network: which form is fastest, and the seconds that all tiles take in each.

    Parameters
    ----------
    timed : mapping
        What `timing` found, by form.
    tiles : mapping of str to int
        By network.
    """
    found = {}
    for net, count in tiles.items():
        seconds = {
            form: -(-count // one[net]["batch"]) * one[net]["seconds_a_batch"]
            for form, one in timed.items()
        }
        found[net] = {"form": min(seconds, key=lambda form: seconds[form]), "seconds": seconds}
    return found
