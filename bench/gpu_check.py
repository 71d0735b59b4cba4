"""What ``make gpu-check`` runs: all that a GPU can tell, into one JSON under bench/results/.

    python bench/gpu_check.py [--models demo] [--library NAME] [--batch 16] [--runs 20]
        [--only PART ...] [--skip PART ...] [--add] [--limit 1200] [--json FILE]

Needs an NVIDIA GPU and its driver; what else is missing costs the parts that need it, and the file
says what that was. Every part runs in a process of its own and is on disk before the next starts:

    own_part        the chain with nothing in the networks' place (needs pycuda and a compiler)
    files           seconds to read the scan and to write label maps (needs nothing)
    frozen          the networks, built for the CPU where that has not been done
    compiled        those, compiled for this GPU where that has not been done (needs a library)
    validity        what the library says of these engines on this GPU
    latency         the whole chain by stage (needs pycuda, as do ceilings and time_FORM)
    ceilings        one large matrix product by the same library, and one large copy
    kernel_tests    trtseg's own kernels, tested
    torch_eager     the same networks in PyTorch, float16, where that is installed
    compile_FORM, time_FORM, layers_FORM    each graph form: compiled, run and timed, inspected
    fastest_form    which form is fastest, by network
    torch_compiled  PyTorch again, by torch.compile
    ratios          the figures that the targets are stated in
    tests           all tests of the GPU (they compile their own engines: minutes with TensorRT)

The scan is the bundled phantom on 200 x 200 x 180 voxels. Network time is BDN over all of it plus
CGM in a box of 30 % of it. Where PyTorch is not installed its figures are null. The floor among the
ratios is an estimate and no bound: it counts a pass over memory for every activation, as if nothing
were joined and no cache helped (`trtseg.build.forms.cost`).

Not run on a GPU yet; the PyTorch network was compared with trtseg's own evaluation on a CPU
(bench/torch_network.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gpu_forms
import gpu_torch
import numpy as np
from gpu_report import Report, apart
from gpu_setting import FRACTION, SHAPE, Setting, box, phantom

from trtseg import __version__
from trtseg.architecture import NETWORKS, NetworkSpec
from trtseg.backends.tensorrt import TensorRTBackend, TensorRTNetwork
from trtseg.backends.tensorrt_library import Messages, open_library
from trtseg.bench import summary
from trtseg.build.builder import build_models
from trtseg.build.forms import FORMS
from trtseg.build.tensorrt import build_gpu_models
from trtseg.cuda.chain import Chain, ChainOutput
from trtseg.cuda.compile import compile_kernels, find_compiler
from trtseg.cuda.device import CudaDevice
from trtseg.errors import EXIT_DEVICE, EXIT_INTERRUPTED, TrtsegError
from trtseg.gpu_engine import GpuEngine, engine_file
from trtseg.home import engines_root
from trtseg.info import find_gpus
from trtseg.models import find_models
from trtseg.nifti import read_scan, scan_from_array, write_labels

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

#: The GPU's tests that need no engine.
KERNEL_TESTS = "test_z_scores_and_padding or test_tiles_in_and_decisions_out"

#: What the manifest of a compiled network says that is of interest here.
FACTS = (
    "library",
    "form",
    "batches",
    "compute_capabilities",
    "later_than",
    "float32_layers",
    "float16_on_cpu",
    "selftest",
    "cost",
    "compile_seconds",
    "versions",
    "built",
)

FLOOR = (
    "seconds_floor_estimated is no bound: it counts a pass over memory for every activation, as if "
    "nothing were joined and no cache helped, and the rates of one large product and one large copy"
)


def main() -> int:
    """Run everything asked for; the exit code says whether all of it went well."""
    options = parsed()
    driver, gpus = find_gpus()
    if not gpus:
        print("error: the NVIDIA driver is missing or sees no GPU; see nvidia-smi", file=sys.stderr)
        return EXIT_DEVICE
    gpu = gpus[0]
    path = options.json or RESULTS / f"gpu_{gpu['name'].replace(' ', '_')}.json"
    try:
        with tempfile.TemporaryDirectory(prefix="trtseg-") as folder:
            setting = Setting(
                models=options.models,
                library=options.library,
                capability=gpu["compute_capability"],
                batch=options.batch,
                runs=options.runs,
                limit=options.limit,
                folder=Path(folder),
            )
            report = Report(path, add=options.add)
            report.add(
                gpu={**gpu, "driver": driver_version(), "driver_cuda": driver},
                date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                trtseg=__version__,
                models=options.models,
                shape=SHAPE,
                brain_fraction=float(box(SHAPE, FRACTION).mean()),
                tiles=setting.tiles(),
            )
            measure_all(report, setting, options.chosen)
    except TrtsegError as error:  # there is no such model set, or no room for the report
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    shown = {name: one for name, one in report.found.items() if not name.startswith("layers_")}
    print(json.dumps(shown, indent=2))
    print(f"written to {report.path}")
    return int(not all_well(report.found))


def parsed() -> argparse.Namespace:
    """Options of the command line; ``chosen`` are the names of the parts to be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default="demo")
    parser.add_argument("--library", help="tensorrt_rtx or tensorrt; default what suits the GPU")
    parser.add_argument("--batch", type=int, default=16, help="tiles, where that is free to choose")
    parser.add_argument("--runs", type=int, default=20, help="warm runs")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PART", help="such as time_*")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART")
    parser.add_argument("--add", action="store_true", help="to what an earlier call found")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a part may take")
    parser.add_argument("--json", type=Path, help="default bench/results/gpu_<name>.json")
    options = parser.parse_args()
    for pattern in options.only + options.skip:
        if not any(fnmatch(name, pattern) for name in PARTS):
            parser.error(f"no part {pattern!r}; there are {', '.join(PARTS)}")
    options.chosen = [
        name
        for name in PARTS
        if any(fnmatch(name, one) for one in options.only)
        and not any(fnmatch(name, one) for one in options.skip)
    ]
    return options


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes
    ----------
    run : callable
        Called with the setting, in a process of its own.
    needs : tuple of str
        Parts without which it is of no use to try.
    derived : bool
        It follows from what others found, and is called with that, here.
    """

    run: Callable[[Any], Any]
    needs: tuple[str, ...] = ()
    derived: bool = False


def measure_all(report: Report, setting: Setting, chosen: list[str]) -> None:
    """Every chosen part, in order."""
    for name in chosen:
        part = PARTS[name]
        if part.derived:
            call = functools.partial(part.run, report.found)
        else:
            # What a part starts itself, it ends itself, a little earlier.
            call = functools.partial(apart, part.run, setting, limit=setting.limit + 30)
        report.attempt(name, call, needs=part.needs)


def all_well(found: Mapping[str, Any]) -> bool:
    """Whether no part failed, and of the tests that were run some passed and none failed."""
    tests = [found[name] for name in ("kernel_tests", "tests") if name in found]
    return not found.get("failed") and all(one["passed"] and not one["failed"] for one in tests)


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


# The parts


def run_tests(setting: Setting, only: str | None = None) -> dict[str, Any]:
    """Numbers of the GPU's tests that passed, failed and were skipped, and what they said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        options = ["-rP", "-o", "junit_logging=system-out", f"--junitxml={path}"]
        chosen = [] if only is None else ["-k", only]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *chosen, "tests/gpu"],
            cwd=ROOT,
            check=False,
            timeout=setting.limit,
        )
        if not path.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and without a report")
        return outcome(path.read_text(encoding="utf-8"))


