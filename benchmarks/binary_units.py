"""Random and hard units beside what torch and snntorch offer; skipped experts beside those that run.

    python benchmarks/binary_units.py [--batch 256] [--width 1000] [--repeats 31] [--device cpu] [--out FILE]

First table: forward and backward of one unit on logits (batch, width), categories in groups of 10. The peer
is the nearest of torch.distributions, gumbel_softmax and snntorch, or the usual one or two lines; it draws
from torch's global generator, ours from a key. `saved` is what the graph keeps for backward beside the leaf
that holds the logits, which snntorch's surrogates keep and nothing else.

Second table: the conditional layer in evaluation, 10 % of the gates open. `gater` is what either way has to
compute; `linear` is a dense layer of the experts alone. Multiply-adds are those of the experts, counted by
torch's FlopCounterMode; the ratio of the times is gather to masked, gater included.

All variants run in turn in one process; times are medians of the repeats.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from thalweg.ledger import saved_bytes
from thalweg.stochastic import (
    BinaryNeuron,
    CategoricalNeuron,
    Concrete,
    ConditionalLinear,
    NoisyRectifier,
    SpikingNeuron,
    StochasticTimesSmooth,
    StraightThrough,
    StraightThroughGumbel,
)
from thalweg.table import align, scaled

Unit = Callable[[Tensor], Tensor]
CATEGORIES = 10


def usual_identity(a: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(a.detach())) + a - a.detach()


def usual_sigmoid(a: Tensor) -> Tensor:
    p = torch.sigmoid(a)
    return torch.bernoulli(p.detach()) + p - p.detach()


def relaxed(a: Tensor) -> Tensor:
    return torch.distributions.RelaxedBernoulli(a.new_tensor(0.7), logits=a).rsample()


def relaxed_hard(a: Tensor) -> Tensor:
    y = relaxed(a)
    return (y > 0.5).to(y.dtype) + y - y.detach()


def usual_times_smooth(a: Tensor) -> Tensor:
    root = torch.sigmoid(a).sqrt()
    return torch.bernoulli(root.detach()) * root


def one_hot(a: Tensor) -> Tensor:
    return torch.distributions.OneHotCategoricalStraightThrough(logits=a).rsample()


def gumbel(a: Tensor) -> Tensor:
    return nn.functional.gumbel_softmax(a, tau=0.7, hard=True)


BINARY: dict[str, tuple[Unit, Unit, str]] = {
    "straight-through": (BinaryNeuron(), usual_identity, "two lines"),
    "straight-through, sigmoid": (BinaryNeuron(StraightThrough("sigmoid")), usual_sigmoid, "two lines"),
    "concrete": (BinaryNeuron(Concrete(0.7, hard=False)), relaxed, "RelaxedBernoulli"),
    "straight-through gumbel": (BinaryNeuron(Concrete(0.7)), relaxed_hard, "RelaxedBernoulli, hard"),
    "noisy rectifier": (NoisyRectifier(), lambda a: torch.relu(a + torch.randn_like(a)), "one line"),
    "stochastic times smooth": (StochasticTimesSmooth(), usual_times_smooth, "two lines"),
}
CATEGORICAL: dict[str, tuple[Unit, Unit, str]] = {
    "categories, softmax": (CategoricalNeuron(StraightThrough("softmax")), one_hot, "OneHotCategoricalST"),
    "categories, gumbel": (CategoricalNeuron(StraightThroughGumbel(0.7)), gumbel, "gumbel_softmax(hard)"),
    "categories, reinmax": (CategoricalNeuron(), one_hot, "OneHotCategoricalST"),
}


def spikes() -> dict[str, tuple[Unit, Unit, str]]:
    """The surrogates that snntorch has, too; none where it is not installed."""
    try:
        surrogate = importlib.import_module("snntorch.surrogate")
    except ImportError:
        return {}
    peers = {"atan": surrogate.atan(2.0), "fast_sigmoid": surrogate.fast_sigmoid(2.0)}
    peers["sigmoid"] = surrogate.sigmoid(2.0)
    return {f"spike, {slope}": (SpikingNeuron(slope, 2.0), peer, "snntorch") for slope, peer in peers.items()}


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def medians(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    warmup = 3
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            spent = timed(run, device)
            if repeat >= warmup:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def both_ways(unit: Unit, logits: Tensor, cotangent: Tensor) -> Callable[[], None]:
    def run() -> None:
        logits.grad = None
        unit(logits).backward(cotangent)

    return run


def units(batch: int, width: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    shapes = {"": (batch, width), "categories": (batch, width // CATEGORIES, CATEGORIES)}
    rows = []
    for name, (ours, peer, peer_name) in {**BINARY, **CATEGORICAL, **spikes()}.items():
        ours = ours.to(device) if isinstance(ours, nn.Module) else ours
        shape = shapes["categories" if name.startswith("categories") else ""]
        logits = torch.randn(shape, device=device, requires_grad=True)
        cotangent = torch.randn(shape, device=device)
        runs = {"ours": both_ways(ours, logits, cotangent), "peer": both_ways(peer, logits, cotangent)}
        found = medians(runs, repeats, device)
        rows.append(
            {
                "unit": name,
                "peer": peer_name,
                "saved_bytes": saved_bytes(lambda unit=ours, logits=logits: unit(logits)),
                "peer_saved_bytes": saved_bytes(lambda unit=peer, logits=logits: unit(logits)),
                "ms": found["ours"],
                "peer_ms": found["peer"],
                "over_peer": found["ours"] / found["peer"],
            }
        )
    return rows


def sampled_products(pattern: Tensor, rows: Tensor, columns: Tensor, **_: object) -> int:
    return 2 * pattern._nnz() * rows.shape[1]


# the formula wants the pattern itself, not its shape
sampled_products._get_raw = True  # type: ignore[attr-defined]


def multiply_adds(run: Callable[[], object]) -> int:
    formulas = {torch.ops.aten.sparse_sampled_addmm: sampled_products}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops() // 2


def layers(repeats: int, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for experts, bottleneck in ((400, 100), (2000, 400), (8000, 400)):
        torch.manual_seed(0)
        layer = ConditionalLinear(784, experts, bottleneck, device=device).eval()
        layer.calibrate(torch.randn(200, 784, device=device), target=0.1)
        for batch in (1, 64):
            x = torch.randn(batch, 784, device=device)
            runs: dict[str, Callable[[], object]] = {
                "gather": lambda layer=layer, x=x: layer(x, backend="gather"),
                "masked": lambda layer=layer, x=x: layer(x, backend="masked"),
                "gater": lambda layer=layer, x=x: layer.logits(x),
                "linear": lambda layer=layer, x=x: layer.experts(x),
            }
            with torch.no_grad():
                found = medians(runs, repeats, device)
                counts = {name: multiply_adds(run) for name, run in runs.items()}
                off = float((layer(x, backend="gather") - layer(x)).abs().max())
            rows.append(
                {
                    "experts": experts,
                    "batch": batch,
                    "active": float(layer.active),
                    "multiply_adds": counts["gather"] - counts["gater"],
                    "share_of_dense": (counts["gather"] - counts["gater"]) / counts["linear"],
                    "largest_difference": off,
                    **{f"{name}_ms": value for name, value in found.items()},
                    "over_masked": found["gather"] / found["masked"],
                }
            )
    return rows


def tables(found: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> str:
    first = align(
        ["unit", "peer", "saved", "peer saved", "peer ms", "ms", "ms / peer"],
        [
            [
                row["unit"],
                row["peer"],
                scaled(row["saved_bytes"], "B"),
                scaled(row["peer_saved_bytes"], "B"),
                *(f"{row[key]:.2f}" for key in ("peer_ms", "ms", "over_peer")),
            ]
            for row in found
        ],
    )
    timings = ("gater_ms", "linear_ms", "masked_ms", "gather_ms")
    titles = ["gater ms", "linear ms", "masked ms", "gather ms", "gather / masked"]
    second = align(
        ["experts", "batch", "multiply-adds", "/ dense", "off by", *titles],
        [
            [
                str(row["experts"]),
                str(row["batch"]),
                scaled(row["multiply_adds"]),
                f"{row['share_of_dense']:.3f}",
                f"{row['largest_difference']:.0e}",
                *(f"{row[key]:.3f}" for key in timings),
                f"{row['over_masked']:.2f}",
            ]
            for row in skipped
        ],
    )
    return f"{first}\n\n{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/binary_units.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    found = units(options.batch, options.width, options.repeats, device)
    skipped = layers(options.repeats, device)
    print(tables(found, skipped))
    record = {
        "benchmark": "binary_units",
        "shape": (options.batch, options.width),
        "repeats": options.repeats,
        "torch": torch.__version__,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "units": found,
        "layers": skipped,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
