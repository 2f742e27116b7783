"""Zeroth-order steps beside their bound (two forwards, draws, updates), and their bytes beside a copy.

    python benchmarks/blackbox.py [--width 512] [--depth 6] [--batch 256] [--repeats 15] [--out FILE.json]

The bound is what an in-place step cannot do without, timed in the same process and in turn with the methods:
two forwards under no_grad, three draws of every parameter (there, back, and into the gradient), three
additions into the weights and one scaling. Bytes are counted by `thalweg.ledger`: `extra` is the peak above
what must be there in any case, the larger of a forward's activations and the gradient that is handed over.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from thalweg.blackbox import SPSA, ForwardGradient
from thalweg.blackbox.directions import Directions, direction
from thalweg.ledger import cost
from thalweg.noise import Key
from thalweg.step import Backprop, Closure, Estimate
from thalweg.table import align, scaled


@dataclass(frozen=True)
class Inference:
    """A rule that only evaluates: what every memory figure is held against."""

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        with torch.no_grad():
            return Estimate(closure().mean(), (None,) * len(parameters), 1)


def network(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def bound(closure: Closure, parameters: Sequence[Tensor], directions: Directions) -> Callable[[], object]:
    """The least work of a central pair in place; the weights end where they began, up to rounding."""
    scale = SPSA().scale

    def move(step: float) -> list[Tensor]:
        drawn = [direction(directions, p, Key(0), 0, index) for index, p in enumerate(parameters)]
        for parameter, z in zip(parameters, drawn):
            parameter.add_(z, alpha=step)
        return drawn

    def pair() -> None:
        with torch.no_grad():
            move(scale)
            closure()
            move(-2 * scale)
            closure()
            for z in move(scale):
                z.mul_(scale)

    return pair


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each, in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(width: int, depth: int, batch: int, repeats: int) -> dict[str, object]:
    """Times, evaluations and bytes of each rule on one network."""
    net = network(width, depth)
    x, y = torch.randn(batch, width), torch.arange(batch) % 10
    parameters = list(net.parameters())

    def closure() -> Tensor:
        return nn.functional.cross_entropy(net(x), y)

    rules = {
        "backprop": Backprop(),
        "forward gradient": ForwardGradient(),
        "spsa rademacher, copy": SPSA(),
        "spsa rademacher, swap": SPSA(restore="swap"),
        "spsa gaussian, copy": SPSA(directions="gaussian"),
        "spsa gaussian, swap": SPSA(directions="gaussian", restore="swap"),
    }
    runs: dict[str, Callable[[], object]] = {
        f"bound {kind}": bound(closure, parameters, kind) for kind in ("rademacher", "gaussian")
    }
    for name, rule in rules.items():
        runs[name] = lambda rule=rule: rule.estimate(closure, parameters, Key(0))
    times = milliseconds(runs, repeats)

    copy = sum(p.numel() * p.element_size() for p in parameters)
    largest = max(p.numel() * p.element_size() for p in parameters)
    step = (net, closure, parameters)
    inference = cost(step, gradient=Inference(), repeats=0).peak_bytes
    rows = []
    for name, rule in rules.items():
        found = cost(step, gradient=rule, repeats=0)
        least = times.get(f"bound {getattr(rule, 'directions', '')}") if isinstance(rule, SPSA) else None
        extra = found.peak_bytes - max(inference, copy)
        rows.append(
            {
                "route": name,
                "evaluations": found.evaluations,
                "peak_bytes": found.peak_bytes,
                "extra_bytes": extra,
                "extra_over_copy": extra / copy,
                "extra_over_largest": extra / largest,
                "ms": times[name],
                "bound_ms": least,
                "ratio": times[name] / least if least else None,
            }
        )
    return {
        "benchmark": "blackbox",
        "width": width,
        "depth": depth,
        "batch": batch,
        "parameter_bytes": copy,
        "largest_parameter_bytes": largest,
        "inference_peak_bytes": inference,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }


def table(found: dict[str, object]) -> str:
    columns = ["route", "evaluations", "peak", "extra", "extra / copy", "ms", "bound ms", "ratio"]
    rows = [
        [
            row["route"],
            str(row["evaluations"]),
            scaled(row["peak_bytes"], "B"),
            scaled(row["extra_bytes"], "B"),
            f"{row['extra_over_copy']:.2f}",
            f"{row['ms']:.1f}",
            f"{row['bound_ms']:.1f}" if row["bound_ms"] else "-",
            f"{row['ratio']:.2f}" if row["ratio"] else "-",
        ]
        for row in found["rows"]
    ]
    return align(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 512), ("depth", 6), ("batch", 256), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/blackbox.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.width, options.depth, options.batch, options.repeats)
    print(table(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
