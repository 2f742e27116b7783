"""What the theory says, on the toy whose velocity is known: nothing is trained."""

from __future__ import annotations

from typing import Any

import torch

from thalweg.flows import (
    Cosine,
    Euler,
    RungeKutta4,
    Straight,
    crossing,
    follow,
    sample,
    transport_cost,
)
from thalweg.flows.path import Path
from thalweg.flows.straightness import COSTS
from thalweg.noise import Key
from thalweg.recipes.p24_rectified_flow.judging import drawing
from thalweg.recipes.p24_rectified_flow.toy import TOY, stratified_pairs

EULER_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CHUNK = 2048


def balance(path: Path, pairs: int, steps: int, seed: int) -> dict[str, Any]:
    """What the exact flow between the two mixtures costs, how straight it is, and where it ends.

    Args:
        path: on which the lines between the ends are drawn.
        pairs: how many, a multiple of 8.
        steps: of Runge-Kutta's method.
        seed: of the pairs.

    Returns:
        `before` and `after` (mean costs by name), `straightness`, `crossing`, `height` (mean |y| at the end),
        `single_height` (the same after one Euler step).
    """
    given = stratified_pairs(pairs, seed)
    field, times = TOY.field(path), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    parts = []
    for rows in torch.arange(pairs).split(_CHUNK):
        data, source = given.data[rows], given.source[rows]
        flow = follow(field, source, times, solver=RungeKutta4())
        parts.append(
            {f"before {cost}": transport_cost(data, source, cost) for cost in COSTS}
            | {f"after {cost}": transport_cost(flow.data, source, cost) for cost in COSTS}
            | {
                "straightness": flow.straightness(),
                "crossing": crossing(field, data, source, times),
                "height": flow.data[:, 1].abs(),
                "single_height": sample(field, source, [1.0, 0.0], solver=Euler())[:, 1].abs(),
            }
        )
    mean = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
    costs = {when: {cost: mean.pop(f"{when} {cost}") for cost in COSTS} for when in ("before", "after")}
    drop = costs["before"]["square"] - costs["after"]["square"]
    gap = drop - mean["straightness"] - mean["crossing"]
    return {**costs, **mean, "drop": drop, "gap": abs(gap) / drop}


def straight_balance(pairs: int, steps: int, seed: int) -> dict[str, Any]:
    """`balance` on straight lines: what the theorems are about."""
    return balance(Straight(), pairs, steps, seed)


def curved_balance(pairs: int, steps: int, seed: int) -> dict[str, Any]:
    """`balance` on the cosine path, which keeps the laws and not the balance: the control."""
    return balance(Cosine(), pairs, steps, seed)


def solvers(points: int, steps: int, seed: int) -> dict[str, Any]:
    """How far a few Euler steps end from where the exact flow ends, and some of its paths to draw.

    Returns:
        `errors` (root mean square by number of steps), `paths` (some of them, see `drawing`).
    """
    source = TOY.source.sample(points, Key(seed))[0]
    field, times = TOY.field(Straight()), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    flow = follow(field, source, times, solver=RungeKutta4())
    errors = {}
    for count in EULER_STEPS:
        grid = torch.linspace(1, 0, count + 1, dtype=torch.float64)
        found = sample(field, source, grid, solver=Euler())
        errors[str(count)] = float((found - flow.data).square().sum(1).mean().sqrt())
    return {"errors": errors, "paths": drawing(flow)}
