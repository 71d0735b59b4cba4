"""What ``make gpu-check`` runs: latency, then the GPU tests, into one JSON under bench/results/.

    python bench/gpu_check.py [--models demo] [--library NAME] [--runs 20]
        [--no-tests] [--json FILE]

Needs an NVIDIA GPU, pycuda, and TensorRT-RTX or TensorRT. With PyTorch installed it also times the
same networks there (float16, eager and compiled); without it those figures stay empty, and the file
names the command that fills them. The GPU's ceilings are one large matrix product by the same
library and one large copy. ``own_part`` is the same chain with nothing in the networks' place; it,
the kernels' tests and PyTorch's figures are there also where the engines are refused.

The scan is the bundled phantom on 200 x 200 x 180 voxels. Network time is BDN over all of it plus
CGM in a box of 30 % of it. Not run on a GPU yet; the PyTorch network was compared with trtseg's own
evaluation on a CPU (bench/torch_network.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtseg import __version__, tiling
from trtseg.architecture import NETWORKS, NetworkSpec
from trtseg.backends.tensorrt import TensorRTBackend, TensorRTNetwork
from trtseg.backends.tensorrt_library import Messages, open_library
from trtseg.bench import summary
from trtseg.build.builder import build_models
from trtseg.build.forms import cost, form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.tensorrt import build_gpu_models, inspect_engine
from trtseg.cuda.chain import Chain, ChainOutput
from trtseg.cuda.device import CudaDevice, list_gpus
from trtseg.engine import WEIGHTS, Engine
from trtseg.errors import TrtsegError
from trtseg.files import atomic_write_json
from trtseg.gpu_engine import GpuEngine, capability_text, engine_file
from trtseg.home import demo_folder, engines_root
from trtseg.models import find_models
from trtseg.nifti import read_scan, scan_from_array, write_labels

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SHAPE = (200, 200, 180)
FRACTION = 0.3
TORCH = "pip install torch, then make gpu-check"


def main() -> int:
    """Run everything asked for; the exit code says whether all of it went well."""
    options = parsed()
    try:
        gpu = list_gpus()[0]
        compiled, frozen = built(options)
    except TrtsegError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    report = Report(options.json or RESULTS / f"gpu_{gpu.name.replace(' ', '_')}.json")
    report.add(
        gpu={
            "name": gpu.name,
            "compute_capability": capability_text(gpu.compute_capability),
            "memory_bytes": gpu.memory,
            "driver": driver_version(),
        },
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        trtseg=__version__,
        library=compiled["bdn"].manifest["library"],
        form={net: one.manifest["form"] for net, one in compiled.items()},
        models=options.models,
    )
    measure_all(report, options, compiled, frozen)
    print(json.dumps(report.found, indent=2))
    print(f"written to {report.path}")
    tests = report.found.get("tests")
    untested = tests is None or tests["failed"] > 0 or tests["passed"] == 0
    return int(bool(report.failed) or (untested and not options.no_tests))


class Report:
    """What was found so far, on disk after every part of it: a crash costs no more than one part.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **parts: Any) -> None:
        """Keep more."""
        self.found |= parts
        atomic_write_json(self.path, self.found)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Keep what `action` gives, or, under ``failed``, why it gave nothing."""
        print(f"{name} ...", flush=True)
        try:
            self.add(**{name: action()})
        except Exception as error:  # noqa: BLE001 (whatever it is, the other parts go on)
            self.failed[name] = f"{type(error).__name__}: {error}"
            self.add(failed=self.failed)
            print(f"{name} failed: {self.failed[name]}", file=sys.stderr, flush=True)
        return self.found.get(name)


def parsed() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default="demo")
    parser.add_argument("--library", help="tensorrt_rtx or tensorrt; default what suits the GPU")
    parser.add_argument("--runs", type=int, default=20, help="warm runs")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="default bench/results/gpu_<name>.json")
    return parser.parse_args()


def measure_all(
    report: Report,
    options: argparse.Namespace,
    compiled: dict[str, GpuEngine],
    frozen: dict[str, Engine],
) -> None:
    """Every part, the first to be known first; where the engines are refused, all the others."""
    report.attempt("validity", lambda: {net: validity(one) for net, one in compiled.items()})
    raw = fitted(read_scan(demo_folder() / "phantom_23w.nii.gz").data, SHAPE)
    mask = box(SHAPE, FRACTION)
    tiles = {
        "bdn": len(tiling.plan_tiles(SHAPE, compiled["bdn"].spec)),
        "cgm": len(tiling.plan_tiles(SHAPE, compiled["cgm"].spec, mask)),
    }
    report.add(shape=SHAPE, brain_fraction=float(mask.mean()), tiles=tiles)
    latency = report.attempt("latency", lambda: latencies(compiled, raw, mask, options.runs))
    best = report.attempt("ceilings", lambda: ceilings(compiled))
    batch = compiled["bdn"].batches[-1] if latency is None else latency["batch"]
    report.attempt("own_part", lambda: own_part(compiled, raw, mask, batch, options.runs))
    files = report.attempt("files", lambda: file_times(raw))
    torch = report.attempt("torch", lambda: torch_figures(compiled, frozen, tiles, batch))
    if None not in (latency, best, files):
        report.attempt("ratios", lambda: ratios(compiled, tiles, latency, best, files, torch))
    report.attempt("layers", lambda: {net: layers(one) for net, one in compiled.items()})
    if not options.no_tests:
        report.attempt("tests", run_tests)


def validity(engine: GpuEngine) -> dict[str, Any] | None:
    """What the library says of an engine on this GPU, whatever trtseg's own check says."""
    library, messages = open_library(engine.manifest["library"]["name"]), Messages()
    if not library.has_engine_validity:
        return None
    logger = library.logger(messages)
    try:
        runtime = library.trt.Runtime(logger)
    except (RuntimeError, TypeError) as error:  # pybind11's words for a null runtime
        return {"runtime": str(error), "said": messages.errors}
    found, diagnostics = runtime.get_engine_validity(engine.read(engine_file(engine.batches[0])))
    return {"validity": found.name, "diagnostics": int(diagnostics), "said": messages.errors}


