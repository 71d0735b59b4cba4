"""The same scan through TensorFlow, ONNX Runtime, OpenVINO on the plain graph, and trtseg.

    python bench/speed.py [SCAN] [--models demo] [--repeats 3] [--only NAME ...] [--json FILE]

Prints one row per form: seconds for both networks end to end, the ratio to TensorFlow, the rate of
the multiply-adds executed, and how many labels differ from the first float32 form of the run. The
ceiling is one large convolution in the same runtime, timed in the same run. Every form runs in this
process on the same threads; each is warmed up by its first repeat, which is not counted. Needs the
bench extra: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtseg import tiling
from trtseg.architecture import NETWORKS, PUBLISHED, NetworkSpec
from trtseg.backends import PRECISIONS, cpu_ceilings
from trtseg.backends.base import run_tiles
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.backends.openvino_library import available_threads, openvino_module, settings
from trtseg.build import checkpoint, graph
from trtseg.build.freeze import freeze
from trtseg.build.parts import parts
from trtseg.build.variables import network_variables
from trtseg.home import demo_folder
from trtseg.models import find_models
from trtseg.nifti import read_scan
from trtseg.normalise import z_score
from trtseg.tiling import TilePlan

Labels = NDArray[np.uint8]
Run = Callable[[NDArray[np.float32], TilePlan], Labels]


def published_plan(
    shape: tuple[int, int, int], spec: NetworkSpec, roi: NDArray[np.bool_] | None
) -> TilePlan:
    """Tiles that DeepMedic runs: all whose whole input holds a voxel of the ROI."""
    plan = tiling.plan_tiles(shape, spec)
    if roi is None:
        return plan
    padded = np.pad(roi, plan.padding, "reflect")
    keep = [
        padded[tuple(slice(s, s + spec.tile) for s in start)].any()
        for start in plan.starts.tolist()
    ]
    return TilePlan(spec, plan.shape, plan.padding, plan.starts[keep], plan.boxes[keep])


def tensorflow_form(variables: dict[str, Any], spec: NetworkSpec) -> Run:
    """DeepMedic's own way: batches of 5 tiles, unfolded layers."""
    from tensorflow_network import TensorFlowNetwork

    return TensorFlowNetwork(variables, spec).run


def plain_form(call: Callable[[dict[str, Any]], Any]) -> Run:
    """Tile by tile on the published graph form."""
    return lambda volume, plan: run_tiles(volume, plan, call, batch=1).labels


