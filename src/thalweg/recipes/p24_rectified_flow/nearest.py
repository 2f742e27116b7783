"""The paper's toy model: flows by the nearest of stored pairs, reflowed without training anything."""

from __future__ import annotations

from typing import Any

import torch

from thalweg.flows import (
    Euler,
    Paired,
    energy_distance,
    follow,
    nearest_pairs_field,
    reflow_pairs,
    sample,
    transport_cost,
)
from thalweg.recipes.p24_rectified_flow.judging import euler_times
from thalweg.recipes.p24_rectified_flow.toy import fresh_points, training_points

_NEIGHBORS, _BANDWIDTH, _STEPS = 100, 0.1, 100


def nearest_flows(pairs: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Straightness, cost and distance of each flow, from sources that are not stored.

    Args:
        pairs: stored; a fifth as many are followed.
        rounds: how often to reflow.
        seed: of the points.

    Returns:
        For each flow `straightness`, `cost`, `once` and `often` (energy distances of 1 and 100 steps).
    """
    points = training_points(pairs, seed)
    fresh, _ = fresh_points(max(1, pairs // 5), seed)
    assert isinstance(points.data, torch.Tensor)
    assert isinstance(points.source, torch.Tensor)
    stored = Paired(points.data, points.source)
    found = []
    # the field leads to the data in the time that is left, which at t = 0 is none
    before_the_end = torch.linspace(1, 1 / _STEPS, _STEPS, dtype=torch.float64)
    for _ in range(rounds + 1):
        field = nearest_pairs_field(stored, neighbors=_NEIGHBORS, bandwidth=_BANDWIDTH)
        flow = follow(field, fresh.source, before_the_end, solver=Euler())
        once, often = (
            sample(field, fresh.source, euler_times(steps), solver=Euler()) for steps in (1, _STEPS)
        )
        found.append(
            {
                "straightness": float(flow.straightness().mean()),
                "cost": float(transport_cost(often, fresh.source).mean()),
                "once": float(energy_distance(once, fresh.data)),
                "often": float(energy_distance(often, fresh.data)),
            }
        )
        stored = reflow_pairs(field, points.source, euler_times(_STEPS), solver=Euler())
    return found
