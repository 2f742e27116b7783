"""Zeroth-order steps beside their bound (two forwards, draws, updates), their bytes, and their peers.

    python benchmarks/blackbox.py [--width 512] [--depth 6] [--batch 256] [--repeats 15] [--out FILE.json]

The bound is what an in-place step cannot do without, timed in the same process and in turn with the methods:
two forwards under no_grad, three draws of every parameter (there, back, and into the gradient), three
additions into the weights and one scaling; "inplace" comes back by a fourth draw, which its bound counts too.
Low-rank directions are held against the Gaussian bound, whose draws they save. Bytes are counted by
`thalweg.ledger`: `extra` is the peak above what must be there in any case, the larger of a forward's
activations and the gradient that is handed over; above the activations for whole steps, which hand over none.
Times are processor time of one thread, to which other work on the machine does not count.
Peers make the same central pair on the same network: torchzero's MeZO, and evotorch's PGPE with one pair.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from thalweg.blackbox import SPSA, ForwardGradient, LowRank, MeZO
from thalweg.blackbox.directions import Plain, direction
from thalweg.ledger import cost
from thalweg.ledger.storages import StorageCounter
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


def bound(
    closure: Closure, parameters: Sequence[Tensor], directions: Plain, draws: int = 3
) -> Callable[[], object]:
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
            if draws > 3:
                move(scale / 2)
            for z in move(scale if draws == 3 else scale / 2):
                z.mul_(scale)

    return pair


def steps(net: nn.Module, closure: Closure) -> dict[str, Callable[[], object]]:
    """Whole steps: evaluate and move the weights, ours and those of peers that are installed."""
    parameters = list(net.parameters())
    gaussian = {"directions": "gaussian"}
    rules = {
        "step: mezo gaussian, swap": SPSA(**gaussian, restore="swap"),
        "step: mezo gaussian, inplace": SPSA(**gaussian, restore="inplace"),
        "step: mezo low rank 4, swap": SPSA(directions=LowRank(4), restore="swap"),
    }
    found: dict[str, Callable[[], object]] = {}
    for name, rule in rules.items():
        optimizer = MeZO(parameters, lr=1e-7, gradient=rule, seed=0)
        found[name] = lambda optimizer=optimizer: optimizer.step(closure)
    for name, peer in (
        ("step: torchzero mezo gaussian", torchzero_step),
        ("step: evotorch pgpe, one pair", evotorch_step),
    ):
        with contextlib.suppress(ImportError):
            found[name] = peer(parameters, closure)
    return found


def torchzero_step(parameters: Sequence[Tensor], closure: Closure) -> Callable[[], object]:
    import torchzero

    pair = torchzero.m.MeZO(h=1e-3, distribution="gaussian")
    optimizer = torchzero.Optimizer(parameters, pair, torchzero.m.LR(1e-7))

    def value(backward: bool = True) -> Tensor:
        with torch.no_grad():
            return closure()

    return lambda: optimizer.step(value)


def evotorch_step(parameters: Sequence[Tensor], closure: Closure) -> Callable[[], object]:
    import logging

    import evotorch
    from evotorch.algorithms import PGPE

    logging.getLogger("evotorch").setLevel(logging.ERROR)
    start = nn.utils.parameters_to_vector(parameters).detach().clone()
    own = [p.data for p in parameters]

    def fitness(vector: Tensor) -> Tensor:
        with torch.no_grad():
            nn.utils.vector_to_parameters(vector, parameters)
            return closure()

    problem = evotorch.Problem(
        "min", fitness, solution_length=len(start), initial_bounds=(-1, 1), dtype=start.dtype
    )
    search = PGPE(
        problem,
        popsize=2,
        center_learning_rate=1e-7,
        stdev_learning_rate=0.0,
        stdev_init=1e-3,
        optimizer="sgd",
        center_init=start,
    )

    def step() -> None:
        search.step()
        for parameter, value in zip(parameters, own):
            parameter.data = value

    return step


def peak_bytes(run: Callable[[], object]) -> int:
    run()
    counter = StorageCounter(None, None)
    with counter:
        run()
    return counter.peak_bytes


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor time of each, in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:
                times[name].append(1000 * (time.process_time() - start))
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
        "spsa rademacher, inplace": SPSA(restore="inplace"),
        "spsa gaussian, copy": SPSA(directions="gaussian"),
        "spsa gaussian, swap": SPSA(directions="gaussian", restore="swap"),
        "spsa gaussian, inplace": SPSA(directions="gaussian", restore="inplace"),
        "spsa low rank 4, swap": SPSA(directions=LowRank(4), restore="swap"),
    }
    runs: dict[str, Callable[[], object]] = {
        f"bound {kind} {draws}": bound(closure, parameters, kind, draws)
        for kind in ("rademacher", "gaussian")
        for draws in (3, 4)
    }
    whole = steps(net, closure)
    for name, rule in rules.items():
        runs[name] = lambda rule=rule: rule.estimate(closure, parameters, Key(0))
    times = milliseconds({**runs, **whole}, repeats)

    copy = sum(p.numel() * p.element_size() for p in parameters)
    largest = max(p.numel() * p.element_size() for p in parameters)
    step = (net, closure, parameters)
    inference = cost(step, gradient=Inference(), repeats=0).peak_bytes
    rows = []
    for name in (*rules, *whole):
        if name in rules:
            found = cost(step, gradient=rules[name], repeats=0)
            peak, evaluations, needed = found.peak_bytes, found.evaluations, max(inference, copy)
        else:
            peak, evaluations, needed = peak_bytes(whole[name]), 2, inference
        kind = "rademacher" if "rademacher" in name else "gaussian"
        least = times[f"bound {kind} {4 if 'inplace' in name else 3}"]
        bounded = name in whole or isinstance(rules[name], SPSA)
        rows.append(
            {
                "route": name,
                "evaluations": evaluations,
                "peak_bytes": peak,
                "extra_bytes": peak - needed,
                "extra_over_copy": (peak - needed) / copy,
                "extra_over_largest": (peak - needed) / largest,
                "ms": times[name],
                "bound_ms": least if bounded else None,
                "ratio": times[name] / least if bounded else None,
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
    columns = ["route", "evaluations", "peak", "extra", "extra / largest", "ms", "bound ms", "ratio"]
    rows = [
        [
            row["route"],
            str(row["evaluations"]),
            scaled(row["peak_bytes"], "B"),
            scaled(row["extra_bytes"], "B"),
            f"{row['extra_over_largest']:.2f}",
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