def onnxruntime_form(frozen: Any) -> Run:
    """ONNX Runtime on the published graph form."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_threads()
    session = onnxruntime.InferenceSession(
        graph.plain(frozen), options, providers=["CPUExecutionProvider"]
    )
    return plain_form(lambda inputs: session.run(None, inputs)[0])


def openvino_form(frozen: Any, spec: NetworkSpec) -> Run:
    """OpenVINO on the published graph form, float32."""
    core = openvino_module().Core()
    model = core.read_model(graph.plain(frozen))
    model.reshape({name: [1, 1, n, n, n] for name, n in spec.input_sizes().items()})
    compiled = core.compile_model(model, "CPU", settings(available_threads(), "f32"))
    request = compiled.create_infer_request()

    def call(inputs: dict[str, Any]) -> Any:
        request.infer(inputs, share_inputs=True)
        return request.get_output_tensor(0).data

    return plain_form(call)


@dataclass(frozen=True)
class Form:
    """A network in a form: what runs it, which tiles it runs, and the multiply-adds of those."""

    run: Run
    plan: Callable[..., TilePlan]
    executed: Callable[[NDArray[np.float32], TilePlan], int]


def published_form(run: Run, spec: NetworkSpec, batch: int) -> Form:
    """The tiles that DeepMedic runs, in batches that are filled up."""

    def executed(_: NDArray[np.float32], plan: TilePlan) -> int:
        return -(-len(plan) // batch) * batch * spec.multiply_adds()

    return Form(run, published_plan, executed)


def trtseg_form(frozen: Any, spec: NetworkSpec, precision: str) -> Form:
    """The CPU form of trtseg itself."""
    network = OpenVINOBackend(precision=precision).compile(spec, parts(frozen))
    return Form(
        lambda volume, plan: network.run(volume, plan).labels,
        tiling.plan_tiles,
        lambda volume, plan: network.work(volume, plan).multiply_adds,
    )


def forms(models: str, wanted: list[str]) -> dict[str, dict[str, Form]]:
    """Form name to its two networks."""
    stored = find_models(models)
    required = network_variables(PUBLISHED).required(PUBLISHED)
    found: dict[str, dict[str, Form]] = {name: {} for name in wanted}
    for net in NETWORKS:
        variables = checkpoint.read_variables(stored.checkpoint(net), required)
        frozen = freeze(variables, PUBLISHED)
        makers: dict[str, Callable[[], Form]] = {
            "tensorflow": lambda v=variables: published_form(
                tensorflow_form(v, PUBLISHED), PUBLISHED, PUBLISHED.batch
            ),
            "onnxruntime": lambda f=frozen: published_form(onnxruntime_form(f), PUBLISHED, 1),
            "openvino": lambda f=frozen: published_form(openvino_form(f, PUBLISHED), PUBLISHED, 1),
            "trtseg f32": lambda f=frozen: trtseg_form(f, PUBLISHED, "f32"),
            "trtseg bf16": lambda f=frozen: trtseg_form(f, PUBLISHED, "bf16"),
        }
        for name in wanted:
            found[name][net] = makers[name]()
    return found


def run_both(networks: dict[str, Form], path: Path) -> dict[str, Any]:
    """Read, normalise and run both networks; seconds, labels and executed multiply-adds."""
    bdn, cgm = networks["bdn"], networks["cgm"]
    started = time.perf_counter()
    scores = z_score(read_scan(path)).data
    begun = time.perf_counter()
    brain_plan = bdn.plan(scores.shape, PUBLISHED, None)
    brain = bdn.run(scores, brain_plan)
    middle = time.perf_counter()
    roi = brain.astype(bool)
    cortex_plan = cgm.plan(scores.shape, PUBLISHED, roi)
    cortex = cgm.run(scores, cortex_plan) * roi
    ended = time.perf_counter()
    executed = bdn.executed(scores, brain_plan) + cgm.executed(scores, cortex_plan)
    return {
        "seconds": ended - started,
        "bdn": middle - begun,
        "cgm": ended - middle,
        "network": ended - begun,
        "executed": executed,
        "tiles": [len(brain_plan), len(cortex_plan)],
        "brain": brain,
        "cortex": cortex,
    }


#: Labels that may differ: of a million voxels some ten have a probability within 2.5e-5 of 0.5,
#: where the order of a float32 sum decides (tests/data/README.md); twice that is no rounding.
ROUNDED = 20

NAMES = ["tensorflow", "onnxruntime", "openvino", "trtseg f32", "trtseg bf16"]


def measure(path: Path, models: str, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row per form; the forms take turns, so that a drifting machine is fair to all."""
    networks = forms(models, names)
    ceilings = {  # of multiply-adds
        precision: cpu_ceilings.measure(available_threads(), precision).operations_per_second / 2
        for precision in PRECISIONS
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name in names:
            runs[name].append(run_both(networks[name], path))
    exact = [name for name in names if "bf16" not in name]
    reference = runs[(exact or names)[0]][-1]
    rows = []
    for name in names:
        counted = runs[name][1:]
        median = statistics.median(run["seconds"] for run in counted)
        network = statistics.median(run["network"] for run in counted)
        last = runs[name][-1]
        inside = reference["brain"].astype(bool) | last["brain"].astype(bool)
        rate = last["executed"] / network
        rows.append(
            {
                "form": name,
                "seconds": median,
                "bdn": statistics.median(run["bdn"] for run in counted),
                "cgm": statistics.median(run["cgm"] for run in counted),
                "tiles": last["tiles"],
                "gflops": 2e-9 * rate,
                "of_ceiling": rate / ceilings["bf16" if "bf16" in name else "f32"],
                "brain_differs": int((last["brain"] != reference["brain"]).sum()),
                "cortex_differs": int((last["cortex"] != reference["cortex"]).sum()),
                "cortex_agreement": float((last["cortex"] == reference["cortex"])[inside].mean()),
            }
        )
    first = rows[0]["seconds"]
    for row in rows:
        row["times_faster"] = first / row["seconds"]
    print(f"ceiling: f32 {2e-9 * ceilings['f32']:.0f}, bf16 {2e-9 * ceilings['bf16']:.0f} GFLOP/s")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"{'form':<12} {'s':>7} {'BDN s':>7} {'CGM s':>7} {'ratio':>6} {'GFLOP/s':>8} "
        f"{'ceiling':>8} {'brain':>6} {'cortex':>6}  labels that differ"
    )
    for row in rows:
        print(
            f"{row['form']:<12} {row['seconds']:7.2f} {row['bdn']:7.2f} {row['cgm']:7.2f} "
            f"{row['times_faster']:5.2f}x {row['gflops']:8.0f} {row['of_ceiling']:8.0%} "
            f"{row['brain_differs']:6d} {row['cortex_differs']:6d}"
        )


def main() -> None:
    """Parse, measure, print, and fail if a float32 form's labels differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scan", type=Path, nargs="?", default=demo_folder() / "phantom_23w.nii.gz")
    parser.add_argument("--models", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options.scan, options.models, options.only, options.repeats)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    wrong = [
        row["form"]
        for row in rows
        if "bf16" not in row["form"] and row["brain_differs"] + row["cortex_differs"] > ROUNDED
    ]
    if wrong:
        sys.exit(f"labels differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