def outcome(junit: str) -> dict[str, Any]:
    """What pytest's XML says: counts, why tests failed or were skipped, and what they printed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, skips, said = {}, set(), {}
    for case in ET.fromstring(junit).iter("testcase"):
        name = case.get("name", "")
        wrong = next((one for kind in ("failure", "error") for one in case.iter(kind)), None)
        skipped = case.find("skipped")
        if wrong is not None:
            counts["failed"] += 1
            failures[name] = first_line(wrong.get("message"))
        elif skipped is not None:
            counts["skipped"] += 1
            skips.add(first_line(skipped.get("message")))
        else:
            counts["passed"] += 1
        printed = [line for line in (case.findtext("system-out") or "").splitlines() if line]
        # pytest sets a heading of dashes above what was printed.
        if lines := [line for line in printed if not line.startswith("---")]:
            said[name] = lines
    return {**counts, "failures": failures, "skipped_because": sorted(skips), "said": said}


def first_line(text: str | None) -> str:
    """The first line of a text, cut to 300 characters."""
    return next(iter((text or "").splitlines()), "")[:300]


def own_part(setting: Setting) -> dict[str, Any]:
    """The chain's stages with nothing in the networks' place: needs no engine that runs here."""
    raw, mask = phantom(), box(SHAPE, FRACTION)
    with CudaDevice() as device, device.active():
        compiler = find_compiler()
        device.load_kernels(compile_kernels(compiler))
        chain = Chain(device)
        networks = [
            NoNetwork(device, net, spec, setting.batch) for net, spec in setting.specs().items()
        ]
        chain.segment(raw, *networks)
        whole = warm(lambda: chain.segment(raw, *networks), setting.runs)
        chain.segment(raw, *networks, mask=mask)
        boxed = warm(lambda: chain.segment(raw, *networks, mask=mask), setting.runs)
        chain.close()
    return {
        "compiler": compiler.name,
        "batch": setting.batch,
        "without_mask": whole,
        "with_mask": boxed,
    }


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


def file_times(setting: Setting) -> dict[str, float]:  # noqa: ARG001 (as every part)
    """Seconds to read the scan from a .nii.gz, and to write two label maps."""
    raw = phantom()
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


def frozen(setting: Setting) -> dict[str, Any]:
    """Build what is missing or stale; says how far it is from its checkpoint."""
    built = build_models(find_models(setting.models), engines_root(), force=False, report=say)
    return {one.net: one.manifest["proof"]["largest_difference"] for one in built}


def compiled(setting: Setting) -> dict[str, Any]:
    """Compile what is missing or stale; says what was compiled."""
    built = build_gpu_models(
        find_models(setting.models), engines_root(), library=setting.library, report=say
    )
    return {one.net: {name: one.manifest.get(name) for name in FACTS} for one in built}


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def validity(setting: Setting) -> dict[str, Any]:
    """What the library says of the engines on this GPU, whatever trtseg's own check says."""
    return {net: judged(one) for net, one in setting.compiled().items()}


