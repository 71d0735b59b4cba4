"""Frozen weights -> GPU engines: compiled by TensorRT-RTX, or by TensorRT 10 or 11.

One builder for all of them: what differs is asked of the library by name (see
`trtseg.backends.tensorrt_library`). TensorRT-RTX compiles with no GPU present, for every GPU it
supports, and leaves the choice of kernels to the first run; TensorRT times kernels on the GPU it
compiles on, for GPUs like that one. Engines of TensorRT-RTX were compiled by this code but not run
on a GPU yet; of TensorRT 10 and 11 only the Python bindings were there (scripts/gpu-layers).

Engines compute in float16, and their last layer in float32. What that costs is evaluated on the CPU
at build time, on the tile that the self-test will run (see `trtseg.build.half`), with float32 sums
and, since the library may choose kernels that sum so, with float16 sums. Both are stored with the
engine, and the self-test judges it by the worse. Operations whose weights or, on that tile, results
leave float16's range are kept in float32, and the manifest tells of which layers they are.
"""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg import __version__, tiling
from trtseg.architecture import NETWORKS
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.openvino_library import version as openvino_version
from trtseg.backends.tensorrt_library import (
    LIBRARIES,
    Messages,
    installed_libraries,
    open_library,
)
from trtseg.build import graph
from trtseg.build.forms import check_form, cost, default_form, form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.half import LARGEST_HALF, PRODUCTS, Evaluator, fit
from trtseg.cuda.ceilings import FACTORS, PRODUCT, SIDE
from trtseg.cuda.compile import (
    ARCHITECTURES,
    VIRTUAL,
    compile_kernels,
    find_compiler,
    kernel_source,
)
from trtseg.cuda.device import list_gpus
from trtseg.engine import WEIGHTS, build_lock, load_engine
from trtseg.errors import DeviceError, EngineError, UsageError
from trtseg.files import sha256_bytes
from trtseg.gpu_engine import (
    ANSWER,
    BATCHES,
    CEILING,
    SELFTEST,
    cache_key,
    capability_text,
    covers,
    engine_file,
    load_gpu_engine,
    write_gpu_engine,
)
from trtseg.home import demo_folder
from trtseg.nifti import read_scan
from trtseg.normalise import z_score

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trtseg.architecture import NetworkSpec
    from trtseg.backends.tensorrt_library import Library
    from trtseg.build.half import Evaluation, Fit
    from trtseg.cuda.compile import Compiler
    from trtseg.engine import Engine
    from trtseg.gpu_engine import GpuEngine
    from trtseg.models import ModelSet

    #: Called with a line that says what is being done.
    Report = Callable[[str], None]

PRECISION = "float16, last layer float32"

#: GPUs that an engine of TensorRT-RTX runs on where none are named: these and later ones (NVIDIA's
#: "TensorRT-RTX 1.5 Support Matrix"). Turing must be named, and costs the others speed.
PORTABLE = ("8.6", "8.9", "12.0")
TURING = "7.5"

#: Device memory that the builder may use for any one layer. TensorRT-RTX treats a whole network as
#: one layer, whose tensors lie in it: 820 MB at a batch of 16.
WORKSPACE_BYTES = 4 << 30

#: An engine's logits in the self-test may differ from float32 by this many times what float16 does
#: on the CPU, with float32 sums or with float16 ones, whichever does more: kernels sum in another
#: order and round elsewhere. Measured with the demo weights (CGM, BDN; logits): float32 sums 0.009,
#: 0.006; float16 sums 0.035, 0.009, which makes the limits 0.071, 0.018. They let pass sums rounded
#: twice as often, in any of four orders (at most 0.059, 0.017), and neither bfloat16 in float16's
#: place (0.085, 0.028) nor, in any of three layers, a convolution that misses a tap (at least 0.60,
#: 0.16) or an input channel of middling weight (0.42, 0.070), or swaps two outputs (0.14, 0.071).
_SLACK = 2.0

#: And by this much besides (in logits; as a part of the labels), should rounding do nothing there.
_FLOOR = 1e-3

