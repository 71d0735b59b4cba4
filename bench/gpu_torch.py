"""The same networks in PyTorch on a GPU, float16, as a PyTorch user would run them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpu_setting import Setting

from trtseg.architecture import NetworkSpec
from trtseg.build.forms import form_graph
from trtseg.build.freeze import FrozenNetwork
from trtseg.engine import WEIGHTS

#: What installs PyTorch, and measures.
COMMAND = "pip install torch, then make gpu-check"


def eager(setting: Setting) -> dict[str, Any] | None:
    """Seconds as PyTorch runs by itself; None where it is not installed."""
    return figures(setting, compile_it=False)


def compiled(setting: Setting) -> dict[str, Any] | None:
    """Seconds by ``torch.compile``; None where PyTorch is not installed."""
    return figures(setting, compile_it=True)


def figures(setting: Setting, *, compile_it: bool) -> dict[str, Any] | None:
    """Both networks over their tiles, in the faster of two memory orders each."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU that it can use")
    torch.backends.cudnn.benchmark = True  # the fastest kernels that cuDNN has, as users set it
    orders = {
        "contiguous": torch.contiguous_format,
        "channels_last_3d": torch.channels_last_3d,
    }
    batches, seconds = {}, {}
    tiles = setting.tiles()
    for net, engine in setting.frozen().items():
        network = FrozenNetwork.from_bytes(engine.read(WEIGHTS), engine.spec)
        batches[net] = {
            name: batch_seconds(torch, network, engine.spec, setting.batch, order, compile_it)
            for name, order in orders.items()
        }
        seconds[net] = min(batches[net].values()) * math.ceil(tiles[net] / setting.batch)
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "batch": setting.batch,
        "seconds_a_batch": batches,
        "seconds_by_network": seconds,
        "seconds": sum(seconds.values()),
    }


def batch_seconds(
    torch: Any,
    weights: FrozenNetwork,
    spec: NetworkSpec,
    batch: int,
    order: Any,
    compile_it: bool,
) -> float:
    """Seconds of one batch of tiles in the published form."""
    from torch_network import TorchNetwork

    network = TorchNetwork(form_graph(weights, "plain", batch=batch)).cuda().eval()
    for buffer in network.buffers():
        if buffer.dim() == 5:
            buffer.data = buffer.data.contiguous(memory_format=order)
    run = network
    if compile_it:
        # All instances share one `forward`, by whose code object what was compiled is kept, and
        # which shapes were seen: each is to be compiled alone, for its own shapes.
        torch.compiler.reset()
        run = torch.compile(network, dynamic=False)
    inputs = [
        torch.randn(batch, 1, side, side, side, device="cuda").to(memory_format=order)
        for side in spec.input_sizes().values()
    ]
    with torch.inference_mode():
        return fastest(torch, lambda: run(*inputs))


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
