"""What an equilibrium's gradient costs: nudged against its relaxations, implicit against unrolled.

    python benchmarks/equilibria.py [--batch 20] [--repeats 15] [--device cpu] [--out FILE]

Learners: one step of equilibrium propagation, in turn with as many energy gradients by autograd as it has
relaxation steps (one energy gradient is the derivative of the energy by the state, once); the ratio comes
last and is to stay below 1.2. Layers: the same network under each policy, with a growing number of
relaxation steps: bytes kept for backward and time of forward and backward, ratios to `Backprop()` last.
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
from torch import Tensor

from thalweg.equilibria import (
    EnergyNetwork,
    EquilibriumPropagation,
    Implicit,
    Nudged,
    OneStep,
    SquaredError,
    conv_links,
    convergent,
    dense_links,
    even_odd,
    half_clip,
    hopfield,
    smooth_clip,
)
from thalweg.ledger import saved_bytes
from thalweg.step import Backprop
from thalweg.table import align, scaled

BOUND = 1.2


def images(pool: str, gain: float | None = None) -> dict[str, Any]:
    """Three convolutions on 32 x 32 pixels and a link to ten classes."""
    links = conv_links([3, 16, 32, 32], [1, 1, 1], 32 * 4 * 4, 10, pool=pool, gain=gain)
    return {"links": links, "input_shape": (3, 32, 32)}


def learners() -> dict[str, tuple[EnergyNetwork, Nudged, int]]:
    """Network, nudge and free steps, as in the papers where they are small enough."""
    return {
        "hopfield 784-500-10": (hopfield(dense_links([784, 500, 10])), Nudged(0.5, "random", steps=4), 20),
        "convergent 784-512-10": (convergent(dense_links([784, 512, 10])), Nudged(0.1, steps=10), 30),
        "convergent, 4 points": (
            convergent(dense_links([784, 512, 10])),
            Nudged(0.4, "holomorphic", steps=10, points=4),
            30,
        ),
        "convolutions, max-pool": (
            convergent(**images("max", 0.5), activation=half_clip),
            Nudged(0.5, steps=10),
            30,
        ),
        "convolutions, soft pool": (
            convergent(**images("soft", 0.5), activation=smooth_clip),
            Nudged(0.5, steps=10),
            30,
        ),
        "even-odd convolutions": (even_odd(**images("max", 0.5)), Nudged(0.25, steps=15), 60),
    }


def milliseconds(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median time of each, in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def relaxations(policy: Nudged) -> tuple[int, int]:
    """How many nudged relaxations a policy takes: on the real line, and in the complex plane."""
    if policy.form == "holomorphic":
        real = 2 if policy.points % 2 == 0 else 1
        return real, policy.points // 2 + 1 - real
    return (2 if policy.form == "centered" else 1), 0


def learner_row(
    name: str,
    network: EnergyNetwork,
    policy: Nudged,
    free: int,
    batch: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    network = network.to(device)
    shape = (3, 32, 32) if "conv" in name.split()[-1] or "pool" in name or "even" in name else (784,)
    x, y = torch.rand(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    learner = EquilibriumPropagation(network, SquaredError(), gradient=policy, steps=free)
    states = [part.requires_grad_() for part in network.zeros(x)]
    real, plane = relaxations(policy)
    assert policy.steps is not None

    def gradient(states: list[Tensor]) -> None:
        energy = network.energy(x, tuple(states)).sum()
        torch.autograd.grad(energy, states)

    def step() -> None:
        for phase in learner.phases((x, y)):
            phase.backward()

    median = milliseconds({"gradient": lambda: gradient(states), "step": step}, repeats, device)
    # a complex product is four real ones: those relaxations are counted by their real operations
    steps = free + policy.steps * (real + 4 * plane)
    return {
        "network": name,
        "form": policy.form,
        "relaxation_steps": steps,
        "gradient_ms": median["gradient"],
        "step_ms": median["step"],
        "ratio": median["step"] / (steps * median["gradient"]),
    }


def layer_rows(batch: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    network = convergent(dense_links([784, 512, 512, 10], gain=0.5)).to(device)
    x = torch.rand(batch, 784, device=device)
    rows = []
    for steps in (10, 40, 160):
        policies = [Backprop(), Implicit(tolerance=1e-5), OneStep(), Nudged(0.1)]

        def output(policy: Any, steps: int = steps) -> Tensor:
            found: Tensor = network(x, gradient=policy, tolerance=None, max_steps=steps)
            return found.square().sum()

        def run(policy: Any) -> Callable[[], None]:
            return lambda: output(policy).backward()

        names = [type(policy).__name__ for policy in policies]
        median = milliseconds(dict(zip(names, map(run, policies))), repeats, device)
        kept = [saved_bytes(lambda policy=policy: output(policy)) for policy in policies]
        rows += [
            {
                "policy": name,
                "steps": steps,
                "kept_bytes": size,
                "ms": median[name],
                "over_backprop_bytes": size / kept[0],
                "over_backprop_ms": median[name] / median[names[0]],
            }
            for name, size in zip(names, kept)
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/equilibria.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    learned = [
        learner_row(name, *parts, options.batch, options.repeats, device)
        for name, parts in learners().items()
    ]
    columns = ["network", "form", "relaxation steps", "energy gradient ms", "step ms", f"ratio (< {BOUND})"]
    lines = [
        [
            r["network"],
            r["form"],
            str(r["relaxation_steps"]),
            *(f"{r[key]:.2f}" for key in ("gradient_ms", "step_ms", "ratio")),
        ]
        for r in learned
    ]
    print(align(columns, lines), end="\n\n")
    layers = layer_rows(options.batch, options.repeats, device)
    columns = ["policy", "steps", "kept", "ms", "ms / Backprop", "kept / Backprop"]
    lines = [
        [
            r["policy"],
            str(r["steps"]),
            scaled(r["kept_bytes"], "B"),
            f"{r['ms']:.2f}",
            f"{r['over_backprop_ms']:.2f}",
            f"{r['over_backprop_bytes']:.3f}",
        ]
        for r in layers
    ]
    print(align(columns, lines))
    found = {
        "benchmark": "equilibria",
        "batch": options.batch,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "learners": learned,
        "layers": layers,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