#: Least time between two reports of progress: a log of a build of minutes stays short.
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine and how it came to be.

    Attributes
    ----------
    content : bytes
    seconds : float
        Compile time.
    messages : Messages
        All that the library logged; `layer_report` reads it.
    """

    content: bytes
    seconds: float
    messages: Messages


def build_gpu_models(
    models: ModelSet,
    root: Path,
    *,
    library: str | None = None,
    batches: Sequence[int] = BATCHES,
    form: str | None = None,
    compute_capabilities: Sequence[str] = (),
    force: bool = False,
    report: Report | None = None,
    compiler: Compiler | None = None,
) -> list[GpuEngine]:
    """Compile both networks of a model set for GPUs, from their build under ``root/<models>/``.

    Parameters
    ----------
    models : ModelSet
    root : Path
        The engines folder; the model set must be built there (`trtseg.build.builder`).
    library : str, optional
        ``tensorrt_rtx`` or ``tensorrt``; default the first that is installed and has code for the
        GPU of this machine, if it has one.
    batches : sequence of int
        Tiles per run; one engine each.
    form : str, optional
        One of `trtseg.build.forms.FORMS`; default what that module estimates to be fastest.
    compute_capabilities : sequence of str
        GPUs to compile for, such as ``"7.5"``, where the library compiles without a GPU; default
        `PORTABLE` and later ones, or Turing where that is the GPU of this machine.
    force : bool
        Compile even where an intact engine of the same recipe is there already.
    report : callable, optional
        Told of each step.
    compiler : trtseg.cuda.compile.Compiler, optional
        What compiles trtseg's own kernels; default `find_compiler()`.

    Returns
    -------
    list of GpuEngine
        BDN, CGM.

    Raises
    ------
    UsageError
        A form, library, batch or compute capability that does not exist.
    DeviceError
        The library is not installed, or needs a GPU that is not there.
    EngineError
        The build it starts from is missing, stale or damaged; the library refuses the network; or
        the network leaves float16's range in every convolution.
    MissingExtraError
        onnx or a compiler for the kernels is not installed.
    OutputError
        The folder cannot be written.
    """
    say = report or (lambda _: None)
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise UsageError(f"batches {list(batches)}", expected="different numbers of at least 1")
    if form is not None:
        check_form(form)
    opened = open_library(library or _library_for_this_gpu())
    targets = _targets(opened, compute_capabilities)
    plan = _Plan(opened, tuple(sorted(batches)), form, targets, _Kernels(compiler))
    with build_lock(root, models.name, say):
        return [
            _build(
                load_engine(root, models.name, net, checkpoint=models.digests(net)),
                root,
                plan,
                force,
                say,
            )
            for net in NETWORKS
        ]


class _Kernels:
    """trtseg's own kernels, which are the same for both networks and compiled when first needed."""

    def __init__(self, compiler: Compiler | None) -> None:
        self._compiler = compiler or find_compiler()

    @property
    def recipe(self) -> dict[str, Any]:
        """What they follow from."""
        return {
            "compiler": self._compiler.name,
            "targets": [VIRTUAL, *ARCHITECTURES],
            "source_sha256": sha256_bytes(kernel_source().encode()),
        }

    @cached_property
    def files(self) -> dict[str, bytes]:
        """File name to content."""
        return compile_kernels(self._compiler)


@dataclass(frozen=True)
class _Targets:
    """Compute capabilities: what the library is told, and what the manifest says."""

    named: tuple[str, ...]
    listed: tuple[str, ...]
    later_than: str | None


@dataclass(frozen=True)
class _Plan:
    """What is to be compiled, whatever the network."""

    library: Library
    batches: tuple[int, ...]
    form: str | None
    targets: _Targets
    kernels: _Kernels

    @cached_property
    def ceiling(self) -> bytes:
        """The engine by whose rate the GPU's ceiling is measured."""
        product = graph.matrix_product(SIDE, FACTORS, PRODUCT)
        named = self.targets.named
        return build_engine(self.library, product, compute_capabilities=named).content


def _library_for_this_gpu() -> str | None:
    """TensorRT, where that is installed and TensorRT-RTX has no code for this machine's GPU."""
    here = _this_gpu()
    if here is None or covers((TURING, *PORTABLE), PORTABLE[-1], here):
        return None
    return "tensorrt" if "tensorrt" in installed_libraries() else None


def _this_gpu() -> tuple[int, int] | None:
    """Compute capability of this machine's first GPU, if it has one that can be used."""
    try:
        return list_gpus()[0].compute_capability
    except DeviceError:
        return None


