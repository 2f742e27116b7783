"""Bytes that a step sends and time that it takes on two processes: keys and scalars beside DDP's gradients.

    python benchmarks/distributed.py [--width 512] [--depth 4] [--batch 64] [--samples 4] [--repeats 15]
                                     [--out FILE.json]

Two gloo processes on this machine train the same network, each on its half of the batch. The peer is
DistributedDataParallel with backpropagation: its bytes are those of the gradient buckets that its
communication hook sees, 2 (n - 1) / n times as a ring sends them. Ours are counted by `Distributed.traffic`.
`on the wire` is what the loopback device of the kernel reports, headers, acknowledgements and one barrier
included, per process: of so few bytes nearly all is that. `alone` is the same rule in the same processes
without the exchange, on the same batch. All variants run in turn; times are medians of the repeats, of the
slower process. A real network is slower than loopback: the bytes are the result, the times only show what the
exchange adds here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from thalweg.blackbox import SPSA, Distributed, EvolutionStrategies, ForwardGradient
from thalweg.noise import Key
from thalweg.step import Rule, backward
from thalweg.table import align, scaled

WORLD = 2
WARMUP = 2


def network(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def loopback() -> int | None:
    """Bytes that the loopback device of this machine has sent so far; None where that cannot be read."""
    path = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else None


class Counted:
    """A DDP module whose communication hook counts what its all-reduce sends."""

    def __init__(self, model: nn.Module) -> None:
        self.sent = 0
        self.model = nn.parallel.DistributedDataParallel(model)
        self.model.register_comm_hook(None, self._hook)

    # without annotations: DDP compares them with classes, and here they are strings
    def _hook(self, _state, bucket):
        self.sent += bucket.buffer().nbytes * 2 * (WORLD - 1) // WORLD
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / WORLD)


def steps(options: argparse.Namespace, rank: int) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The variants, and for each that exchanges anything the object that counts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(options.batch, options.width, generator=generator)
    y = torch.randint(10, (options.batch,), generator=generator)
    half = slice(rank * options.batch // WORLD, (rank + 1) * options.batch // WORLD)
    runs: dict[str, Callable[[], object]] = {}
    counters: dict[str, Any] = {}

    def add(name: str, rule: Rule, counter: Any = None) -> None:
        model = network(options.width, options.depth)
        parameters, turn = list(model.parameters()), iter(range(10**9))

        def step() -> None:
            model.zero_grad()
            closure = lambda: nn.functional.cross_entropy(model(x[half]), y[half])  # noqa: E731
            backward(closure, parameters, gradient=rule, key=Key(0, next(turn)))
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(parameter.grad, alpha=-1e-6)

        runs[name] = step
        if counter is not None:
            counters[name] = counter

    ddp = Counted(network(options.width, options.depth))

    def peer() -> None:
        ddp.model.zero_grad()
        nn.functional.cross_entropy(ddp.model(x[half]), y[half]).backward()
        with torch.no_grad():
            for parameter in ddp.model.parameters():
                parameter.add_(parameter.grad, alpha=-1e-6)

    runs["DDP"], counters["DDP"] = peer, ddp
    count = options.samples
    rules = {
        f"SPSA, {count} directions": SPSA(samples=count),
        f"SPSA in place, {count}": SPSA(samples=count, restore="inplace"),
        f"strategies by rank, {count}": EvolutionStrategies(samples=count, weights="ranks"),
        f"forward gradient, {count}": ForwardGradient(samples=count),
    }
    for name, rule in rules.items():
        add(f"{name}, alone", rule)
        splits = ("batch",) if getattr(rule, "restore", "") == "inplace" else ("batch", "directions")
        for split in splits:
            shared = Distributed(rule, split)
            add(f"{name}, {split}", shared, shared.traffic)
    return runs, counters


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One of the processes; each writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/start", rank=rank, world_size=WORLD)
    runs, counters = steps(options, rank)
    found: dict[str, dict[str, Any]] = {name: {"times": [], "wire": []} for name in runs}
    before: dict[str, int] = {}
    for repeat in range(WARMUP + options.repeats):
        if repeat == WARMUP:
            before = {name: counter.sent for name, counter in counters.items()}
        for name, run in runs.items():
            dist.barrier()
            sent, start = loopback(), time.perf_counter()
            run()
            spent = time.perf_counter() - start
            dist.barrier()
            now = loopback()
            if repeat >= WARMUP:
                found[name]["times"].append(1e3 * spent)
                found[name]["wire"].append(None if sent is None or now is None else (now - sent) / WORLD)
    for name, counter in counters.items():
        found[name]["sent"] = (counter.sent - before[name]) / options.repeats
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def rows_of(found: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The slower process's times and what a process sends, beside DDP's."""
    rows = []
    milliseconds = {
        name: max(statistics.median(process[name]["times"]) for process in found) for name in found[0]
    }
    for name, own in found[0].items():
        if "sent" not in own:
            continue
        alone = milliseconds.get(f"{name.rsplit(', ', 1)[0]}, alone")
        wire = own["wire"]
        rows.append(
            {
                "step": name,
                "sent_bytes": own["sent"],
                "wire_bytes": None if None in wire else statistics.median(wire),
                "ms": milliseconds[name],
                "alone_ms": alone,
                "over_alone": None if alone is None else milliseconds[name] / alone,
                "ddp_over_sent": found[0]["DDP"]["sent"] / own["sent"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["step", "sent", "on the wire", "ms", "ms / alone", "DDP bytes / sent"]
    lines = [
        [
            row["step"],
            scaled(row["sent_bytes"], "B"),
            "-" if row["wire_bytes"] is None else scaled(row["wire_bytes"], "B"),
            f"{row['ms']:.1f}",
            "-" if row["over_alone"] is None else f"{row['over_alone']:.2f}",
            f"{row['ddp_over_sent']:,.0f}",
        ]
        for row in rows
    ]
    return align(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="examples, of all processes together")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/distributed.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(folder, options), nprocs=WORLD)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    rows = rows_of(found)
    print(table(rows))
    written = {
        "benchmark": "distributed",
        "weights": sum(p.numel() for p in network(options.width, options.depth).parameters()),
        "processes": WORLD,
        "batch": options.batch,
        "samples": options.samples,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "device": "cpu",
        "threads": 1,
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