def layers(engine: GpuEngine) -> dict[str, Any]:
    """What the library's inspector tells of the engine of the largest batch: what it fused."""
    library = open_library(engine.manifest["library"]["name"])
    return inspect_engine(library, engine.read(engine_file(engine.batches[-1])))


def built(options: argparse.Namespace) -> tuple[dict[str, GpuEngine], dict[str, Engine]]:
    """The compiled networks and what they were compiled from; builds what is missing or stale."""
    root, chosen = engines_root(), find_models(options.models)
    frozen = {one.net: one for one in build_models(chosen, root, force=False, report=print)}
    compiled = build_gpu_models(chosen, root, library=options.library, report=print)
    return {one.net: one for one in compiled}, frozen


def run_tests() -> dict[str, int]:
    """Numbers of the GPU tests that passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-s", f"--junitxml={path}", "tests/gpu"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not path.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and without a report")
        suite = ET.parse(path).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }


def driver_version() -> str | None:
    """Version of the driver by nvidia-smi, where that is installed."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def fitted(voxels: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    """The phantom on a larger grid, reflected at its borders, in Fortran order like a file's."""
    pads = [((n - m) // 2, n - m - (n - m) // 2) for n, m in zip(shape, voxels.shape, strict=True)]
    return np.asfortranarray(np.pad(voxels, pads, "reflect"))


def box(shape: tuple[int, int, int], fraction: float) -> NDArray[np.bool_]:
    """A centred box of about that part of the volume."""
    mask = np.zeros(shape, bool)
    sides = [round(n * fraction ** (1 / 3)) for n in shape]
    where = tuple(
        slice((n - side) // 2, (n - side) // 2 + side) for n, side in zip(shape, sides, strict=True)
    )
    mask[where] = True
    return mask


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    begun = time.perf_counter()
    result = action()
    return time.perf_counter() - begun, result


class NoNetwork:
    """Stands in a network's place (`trtseg.cuda.chain.Executor`) and says that nothing is brain."""

    scratch_bytes = 1

    def __init__(self, device: CudaDevice, net: str, spec: NetworkSpec, batch: int) -> None:
        self.device, self.net, self.spec, self.batch = device, net, spec, batch
        self.logit = 0

    def bind(self, tensors: Mapping[str, int], scratch: int) -> None:  # noqa: ARG002
        """Take the address of the logits."""
        self.logit = tensors["logit"]

    def enqueue(self) -> None:
        """Clear the logits."""
        self.device.zero(self.logit, 4 * self.batch * self.spec.out**3)


def own_part(
    compiled: dict[str, GpuEngine],
    raw: NDArray[Any],
    mask: NDArray[np.bool_],
    batch: int,
    runs: int,
) -> dict[str, Any]:
    """The chain's stages with nothing in the networks' place: needs no engine that runs here."""
    bdn = compiled["bdn"]
    with CudaDevice() as device, device.active():
        device.load_kernels({name: bdn.read(name) for name in bdn.kernels})
        chain = Chain(device)
        networks = [NoNetwork(device, net, one.spec, batch) for net, one in compiled.items()]
        chain.segment(raw, *networks)
        whole = warm(lambda: chain.segment(raw, *networks), runs)
        chain.segment(raw, *networks, mask=mask)
        boxed = warm(lambda: chain.segment(raw, *networks, mask=mask), runs)
        chain.close()
    return {"batch": batch, "without_mask": whole, "with_mask": boxed}


def opened(compiled: dict[str, GpuEngine]) -> tuple[TensorRTBackend, dict[str, TensorRTNetwork]]:
    """A backend with both networks."""
    backend = TensorRTBackend()
    try:
        return backend, {net: backend.load(compiled[net]) for net in NETWORKS}
    except TrtsegError:
        backend.close()
        raise


def latencies(
    compiled: dict[str, GpuEngine], raw: NDArray[Any], mask: NDArray[np.bool_], runs: int
) -> dict[str, Any]:
    """Starts, and warm runs with and without a given mask, stage by stage."""
    first_start, (backend, _) = timed(lambda: opened(compiled))
    backend.close()
    start, (backend, networks) = timed(lambda: opened(compiled))
    try:
        first, _ = timed(lambda: backend.segment_chain(raw))
        backend.segment_chain(raw, mask=mask)
        whole = warm(lambda: backend.segment_chain(raw), runs)
        boxed = warm(lambda: backend.segment_chain(raw, mask=mask), runs)
        batch = networks["bdn"].batch
        description = backend.description
    finally:
        backend.close()
    network = whole["stages"]["brain"]["p50_s"] + boxed["stages"]["cortex"]["p50_s"]
    return {
        "backend": description,
        "batch": batch,
        "seconds_first_start": first_start,
        "seconds_start": start,
        "seconds_first_scan": first,
        "without_mask": whole,
        "with_mask": boxed,
        "seconds_network": network,
        "voxels_per_second": raw.size / network,
    }


def ceilings(compiled: dict[str, GpuEngine]) -> dict[str, float]:
    """What the GPU reaches at its best."""
    backend, _ = opened(compiled)
    try:
        return dataclasses.asdict(backend.ceilings())
    finally:
        backend.close()


def warm(action: Callable[[], ChainOutput], runs: int) -> dict[str, Any]:
    """Host seconds of warm runs, and device seconds of their stages."""
    pairs = [timed(action) for _ in range(runs)]
    stages = {
        name: summary([output.times[name] for _, output in pairs]) for name in pairs[0][1].times
    }
    return {"runs": runs, "seconds": summary([seconds for seconds, _ in pairs]), "stages": stages}


def file_times(raw: NDArray[Any]) -> dict[str, float]:
    """Seconds to read the scan from a .nii.gz, and to write two label maps."""
    scan = scan_from_array(raw, np.diag([0.8, 0.8, 0.8, 1.0]))
    labels = box(SHAPE, FRACTION).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        import nibabel

        nibabel.save(nibabel.Nifti1Image(raw, scan.geometry.affine), path)
        read, _ = timed(lambda: read_scan(path))
        write, _ = timed(
            lambda: [
                write_labels(Path(folder) / f"{net}.nii.gz", labels, scan.geometry)
                for net in NETWORKS
            ]
        )
    return {"seconds_read": read, "seconds_write": write}


def torch_figures(
    compiled: dict[str, GpuEngine],
    frozen: dict[str, Engine],
    tiles: dict[str, int],
    batch: int,
) -> dict[str, Any] | None:
    """Both networks in PyTorch float16 over as many tiles."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    figures: dict[str, Any] = {"version": torch.__version__}
    for name in ("eager", "compiled"):
        seconds = {}
        for net, engine in frozen.items():
            per_batch = torch_batch(torch, engine, compiled[net].spec, batch, name == "compiled")
            seconds[net] = per_batch * math.ceil(tiles[net] / batch)
        figures[f"seconds_{name}"] = sum(seconds.values())
        figures[f"seconds_{name}_by_network"] = seconds
    return figures


def fastest(torch: Any, action: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of some runs, by the GPU's clock, after three to warm up."""
    for _ in range(3):
        action()
    best = math.inf
    for _ in range(repeats):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        action()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, begun.elapsed_time(ended) * 1e-3)
    return best


def torch_batch(
    torch: Any, engine: Engine, spec: NetworkSpec, batch: int, compile_it: bool
) -> float:
    """Seconds of one batch of tiles in the published form, in the faster of two memory orders."""
    from torch_network import TorchNetwork

    weights = FrozenNetwork.from_bytes(engine.read(WEIGHTS), spec)
    torch.backends.cudnn.benchmark = True  # the fastest kernels that cuDNN has, as users set it
    seconds = []
    for order in (torch.contiguous_format, torch.channels_last_3d):
        network = TorchNetwork(form_graph(weights, "plain", batch=batch)).cuda().eval()
        for buffer in network.buffers():
            if buffer.dim() == 5:
                buffer.data = buffer.data.contiguous(memory_format=order)
        run = torch.compile(network) if compile_it else network
        inputs = [
            torch.randn(batch, 1, side, side, side, device="cuda").to(memory_format=order)
            for side in spec.input_sizes().values()
        ]
        with torch.inference_mode():
            seconds.append(fastest(torch, lambda run=run, inputs=inputs: run(*inputs)))
    return min(seconds)


def ratios(
    compiled: dict[str, GpuEngine],
    tiles: dict[str, int],
    latency: dict[str, Any],
    best: dict[str, float],
    file_seconds: dict[str, float],
    torch: dict[str, Any] | None,
) -> dict[str, Any]:
    """The figures that the targets are stated in; None where PyTorch was not there to measure."""
    network = latency["seconds_network"]
    # Either of the two scans holds one of the networks; what is not network counts once, with the
    # files.
    whole = latency["without_mask"]
    rest = whole["seconds"]["p50_s"] - whole["stages"]["brain"]["p50_s"]
    rest -= whole["stages"]["cortex"]["p50_s"]
    files = sum(file_seconds.values())
    work = {net: cost(one.spec, one.manifest["form"]) for net, one in compiled.items()}
    operations = sum(2 * work[net].multiply_adds * tiles[net] for net in work)
    moved = sum(work[net].bytes * tiles[net] for net in work)
    found: dict[str, Any] = {
        "operations": operations,
        "bytes": moved,
        "operations_per_second": operations / network,
        "bytes_per_second": moved / network,
        "end_to_end_to_network": (network + rest + files) / network,
        "chain_to_network": (network + rest) / network,
        "torch_eager_to_network": None,
        "torch_compiled_to_network": None,
    }
    floor = max(
        operations / best["operations_per_second"],
        moved / best["bytes_per_second"],
    )
    found |= {"seconds_floor": floor, "network_to_floor": network / floor}
    if torch is None:
        return {**found, "missing": f"torch_*: {TORCH}"}
    return {
        **found,
        "torch_eager_to_network": torch["seconds_eager"] / network,
        "torch_compiled_to_network": torch["seconds_compiled"] / network,
    }


if __name__ == "__main__":
    sys.exit(main())