def _targets(library: Library, wanted: Sequence[str]) -> _Targets:
    if library.compiles_without_gpu:
        known = library.compute_capabilities
        for one in wanted:
            if one not in known:
                raise UsageError(
                    f"compute capability {one} with {library.name} {library.version}",
                    expected=", ".join(known),
                    action=f"choose one of them, or for other GPUs: {LIBRARIES['tensorrt']}, and "
                    "--library tensorrt on the machine with the GPU",
                )
        here = _this_gpu()
        turing = here is not None and capability_text(here) == TURING
        named = tuple(wanted) or ((TURING,) if turing else ())
        return _Targets(named, named, None) if named else _Targets((), PORTABLE, PORTABLE[-1])
    if wanted:
        raise UsageError(
            f"compute capability {', '.join(wanted)} with {library.name}",
            expected="none: it compiles for the GPU of the machine it runs on",
        )
    return _Targets((), (capability_text(list_gpus()[0].compute_capability),), None)


def _build(engine: Engine, root: Path, plan: _Plan, force: bool, say: Report) -> GpuEngine:
    spec = engine.spec
    form = plan.form or default_form(spec)
    recipe = _recipe(engine, plan, form)
    there = None if force else _intact(engine, root, recipe)
    if there is not None:
        return there

    def tell(step: str) -> None:
        say(f"{engine.net.upper()}: {step}")

    network = FrozenNetwork.from_bytes(engine.read(WEIGHTS), spec)
    tell("evaluating float16 rounding on the CPU")
    inputs = _demo_tile(spec)
    fitted = _fit(engine, network, form, inputs)
    if fitted.layers:
        kept = ", ".join(f"{label} ({', '.join(parts)})" for label, parts in fitted.layers.items())
        tell(f"kept in float32, near or beyond float16's range: {kept}")
    content = form_graph(network, form, batch=1, wide=fitted.wide)
    coarse = Evaluator(content, PRODUCTS).run(inputs)
    selftest, evidence = _selftest(engine, inputs, fitted.evaluation, coarse)
    files = {SELFTEST: selftest, CEILING: plan.ceiling, **plan.kernels.files}
    engines, seconds = _compiled(network, form, fitted, plan, tell)
    return write_gpu_engine(
        root,
        engine.models,
        engine.net,
        spec=spec,
        files={**files, **engines},
        facts={
            "recipe": recipe,
            "checkpoint": engine.manifest["checkpoint"],
            "library": {"name": plan.library.name, "version": plan.library.version},
            "compute_capabilities": plan.targets.listed,
            "later_than": plan.targets.later_than,
            "batches": plan.batches,
            "form": form,
            "precision": PRECISION,
            "float32_layers": fitted.layers,
            "selftest": _limits(evidence),
            "float16_on_cpu": evidence,
            "notice": engine.notice,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "compile_seconds": seconds,
            "cost": dataclasses.asdict(cost(spec, form)),
            "versions": _versions(plan.library),
        },
    )


def _intact(engine: Engine, root: Path, recipe: Mapping[str, Any]) -> GpuEngine | None:
    """What was compiled of the same recipe before, if it can still be used."""
    frozen_sha256 = engine.manifest["files"][WEIGHTS]
    try:
        there = load_gpu_engine(root, engine.models, engine.net, frozen_sha256=frozen_sha256)
    except EngineError:
        return None  # missing, stale, damaged or foreign: all are mended by compiling
    return there if there.manifest["cache_key"] == cache_key(recipe) else None


def _compiled(
    network: FrozenNetwork, form: str, fitted: Fit, plan: _Plan, say: Report
) -> tuple[dict[str, bytes], dict[str, float]]:
    """An engine per batch, by file name, and the seconds that each took, by batch."""
    files, seconds = {}, {}
    for batch in plan.batches:
        say(f"compiling for {batch} tile{'s' * (batch > 1)} at a time")
        built = build_engine(
            plan.library,
            form_graph(network, form, batch=batch, wide=fitted.wide),
            compute_capabilities=plan.targets.named,
            report=_paced(lambda phase, part: say(f"{phase}, {part:.0%}")),
        )
        files[engine_file(batch)] = built.content
        seconds[str(batch)] = round(built.seconds, 3)
    return files, seconds


def _versions(library: Library) -> dict[str, str]:
    return {
        "trtseg": __version__,
        library.name: library.version,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": graph.version(),
        "openvino": openvino_version(),
    }


