"""What a gate adds to a forward and backward, beside no gate and beside a bare autograd.Function.

    python benchmarks/gates.py [--size 256] [--batch 4] [--repeats 31] [--device cpu] [--out FILE.json]

The work is a 3x3 convolution on images (batch, 3, size, size), with and without the gate before it. The peer
of each gate is the shortest autograd.Function that does the same to finite gradients, without vmap, forward
mode, non-finite values or statistics; of straight-through, the usual sum of hard and smooth minus smooth. All
variants run in turn in one process; times are medians of the repeats, ratios are to the identity and to the
peer. `added` is what the graph keeps for backward beyond the ungated step. The peer of `stop` is `detach`,
which saves the backward below it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg import gates
from thalweg.table import align, scaled

Function = torch.autograd.Function
Gate = Callable[[Tensor], Tensor]


class PixelClip(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (0.1 / g.abs().amax(1, keepdim=True)).clamp(max=1)


class LengthClip(PixelClip):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (0.1 / g.norm(dim=1, keepdim=True)).clamp(max=1)


class ValueClip(PixelClip):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)


class Half(PixelClip):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.5


def usual_straight_through(x: Tensor) -> Tensor:
    return (x > 0).float() + (x - x.detach())


PAIRS: dict[str, tuple[Gate, Gate]] = {
    "clip per pixel": (lambda x: gates.clip(x, 0.1), PixelClip.apply),
    "clip per pixel, l2": (lambda x: gates.clip(x, 0.1, norm="l2"), LengthClip.apply),
    "clip per value": (lambda x: gates.clip(x, 0.1, per="value"), ValueClip.apply),
    "scale": (lambda x: gates.scale(x, 0.5), Half.apply),
    "stop": (gates.stop, torch.detach),
    "straight-through": (gates.threshold, usual_straight_through),
}


def step(gate: Gate, image: Tensor, layer: nn.Module) -> Callable[[], None]:
    def run() -> None:
        image.grad = None
        layer.zero_grad()
        layer(gate(image * 1.0)).square().sum().backward()

    return run


def timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def saved(gate: Gate, image: Tensor, layer: nn.Module) -> int:
    """Bytes of distinct storages that the graph keeps, the image's own left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(gate(image * 1.0)).square().sum()
    del out
    return sum(kept.values())


def measure(shape: tuple[int, ...], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    image = torch.randn(shape, device=device, requires_grad=True)
    layer = nn.Conv2d(3, 8, 3, padding=1).to(device)
    variants: dict[str, Gate] = {"identity": lambda x: x}
    for name, (ours, peer) in PAIRS.items():
        variants |= {name: ours, f"{name} (peer)": peer}
    runs = {name: step(gate, image, layer) for name, gate in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    warmup = 3
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            spent = timed(run, device)
            if repeat >= warmup:
                times[name].append(spent)
    median = {name: statistics.median(values) for name, values in times.items()}
    bare = saved(variants["identity"], image, layer)
    return [
        {
            "gate": name,
            "added_bytes": saved(variants[name], image, layer) - bare,
            "identity_ms": median["identity"],
            "peer_ms": median[f"{name} (peer)"],
            "ms": median[name],
            "over_identity": median[name] / median["identity"],
            "over_peer": median[name] / median[f"{name} (peer)"],
        }
        for name in PAIRS
    ]


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["gate", "added", "identity ms", "peer ms", "ms", "ms / identity", "ms / peer"]
    numbers = ("identity_ms", "peer_ms", "ms", "over_identity", "over_peer")
    lines = [
        [row["gate"], scaled(row["added_bytes"], "B"), *(f"{row[key]:.2f}" for key in numbers)]
        for row in rows
    ]
    return align(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/gates.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (options.batch, 3, options.size, options.size)
    rows = measure(shape, options.repeats, torch.device(options.device))
    print(table(rows))
    found = {
        "benchmark": "gates",
        "shape": shape,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
