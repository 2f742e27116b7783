"""Local learning against backpropagation at equal architecture: step time, kept bytes, and two processes.

    python benchmarks/local.py [--width 256] [--batch 128] [--repeats 9] [--out FILE]

Dense networks of depth 2 to 32. Each local learner has a twin with the same blocks trained by one loss and
backpropagation; both take a full step of Adam, in turn, and the ratios (local over twin) come last. A step
of a local learner moves every block once. Kept bytes are those of the ledger: of the local learners they
must not grow with depth (the script fails if they do), except for predictive coding, whose activities are
part of its state, and for aligned networks, which keep what backpropagation keeps.

Then NoProp with its blocks on one process and on two: wall time per step of all blocks, and processor time
of the busiest process, which other programs on the machine disturb less; steps above are in processor
time too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.ledger import cost
from thalweg.local import (
    BackpropNoProp,
    DenoisingBlock,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    ForwardForward,
    LayerParallel,
    LocalStack,
    NoProp,
    PredictiveCoding,
    Readout,
    align,
    one_hot_labels,
)
from thalweg.noise import Key
from thalweg.step import Step
from thalweg.table import align as columns_of
from thalweg.table import scaled

DEPTHS = (2, 4, 8, 16, 32)
CLASSES = 10
FLAT = ("local readouts", "forward-forward", "NoProp")


def dense(depth: int, width: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]


def with_head(depth: int, width: int) -> nn.Sequential:
    return nn.Sequential(*dense(depth, width), nn.Linear(width, CLASSES))


def denoisers(depth: int, width: int) -> list[nn.Module]:
    labels = one_hot_labels(CLASSES)
    return [DenoisingBlock(labels, width, width=width // 2) for _ in range(depth)]


def pairs(depth: int, width: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each local learner and its twin."""
    labels = one_hot_labels(CLASSES)
    last = 2 * [nn.Linear(width, CLASSES)]
    return {
        "local readouts": (
            LocalStack(dense(depth, width), [Readout(width, CLASSES) for _ in range(depth)]),
            with_head(depth, width),
        ),
        "forward-forward": (
            ForwardForward(dense(depth, width), CLASSES),
            with_head(depth, width),
        ),
        "NoProp": (
            NoProp(denoisers(depth, width), labels),
            BackpropNoProp(denoisers(depth, width), labels),
        ),
        "predictive coding": (
            PredictiveCoding([*dense(depth, width), last[0]], steps=depth, rate=1.0, prediction="fixed"),
            with_head(depth, width),
        ),
        "feedback alignment": (
            align(with_head(depth, width), gradient=FeedbackAlignment()),
            with_head(depth, width),
        ),
        "direct feedback": (
            align(with_head(depth, width), gradient=DirectFeedbackAlignment()),
            with_head(depth, width),
        ),
    }


def as_step(module: Any, batch: tuple[Tensor, Tensor]) -> Step:
    if hasattr(module, "phases"):
        return Step(module, lambda: module.phases(batch), tuple(module.parameters()))
    return Step(module, lambda: F.cross_entropy(module(batch[0]), batch[1]), tuple(module.parameters()))


