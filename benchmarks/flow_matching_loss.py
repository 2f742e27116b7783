"""The flow-matching loss beside that of the package flow_matching: the same numbers, and the time of a step.

    python benchmarks/flow_matching_loss.py [--steps 20] [--repeats 41] [--device cpu] [--out FILE.json]

Both train the same network from the same weights on the same data, noise and times: theirs by
`AffineProbPath(CondOTScheduler()).sample` and the mean square, ours by `rectified_loss` on the straight path.
Their time runs from noise to data, so their network is told 1 - t. Times are multiples of 2^-20, for which
1 - t is exact and parity can be to the last bit: `differ` is the largest difference of any loss or weight
over all steps. Draws are made before; what is timed is the loss (forward alone), its gradient (forward and
backward), and a whole step with Adam. Both run in turn in one process; medians of repeats, in microseconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler
from torch import Tensor, nn

from thalweg.flows import Field, Straight, rectified_loss
from thalweg.table import align

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Points(nn.Module):
    """A perceptron on points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.inner(torch.cat([x, t[:, None]], 1))
        return out


class Images(nn.Module):
    """Two convolutions on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        out: Tensor = self.inner(torch.cat([x, time], 1))
        return out


WORK: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "points": (Points, (512, 2)),
    "images": (Images, (32, 3, 32, 32)),
}


def ours(network: nn.Module, data: Tensor, source: Tensor, t: Tensor) -> Tensor:
    return rectified_loss(Field(network, Straight()), data, source, t=t).mean()


PATH = AffineProbPath(CondOTScheduler())


def theirs(network: nn.Module, data: Tensor, source: Tensor, t: Tensor) -> Tensor:
    drawn = PATH.sample(x_0=source, x_1=data, t=1 - t)
    # their velocity points to the data, and the network's from it
    error = (network(drawn.x_t, t) + drawn.dx_t) ** 2
    return error.flatten(1).mean(1).mean()


def batch(shape: tuple[int, ...], seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data, source = torch.randn((2, *shape), generator=generator)
    t = torch.randint(1, 2**20, (shape[0],), generator=generator) / 2**20
    return data.to(device), source.to(device), t.to(device)


def largest_difference(name: str, steps: int, device: torch.device) -> float:
    """Train both from the same weights, step by step, and compare losses and weights."""
    make, shape = WORK[name]
    torch.manual_seed(0)
    networks = [make().to(device)]
    networks.append(copy.deepcopy(networks[0]))
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in networks]
    worst = 0.0
    for step in range(steps):
        drawn = batch(shape, step, device)
        losses = []
        for loss, network, optimizer in zip((ours, theirs), networks, optimizers):
            optimizer.zero_grad()
            losses.append(loss(network, *drawn))
            losses[-1].backward()
            optimizer.step()
        pairs = [(losses[0], losses[1]), *zip(networks[0].parameters(), networks[1].parameters())]
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in pairs))
    return worst


def runners(name: str, device: torch.device) -> dict[tuple[str, str], Callable[[], None]]:
    make, shape = WORK[name]
    drawn = batch(shape, 0, device)
    found: dict[tuple[str, str], Callable[[], None]] = {}
    for side, loss in (("ours", ours), ("theirs", theirs)):
        torch.manual_seed(0)
        network = make().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

        def forward(loss: Loss = loss, network: nn.Module = network) -> None:
            with torch.no_grad():
                loss(network, *drawn)

        def gradient(loss: Loss = loss, network: nn.Module = network) -> None:
            torch.autograd.grad(loss(network, *drawn), list(network.parameters()))

        def step(
            loss: Loss = loss, network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            optimizer.zero_grad()
            loss(network, *drawn).backward()
            optimizer.step()

        found[("loss", side)], found[("gradient", side)], found[("step", side)] = forward, gradient, step
    return found


def timed(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - start)


def measure(name: str, steps: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    runs = runners(name, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    warmup = 3
    for repeat in range(warmup + repeats):
        for key, run in runs.items():
            spent = timed(run, device)
            if repeat >= warmup:
                times[key].append(spent)
    median = {key: statistics.median(values) for key, values in times.items()}
    differ = largest_difference(name, steps, device)
    return [
        {
            "work": name,
            "shape": list(WORK[name][1]),
            "part": part,
            "differ": differ,
            "flow_matching_us": median[(part, "theirs")],
            "us": median[(part, "ours")],
            "over_flow_matching": median[(part, "ours")] / median[(part, "theirs")],
        }
        for part in ("loss", "gradient", "step")
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{row['work']}, {row['part']}",
            "x".join(map(str, row["shape"])),
            f"{row['differ']:g}",
            *(f"{row[key]:.0f}" for key in ("flow_matching_us", "us")),
            f"{row['over_flow_matching']:.2f}",
        ]
        for row in rows
    ]
    return align(["part", "batch", "differ", "flow_matching us", "us", "ours / flow_matching"], lines)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/flow_matching_loss.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in WORK:
        rows += measure(name, options.steps, options.repeats, torch.device(options.device))
    print(table(rows))
    found = {
        "benchmark": "flow_matching_loss",
        "steps": options.steps,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "flow_matching": version("flow_matching"),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