def judged(engine: GpuEngine) -> dict[str, Any] | None:
    """What the library says of an engine; None where it cannot be asked."""
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


def opened(compiled: dict[str, GpuEngine]) -> tuple[TensorRTBackend, dict[str, TensorRTNetwork]]:
    """A backend with both networks."""
    backend = TensorRTBackend()
    try:
        return backend, {net: backend.load(compiled[net]) for net in NETWORKS}
    except TrtsegError:
        backend.close()
        raise


def latencies(setting: Setting) -> dict[str, Any]:
    """Starts, and warm runs with and without a given mask, stage by stage."""
    raw, mask, engines = phantom(), box(SHAPE, FRACTION), setting.compiled()
    cached = any(list(one.folder.glob("*.cache")) for one in engines.values())
    first_start, (backend, _) = timed(lambda: opened(engines))
    backend.close()
    start, (backend, networks) = timed(lambda: opened(engines))
    try:
        first, _ = timed(lambda: backend.segment_chain(raw))
        backend.segment_chain(raw, mask=mask)
        whole = warm(lambda: backend.segment_chain(raw), setting.runs)
        boxed = warm(lambda: backend.segment_chain(raw, mask=mask), setting.runs)
        batch = networks["bdn"].batch
        description = backend.description
        device_bytes = backend.device_bytes
    finally:
        backend.close()
    network = whole["stages"]["brain"]["p50_s"] + boxed["stages"]["cortex"]["p50_s"]
    return {
        "backend": description,
        "batch": batch,
        "device_bytes": device_bytes,
        "kernels_were_cached": cached,
        "seconds_first_start": first_start,
        "seconds_start": start,
        "seconds_first_scan": first,
        "without_mask": whole,
        "with_mask": boxed,
        "seconds_network": network,
        "voxels_per_second": raw.size / network,
    }


