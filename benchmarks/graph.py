"""A step of forward learning on a graph: with the aggregate kept, computed anew, and on another library.

    python benchmarks/graph.py [--nodes 2708] [--features 1433] [--width 64] [--repeats 31] [--out FILE.json]

The graph is drawn at random with as many nodes, features and edges as Cora has, so that nothing is fetched.
First table: one gradient of one layer by single forward (virtual nodes, cross-entropy), the product with the
adjacency kept from step to step, or computed anew in the cheaper order (dense layer first where it makes the
product narrower); the peer is the same step on PyTorch Geometric's GCNConv or SAGEConv, GCNConv with the
normalised edges cached. Second table: bytes that the graph keeps for backward, the most of any phase, beside
the same layers trained end to end, over depth. All variants of a row run in turn in one process; times are
medians of the repeats.
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

from thalweg.data import undirected
from thalweg.ledger.cost import saved_bytes
from thalweg.local import BackpropGraph, GraphStack, LabelledGraph, VirtualNodes, convolutions
from thalweg.table import align, scaled

CLASSES = 7
# edges of Cora, both ways, for each of its nodes
DEGREE = 10556 / 2708
# words of a paper of Cora: 49 216 in all
WORDS = 18


def drawn_graph(nodes: int, features: int) -> LabelledGraph:
    """A random graph of Cora's density."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(nodes, (2, round(DEGREE * nodes / 2)), generator=generator)
    words = torch.randint(features, (nodes, WORDS), generator=generator)
    x = torch.zeros(nodes, features).scatter_(1, words, 1.0)
    labels = torch.randint(CLASSES, (nodes,), generator=generator)
    known = torch.rand(nodes, generator=generator) < 0.64
    return LabelledGraph(x / x.sum(1, keepdim=True), undirected(pairs, nodes), labels, known)


def learner(conv: nn.Module, features: int, cached: bool) -> GraphStack:
    return GraphStack([conv], VirtualNodes(features, CLASSES), cached=cached)


def step(stack: GraphStack, graph: LabelledGraph) -> Callable[[], Tensor]:
    """One gradient of one layer, as greedy training repeats it."""
    (phase,) = stack.phases(graph)

    def run() -> Tensor:
        stack.zero_grad()
        return phase.backward()

    return run


def medians(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    warmup = 3
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(kind: str, inputs: int, width: int, nodes: int, repeats: int) -> dict[str, Any]:
    graph = drawn_graph(nodes, inputs)
    runs = {}
    for cached in (True, False):
        torch.manual_seed(0)
        runs[f"cached {cached}"] = step(learner(*convolutions(kind, [inputs, width]), inputs, cached), graph)
    try:
        from torch_geometric import nn as geometric
    except ImportError:
        pass
    else:
        peer = (
            geometric.GCNConv(inputs, width, cached=True)
            if kind == "gcn"
            else geometric.SAGEConv(inputs, width)
        )
        runs["peer"] = step(learner(peer, inputs, cached=False), graph)
    kept, anew = (runs[f"cached {cached}"]() for cached in (True, False))
    torch.testing.assert_close(kept, anew)
    found = medians(runs, repeats)
    row: dict[str, Any] = {"convolution": kind, "inputs": inputs, "outputs": width}
    row |= {
        "cached_ms": found["cached True"],
        "uncached_ms": found["cached False"],
        "peer_ms": found.get("peer"),
    }
    for name in ("uncached", "peer"):
        spent = row[f"{name}_ms"]
        row[f"cached_over_{name}"] = None if spent is None else row["cached_ms"] / spent
    return row


def kept_bytes(depth: int, features: int, width: int, nodes: int) -> dict[str, Any]:
    """What a backward keeps at most: one layer at a time, or all of them at once."""
    graph = drawn_graph(nodes, features)
    torch.manual_seed(0)
    local = GraphStack(convolutions("gcn", [features, *[width] * depth]), VirtualNodes(features, CLASSES))
    forward = max(saved_bytes(phase.loss, local) for phase in local.phases(graph))
    twin = BackpropGraph(convolutions("gcn", [features, *[width] * (depth - 1), CLASSES]))
    (everything,) = twin.phases(graph)
    through = saved_bytes(everything.loss, twin)
    return {
        "depth": depth,
        "local_bytes": forward,
        "backprop_bytes": through,
        "local_over_backprop": forward / through,
    }


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2708)
    parser.add_argument("--features", type=int, default=1433)
    parser.add_argument("--width", type=int, default=64, help="of every layer")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/graph.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        timed(kind, inputs, options.width, options.nodes, options.repeats)
        for kind in ("gcn", "sage")
        for inputs in (options.features, options.width)
    ]
    columns = ["conv", "in", "out", "kept ms", "anew ms", "peer ms", "kept / anew", "kept / peer"]
    numbers = ("cached_ms", "uncached_ms", "peer_ms", "cached_over_uncached", "cached_over_peer")
    lines = [
        [row["convolution"], str(row["inputs"]), str(row["outputs"]), *(number(row[key]) for key in numbers)]
        for row in rows
    ]
    print(align(columns, lines))
    depths = [kept_bytes(d, options.features, options.width, options.nodes) for d in (2, 4, 8, 16, 32)]
    lines = [
        [
            str(d["depth"]),
            scaled(d["local_bytes"], "B"),
            scaled(d["backprop_bytes"], "B"),
            number(d["local_over_backprop"]),
        ]
        for d in depths
    ]
    print("\n" + align(["layers", "local", "backprop", "local / backprop"], lines))
    found = {
        "benchmark": "graph",
        "nodes": options.nodes,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
        "depths": depths,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