def trainer(module: Any, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One step of every parameter; a learner has an optimizer per phase, as its locality asks."""
    if not hasattr(module, "phases"):
        optimizer = torch.optim.Adam(module.parameters())

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()

        return step
    optimizers: dict[str, torch.optim.Optimizer] = {}

    def local_step() -> None:
        for phase in module.phases(batch):
            if phase.name not in optimizers:
                optimizers[phase.name] = torch.optim.Adam(phase.parameters)
            optimizers[phase.name].zero_grad()
            phase.backward()
            optimizers[phase.name].step()

    return local_step


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor time of each, in turn, after one round to warm up; one thread, so that is its time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def depth_rows(width: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    batch = torch.rand(batch_size, width), torch.randint(0, CLASSES, (batch_size,))
    rows = []
    for depth in DEPTHS:
        for name, (local, twin) in pairs(depth, width).items():
            found = {
                kind: cost(as_step(m, batch), repeats=0) for kind, m in (("local", local), ("twin", twin))
            }
            median = milliseconds({"local": trainer(local, batch), "twin": trainer(twin, batch)}, repeats)
            rows.append(
                {
                    "learner": name,
                    "depth": depth,
                    "local_bytes": found["local"].saved_bytes,
                    "twin_bytes": found["twin"].saved_bytes,
                    "local_operations": found["local"].operations,
                    "twin_operations": found["twin"].operations,
                    "local_ms": median["local"],
                    "twin_ms": median["twin"],
                    "bytes_ratio": found["local"].saved_bytes / found["twin"].saved_bytes,
                    "operations_ratio": found["local"].operations / found["twin"].operations,
                    "ms_ratio": median["local"] / median["twin"],
                }
            )
    return rows


def require_flat(rows: list[dict[str, Any]]) -> None:
    """Fail where the kept bytes of a local learner grow with depth."""
    for name in FLAT:
        kept = {row["depth"]: row["local_bytes"] for row in rows if row["learner"] == name}
        if len(set(kept.values())) > 1:
            raise SystemExit(f"{name}: kept bytes depend on depth: {kept}")


def parallel_rank(
    rank: int, world: int, folder: str, width: int, batch_size: int, steps: int, depth: int
) -> None:
    """Time `steps` steps of this rank's share of the blocks; rank 0 writes what the slowest rank took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    learner = NoProp(denoisers(depth, width), one_hot_labels(CLASSES), anchor="own")
    parallel = LayerParallel(learner)
    optimizer = torch.optim.Adam(parallel.learned())
    batch = torch.rand(batch_size, width), torch.randint(0, CLASSES, (batch_size,))

    def step(index: int) -> None:
        for phase in parallel.phases(batch, key=Key(0, index)):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()

    step(0)
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    for index in range(1, steps + 1):
        step(index)
    spent = torch.tensor([time.perf_counter() - start, time.process_time() - busy], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    if rank == 0:
        Path(folder, f"milliseconds{world}").write_text(json.dumps((1000 * spent / steps).tolist()))
    dist.destroy_process_group()


def parallel_row(width: int, batch_size: int, repeats: int, depth: int = 11) -> dict[str, Any]:
    """One and two processes in turn; with 11 blocks and the readout both ranks have six phases."""
    found: dict[int, list[list[float]]] = {1: [], 2: []}
    for _ in range(repeats):
        for world in found:
            with tempfile.TemporaryDirectory() as folder:
                work = (world, folder, width, batch_size, 20, depth)
                mp.spawn(parallel_rank, args=work, nprocs=world)
                found[world].append(json.loads(Path(folder, f"milliseconds{world}").read_text()))
    wall, busy = ([statistics.median(r[k] for r in found[world]) for world in (1, 2)] for k in (0, 1))
    return {
        "blocks": depth,
        "width": width,
        "wall_ms": wall,
        "processor_ms": busy,
        "processor_speedup": busy[0] / busy[1],
        "speedup": wall[0] / wall[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/local.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = depth_rows(options.width, options.batch, options.repeats)
    headings = [
        "learner",
        "depth",
        "kept",
        "twin kept",
        "ms",
        "twin ms",
        "kept / twin",
        "operations / twin",
        "ms / twin",
    ]
    lines = [
        [
            row["learner"],
            str(row["depth"]),
            scaled(row["local_bytes"], "B"),
            scaled(row["twin_bytes"], "B"),
            *(
                f"{row[key]:.2f}"
                for key in ("local_ms", "twin_ms", "bytes_ratio", "operations_ratio", "ms_ratio")
            ),
        ]
        for row in sorted(rows, key=lambda row: row["learner"])
    ]
    print(columns_of(headings, lines), end="\n\n")
    wide = partial(parallel_row, 2 * options.width, options.batch)
    row = wide(max(1, options.repeats // 3))
    headings = [
        "NoProp blocks",
        "width",
        "one: ms (processor)",
        "two: ms (processor)",
        "speed-up (processor)",
    ]
    line = [
        str(row["blocks"]),
        str(row["width"]),
        *(f"{wall:.1f} ({busy:.1f})" for wall, busy in zip(row["wall_ms"], row["processor_ms"])),
        f"{row['speedup']:.2f} ({row['processor_speedup']:.2f})",
    ]
    print(columns_of(headings, [line]))
    found = {
        "benchmark": "local",
        "width": options.width,
        "batch": options.batch,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "depths": rows,
        "layer_parallel": row,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    require_flat(rows)


if __name__ == "__main__":
    main()
