"""`Checkpointed` beside `torch.utils.checkpoint.checkpoint_sequential`, at no more memory than it takes.

The peer cuts the process into segments. For each number of segments its peak is counted, and `Checkpointed`
gets that peak as its budget, and again as many slots as the peer keeps states. Counted first (bytes kept,
peak, step calls and the least calls that are possible with so many states), timed last: alternating, median
of the repeats, ratio to the peer. A second table shows what only slots can do: the same process in less
memory than any number of segments.

Run as `python benchmarks/checkpointed.py [--out FILE.json] [--repeats N] [--steps N]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from thalweg.ledger import cost
from thalweg.rollouts import Checkpointed, plan, rollout, step_calls
from thalweg.table import align, scaled

Closure = Callable[[], Tensor]


class Process:
    """A residual network of one block applied again and again; counts its calls."""

    def __init__(self, steps: int, kind: str) -> None:
        self.steps = steps
        self.calls = 0
        if kind == "wide state":
            # the state is a third of what a step keeps: the number of states decides
            self.net: nn.Module = nn.Sequential(nn.Linear(128, 128), nn.Tanh())
            self.x = torch.randn(256, 128)
        else:
            # a step keeps a hundred times its state: whole steps decide
            layers = [nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU()]
            middle = [nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU()]
            self.net = nn.Sequential(*layers, *middle, nn.Conv2d(32, 4, 3, padding=1))
            self.x = torch.randn(2, 4, 16, 16)

    def step(self, x: Tensor, k: int) -> Tensor:
        self.calls += 1
        return x + 0.1 * self.net(x)

    def peer(self, segments: int) -> Closure:
        functions = [partial(self.step, k=k) for k in range(self.steps)]
        return lambda: checkpoint_sequential(functions, segments, self.x, use_reentrant=False).square().mean()

    def ours(self, store: Any) -> Closure:
        return lambda: rollout(self.step, self.x, self.steps, gradient=store).square().mean()


def counted(process: Process, closure: Closure) -> dict[str, Any]:
    found = cost((process.net, closure, list(process.net.parameters())), repeats=0)
    process.calls = 0
    torch.autograd.grad(closure(), list(process.net.parameters()))
    return {"kept_bytes": found.saved_bytes, "peak_bytes": found.peak_bytes, "step_calls": process.calls}


def timed(process: Process, closures: dict[str, Closure], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in closures}
    for _ in range(repeats + 1):
        for name, closure in closures.items():
            start = time.perf_counter()
            torch.autograd.grad(closure(), list(process.net.parameters()))
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compare(kind: str, process: Process, segments: int, repeats: int) -> dict[str, Any]:
    peer = process.peer(segments)
    numbers = {"checkpoint_sequential": counted(process, peer)}
    budget = numbers["checkpoint_sequential"]["peak_bytes"]
    stores: dict[str, Any] = {
        "slots": Checkpointed(slots=segments),
        "segments": Checkpointed(segments=segments),
    }
    # the loss is not part of the rollout: it takes a square and two cotangents of the state's size
    loss = 3 * process.x.numel() * process.x.element_size()
    stores["budget"] = plan(
        process.step, process.x, process.steps, gradient=Checkpointed(budget=budget - loss)
    ).store
    closures = {name: process.ours(store) for name, store in stores.items()}
    numbers |= {name: counted(process, closure) for name, closure in closures.items()}
    times = timed(process, {"checkpoint_sequential": peer, **closures}, repeats)
    for name, row in numbers.items():
        row["milliseconds"] = times[name]
        row["time_ratio"] = times[name] / times["checkpoint_sequential"]
        row["store"] = repr(stores.get(name, f"segments={segments}"))
    return {"process": kind, "steps": process.steps, "segments": segments, "routes": numbers}


def tightest(kind: str, process: Process, repeats: int) -> list[dict[str, Any]]:
    """Slots from one per step down to three, beside the smallest peak that any number of segments reaches."""
    choices = sorted({1 << n for n in range(1, 10) if 1 << n <= process.steps} | {process.steps})
    peers = [(counted(process, process.peer(n)), n) for n in choices]
    smallest, segments = min(peers, key=lambda each: each[0]["peak_bytes"])
    closures = {"checkpoint_sequential": process.peer(segments)}
    slots = [n for n in (process.steps, 16, 8, 4, 3) if n <= process.steps]
    closures |= {str(n): process.ours(Checkpointed(slots=n)) for n in slots}
    times = timed(process, closures, max(repeats // 3, 1))
    rows = []
    for n in slots:
        row = counted(process, closures[str(n)])
        ratio = row["peak_bytes"] / smallest["peak_bytes"]
        rows.append(
            {
                "process": kind,
                "steps": process.steps,
                "slots": n,
                **row,
                "least_calls": step_calls(process.steps, n),
                "peer_segments": segments,
                "peer_peak_bytes": smallest["peak_bytes"],
                "peak_ratio": ratio,
                "time_ratio": times[str(n)] / times["checkpoint_sequential"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/checkpointed.json"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kinds = {kind: Process(options.steps, kind) for kind in ("wide state", "wide step")}
    equal = [
        compare(kind, process, segments, options.repeats)
        for kind, process in kinds.items()
        for segments in (2, 4, 8, 16)
    ]
    rows = [
        [
            f"{each['process']}, {each['segments']} segments" if name == "checkpoint_sequential" else "",
            name,
            scaled(row["kept_bytes"], "B"),
            scaled(row["peak_bytes"], "B"),
            str(row["step_calls"]),
            f"{row['milliseconds']:.1f}",
            f"{row['time_ratio']:.2f}",
        ]
        for each in equal
        for name, row in each["routes"].items()
    ]
    headings = ["process", "route", "kept", "peak", "step calls", "ms", "time ratio"]
    print(align(headings, rows), end="\n\n")
    less = [row for kind, process in kinds.items() for row in tightest(kind, process, options.repeats)]
    rows = [
        [
            row["process"],
            str(row["slots"]),
            scaled(row["peak_bytes"], "B"),
            f"{scaled(row['peer_peak_bytes'], 'B')} at {row['peer_segments']}",
            str(row["step_calls"]),
            str(row["least_calls"]),
            f"{row['peak_ratio']:.2f}",
            f"{row['time_ratio']:.2f}",
        ]
        for row in less
    ]
    headings = [
        "process",
        "slots",
        "peak",
        "least peak by segments",
        "step calls",
        "least possible",
        "peak ratio",
        "time ratio",
    ]
    print(align(headings, rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "threads": 1, "equal_memory": equal, "less_memory": less}
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