def ceilings(setting: Setting) -> dict[str, float]:
    """What the GPU reaches at its best."""
    backend, _ = opened(setting.compiled())
    try:
        return asdict(backend.ceilings())
    finally:
        backend.close()


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    begun = time.perf_counter()
    result = action()
    return time.perf_counter() - begun, result


def warm(action: Callable[[], ChainOutput], runs: int) -> dict[str, Any]:
    """Host seconds of warm runs, and device seconds of their stages."""
    pairs = [timed(action) for _ in range(runs)]
    stages = {
        name: summary([output.times[name] for _, output in pairs]) for name in pairs[0][1].times
    }
    return {"runs": runs, "seconds": summary([seconds for seconds, _ in pairs]), "stages": stages}


# What follows from them


def fastest_form(found: Mapping[str, Any]) -> dict[str, Any]:
    """Which of the forms that were timed is fastest; nothing where none was."""
    taken = {form: found[f"time_{form}"] for form in FORMS if f"time_{form}" in found}
    return gpu_forms.fastest(taken, found["tiles"]) if taken else {}


def ratios(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that the targets are stated in; None where PyTorch was not there to measure.

    Parameters
    ----------
    found : mapping
        With ``tiles``, and what the parts ``compiled``, ``latency``, ``ceilings`` and ``files``
        found, and ``torch_eager`` and ``torch_compiled`` where they are there.
    """
    latency, best, tiles = found["latency"], found["ceilings"], found["tiles"]
    network = latency["seconds_network"]
    # Either of the two scans holds one of the networks; what is not network counts once, with the
    # files.
    whole = latency["without_mask"]
    rest = whole["seconds"]["p50_s"] - whole["stages"]["brain"]["p50_s"]
    rest -= whole["stages"]["cortex"]["p50_s"]
    files = sum(found["files"].values())
    work = {net: one["cost"] for net, one in found["compiled"].items()}
    operations = sum(2 * work[net]["multiply_adds"] * tiles[net] for net in work)
    moved = sum(work[net]["bytes"] * tiles[net] for net in work)
    floor = max(operations / best["operations_per_second"], moved / best["bytes_per_second"])
    result: dict[str, Any] = {
        "operations": operations,
        "bytes": moved,
        "operations_per_second": operations / network,
        "bytes_per_second": moved / network,
        "end_to_end_to_network": (network + rest + files) / network,
        "chain_to_network": (network + rest) / network,
        "seconds_floor_estimated": floor,
        "network_to_floor_estimated": network / floor,
        "note": FLOOR,
    }
    for name in ("torch_eager", "torch_compiled"):
        one = found.get(name)
        result[f"{name}_to_network"] = None if one is None else one["seconds"] / network
        if one is None:
            result["missing"] = f"torch_*: {gpu_torch.COMMAND}"
    return result


def of_form(form: str) -> dict[str, Part]:
    """The parts of a graph form."""
    before = (f"compile_{form}",)
    return {
        f"compile_{form}": Part(functools.partial(gpu_forms.compiling, form=form), ("frozen",)),
        f"time_{form}": Part(functools.partial(gpu_forms.timing, form=form), before),
        f"layers_{form}": Part(functools.partial(gpu_forms.inspecting, form=form), before),
    }


#: The parts in order: what needs least, or tells most, first.
PARTS = {
    "own_part": Part(own_part),
    "files": Part(file_times),
    "frozen": Part(frozen),
    "compiled": Part(compiled, ("frozen",)),
    "validity": Part(validity, ("compiled",)),
    "latency": Part(latencies, ("compiled",)),
    "ceilings": Part(ceilings, ("compiled",)),
    "kernel_tests": Part(functools.partial(run_tests, only=KERNEL_TESTS)),
    "torch_eager": Part(gpu_torch.eager, ("frozen",)),
    **{name: part for form in FORMS for name, part in of_form(form).items()},
    "fastest_form": Part(fastest_form, derived=True),
    "torch_compiled": Part(gpu_torch.compiled, ("frozen",)),
    "ratios": Part(ratios, ("compiled", "latency", "ceilings", "files"), derived=True),
    "tests": Part(run_tests),
}


if __name__ == "__main__":
    sys.exit(main())
