"""What TensorRT-RTX makes of the network: compile time, size, memory and kernels per graph form.

    python bench/layers.py [--models demo] [--batch 4] [--json FILE]

Needs no GPU: TensorRT-RTX compiles for the GPUs it supports and, asked for detail, logs each kernel
it plans. Which machine code a kernel becomes is settled at the first run on a GPU, so this tells
what is joined with what and in which layout, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from trtseg.backends.tensorrt_library import Library, open_library
from trtseg.build.builder import build_models
from trtseg.build.forms import FORMS, cost, form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.build.tensorrt import BuiltEngine, build_engine, layer_report
from trtseg.engine import WEIGHTS, load_engine
from trtseg.errors import TrtsegError
from trtseg.gpu_engine import BATCHES
from trtseg.models import find_models

_KERNEL = re.compile(r"^Name: (?P<name>\S+), LayerType: (?P<type>\w+), Inputs: (?P<rest>.*)", re.M)
_TENSOR = re.compile(r"Datatype: (\w+), Format: \((\w+)\)")


def kernels(built: BuiltEngine) -> list[dict[str, Any]]:
    """The kernels of a detailed build: type, ONNX nodes, and how its results are stored."""
    found = []
    for match in _KERNEL.finditer(layer_report(built)):
        if match["type"] in ("signal", "wait"):
            continue
        results = re.search(r"Outputs: \[(.*?)\], TacticName", match["rest"])
        nodes = re.findall(r"ONNX Layer: (\w+?)_\d+\]", match["rest"])
        stored = _TENSOR.findall(results[1]) if results else []
        found.append({"type": match["type"], "nodes": sorted(nodes), "stored": stored})
    return found


def memory(built: BuiltEngine) -> dict[str, int]:
    """Bytes that the library says the engine takes on the GPU."""
    report = layer_report(built)
    return {
        key: int(re.search(rf"{text}: (\d+) bytes", report)[1])  # type: ignore[index]
        for key, text in (("scratch", "Max Scratch Memory"), ("weights", "Total Weights Memory"))
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of activation, residual and layout."""
    convolutions = [one for one in found if one["type"] in ("correlation", "deconv")]
    return {
        "kernels": len(found),
        "types": dict(Counter(one["type"] for one in found)),
        "prelu_in_a_convolution": sum("prelu" in one["nodes"] for one in convolutions),
        "prelu_kernels": sum("prelu" in one["nodes"] for one in found),
        "sums_in_a_convolution": sum("add" in one["nodes"] for one in convolutions),
        "layouts_of_convolutions": sorted({" ".join(s) for c in convolutions for s in c["stored"]}),
        "last_layer": found[-2]["nodes"] + found[-1]["nodes"],
    }


def measure(library: Library, network: FrozenNetwork, batch: int) -> list[dict[str, Any]]:
    """One row per graph form."""
    rows = []
    for form in FORMS:
        sizes = {}
        for tiles in BATCHES:
            built = build_engine(library, form_graph(network, form, batch=tiles))
            sizes[str(tiles)] = {
                "seconds": round(built.seconds, 2),
                "bytes": len(built.content),
                **memory(built),
            }
        detailed = build_engine(library, form_graph(network, form, batch=batch), detailed=True)
        estimate = cost(network.spec, form)
        rows.append(
            {
                "form": form,
                "estimate_per_tile": {
                    "multiply_adds": estimate.multiply_adds,
                    "bytes": estimate.bytes,
                    "time": estimate.time,
                },
                "batches": sizes,
                "layers": summary(kernels(detailed)),
                "kernels": kernels(detailed),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    print("| form | GMAC a tile | MB a tile | batch | compile s | engine MB | GPU memory MB |")
    print("| --- " * 7 + "|")
    for row in rows:
        estimate = row["estimate_per_tile"]
        for batch, one in row["batches"].items():
            total = (one["scratch"] + one["weights"]) / 1e6
            print(
                f"| {row['form']} | {estimate['multiply_adds'] / 1e9:.1f} | "
                f"{estimate['bytes'] / 1e6:.0f} | {batch} | {one['seconds']:.2f} | "
                f"{one['bytes'] / 1e6:.1f} | {total:.0f} |"
            )
    print(
        "\n| form | kernels | PReLU kernels (in a convolution) | sums in a convolution | layout |"
    )
    print("| --- " * 5 + "|")
    for row in rows:
        one = row["layers"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in one["types"].items())
        print(
            f"| {row['form']} | {one['kernels']}: {kinds} | {one['prelu_kernels']} "
            f"({one['prelu_in_a_convolution']}) | {one['sums_in_a_convolution']} | "
            f"{', '.join(one['layouts_of_convolutions'])} |"
        )


def main() -> None:
    """Parse, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo")
    parser.add_argument("--batch", type=int, default=4, help="tiles of the detailed build")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        library, models = open_library("tensorrt_rtx"), find_models(options.models)
    except TrtsegError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as name:
        build_models(models, Path(name))
        engine = load_engine(Path(name), options.models, "cgm")
        network = FrozenNetwork.from_bytes(engine.read(WEIGHTS), engine.spec)
    rows = measure(library, network, options.batch)
    print(f"{library.name} {library.version}, no GPU present\n")
    show(rows)
    if options.json:
        found = {"library": library.name, "version": library.version, "gpu": None, "forms": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