def _paced(report: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """Pass on a report of progress every few seconds, and none of a build that is quick."""
    last = time.monotonic()

    def tell(phase: str, part: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            report(phase, part)

    return tell


def _recipe(engine: Engine, plan: _Plan, form: str) -> dict[str, Any]:
    """All that the files follow from: the same recipe makes the same network."""
    return {
        "trtseg": __version__,
        "architecture": engine.spec.to_dict(),
        "checkpoint": engine.manifest["checkpoint"],
        "frozen_sha256": engine.manifest["files"][WEIGHTS],
        "library": [plan.library.name, plan.library.version],
        "precision": PRECISION,
        "form": form,
        "batches": list(plan.batches),
        "compute_capabilities": list(plan.targets.listed),
        "later_than": plan.targets.later_than,
        "workspace_bytes": WORKSPACE_BYTES,
        "kernels": plan.kernels.recipe,
        "ceiling": SIDE,
        "selftest": {"slack": _SLACK, "floor": _FLOOR, "float16_sums": PRODUCTS},
    }


def _fit(
    engine: Engine, network: FrozenNetwork, form: str, inputs: Mapping[str, NDArray[np.float32]]
) -> Fit:
    """Find what must be kept in float32."""
    fitted = fit(lambda wide: form_graph(network, form, batch=1, wide=wide), inputs)
    evaluation = fitted.evaluation
    if np.isfinite(evaluation.result).all() and fitted.convolutions:
        return fitted
    # What overflows may turn to NaN later on; the overflow itself is a number.
    reached = np.fmax.reduce([*evaluation.largest.values(), *evaluation.kept.values()])
    name = f"{engine.models} {engine.net.upper()}"
    raise EngineError(
        f"{name}: activations reach {reached:.3g}, with {fitted.convolutions} convolutions in "
        "float16",
        expected=f"finite logits, and one at least within the range of float16, {LARGEST_HALF:g}",
        action="run this model set on the CPU: --device cpu",
    )


def _selftest(
    engine: Engine,
    inputs: Mapping[str, NDArray[np.float32]],
    rounded: Evaluation,
    coarse: Evaluation,
) -> tuple[bytes, dict[str, Any]]:
    """The self-test's file, and what float16 does to its tile on the CPU, by the kind of sums."""
    answer = OpenVINOBackend().load(engine).tile_logits(inputs)
    evidence = {
        **_difference(rounded, answer),
        "largest_activation": max(rounded.largest.values()),
        "float16_sums": {"products": PRODUCTS, **_difference(coarse, answer)},
    }
    stream = io.BytesIO()
    arrays: dict[str, Any] = {**inputs, ANSWER: answer}
    np.savez(stream, **arrays)
    return stream.getvalue(), evidence


def _difference(evaluation: Evaluation, answer: NDArray[np.float32]) -> dict[str, float]:
    logits = evaluation.result[0]
    return {
        "labels_equal": float(((logits > 0) == (answer > 0)).mean()),
        "largest_difference": float(np.abs(logits - answer).max()),
    }


def _limits(evidence: Mapping[str, Any]) -> dict[str, float]:
    """What an engine must reach in the self-test; see `GpuEngine.check_selftest`."""
    found = (evidence, evidence["float16_sums"])
    missed = max(1.0 - one["labels_equal"] for one in found)
    largest = max(one["largest_difference"] for one in found)
    return {
        "labels_equal": max(0.0, 1.0 - _SLACK * missed - _FLOOR),
        "largest_difference": _SLACK * largest + _FLOOR,
    }


def _demo_tile(spec: NetworkSpec) -> dict[str, NDArray[np.float32]]:
    """Inputs of the tile nearest the centre of the bundled phantom, each (1, 1, n, n, n)."""
    scan = z_score(read_scan(demo_folder() / "phantom_23w.nii.gz"))
    plan = tiling.plan_tiles(scan.shape, spec)
    centre = (np.array(plan.padded_shape) - spec.tile) / 2
    nearest = int(np.abs(plan.starts - centre).sum(axis=1).argmin())
    return tiling.gather(tiling.pad(scan.data, plan), plan.starts[nearest : nearest + 1], spec)


def build_engine(
    library: Library,
    onnx: bytes,
    *,
    compute_capabilities: Sequence[str] = (),
    detailed: bool = False,
    report: Callable[[str, float], None] | None = None,
) -> BuiltEngine:
    """Compile one graph of fixed shapes.

    Parameters
    ----------
    library : Library
    onnx : bytes
        From `trtseg.build.forms.form_graph` with a number as its batch.
    compute_capabilities : sequence of str
        GPUs to compile for, where the library compiles without one; default its own choice.
    detailed : bool
        Whether the engine tells of each of its layers, which costs a little at every run.
    report : callable, optional
        Told of the phase and the part of it that is done, where the library reports progress.

    Returns
    -------
    BuiltEngine

    Raises
    ------
    DeviceError
        The library needs a GPU that is not there, or lacks a member asked for.
    EngineError
        It cannot read or compile the graph; the message names the node where it knows it.
    """
    trt, messages = library.trt, Messages()
    logger = library.logger(messages)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # pybind11's words for a null builder
        raise DeviceError(
            f"{library.name} {library.version} cannot start ({messages.reason})",
            expected="an NVIDIA GPU with its driver: this library compiles on the GPU",
            action="build on the machine that has the GPU, or use TensorRT-RTX: "
            "pip install 'trtseg[rtx]'",
        ) from error
    network = _network(library, builder)
    _parse(library, network, logger, messages, onnx)
    config = _config(library, builder, messages, compute_capabilities, detailed, report)
    begun = time.perf_counter()
    built = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - begun
    messages.raise_if_interrupted()
    if built is None:
        raise EngineError(
            f"{library.name} {library.version} cannot compile the network ({messages.reason})",
            expected="a network it supports, and a GPU with enough memory where it needs one",
            action="try another graph form (--form), or run with --device cpu",
        )
    return BuiltEngine(bytes(built), seconds, messages)


def _network(library: Library, builder: Any) -> Any:
    """Make an empty, strongly typed network: 10 must be asked, 11 and RTX ignore the flag."""
    strong = library.flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    return builder.create_network(1 << int(strong))


def _parse(library: Library, network: Any, logger: Any, messages: Messages, onnx: bytes) -> None:
    parser = library.trt.OnnxParser(network, logger)
    parsed = parser.parse(onnx)
    messages.raise_if_interrupted()
    if parsed:
        return
    failures = [_failure(parser.get_error(number)) for number in range(parser.num_errors)]
    raise EngineError(
        f"{library.name} {library.version} cannot read the graph "
        f"({failures[0] if failures else messages.reason})",
        expected="a graph of operators it supports",
        action="try another graph form (--form), or run with --device cpu",
    )


def _failure(error: Any) -> str:
    """What the parser says, and of which node, unless it is of the whole graph."""
    node = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
    return (node and f"node {node}: ") + " ".join(str(error.desc()).split())


def _config(
    library: Library,
    builder: Any,
    messages: Messages,
    compute_capabilities: Sequence[str],
    detailed: bool,
    report: Callable[[str, float], None] | None,
) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(library.flag("MemoryPoolType", "WORKSPACE"), WORKSPACE_BYTES)
    # What is float32 is meant to be: TF32 would round its factors to 10 bits.
    config.clear_flag(library.flag("BuilderFlag", "TF32"))
    if library.has_user_allocation:
        # Nothing is allocated while it runs, so that a CUDA graph of it can be captured.
        config.set_flag(library.flag("BuilderFlag", "REQUIRE_USER_ALLOCATION"))
    if detailed:
        config.profiling_verbosity = library.flag("ProfilingVerbosity", "DETAILED")
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for number, one in enumerate(compute_capabilities):
            target = library.flag("ComputeCapability", _capability_name(one))
            config.set_compute_capability(target, number)
    if report is not None and library.has_progress_monitor:
        config.progress_monitor = library.progress_monitor(messages, report)
    return config


def _capability_name(capability: str) -> str:
    return f"SM{capability.replace('.', '')}"


def layer_report(built: BuiltEngine) -> str:
    """What the library said of the engine's layers and memory while it compiled; may be empty.

    TensorRT-RTX logs there what its engine inspector tells, with no GPU needed; compile with
    ``detailed=True`` for one line per kernel.
    """
    wanted = ("Layers:", "Engine Layer Information", "Max Scratch Memory", "Total Weights Memory")
    return "\n".join(text for _, text in built.messages.lines if text.startswith(wanted))


def inspect_engine(library: Library, content: bytes) -> dict[str, Any]:
    """What the engine inspector tells of an engine: needs a GPU; not run on one yet.

    Raises
    ------
    DeviceError
        The engine cannot be loaded here.
    """
    messages = Messages()
    logger = library.logger(messages)
    engine = library.trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise DeviceError(
            f"{library.name} {library.version} cannot load the engine ({messages.reason})",
            expected="a GPU the engine was compiled for, with its driver",
            action="see which GPU is there with nvidia-smi",
        )
    form = library.flag("LayerInformationFormat", "JSON")
    information: dict[str, Any] = json.loads(
        engine.create_engine_inspector().get_engine_information(form)
    )
    return information
