"""What a flow of the toy is judged by: all of it on points that it was not trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.flows import (
    Coupling,
    Euler,
    Field,
    Paired,
    Trajectory,
    energy_distance,
    excess_transport_cost,
    follow,
    sample,
    transport_cost,
)
from thalweg.noise import Key

STEPS = (1, 2, 4, 8, 100)
_LARGEST_ASSIGNMENT = 2048
_DRAWN = 60


def judged(field: Field, fresh: Paired, steps: int) -> dict[str, Any]:
    """Straightness, cost and distance from the data of one flow.

    Args:
        field: the flow.
        fresh: points of both ends, in no order.
        steps: of the Euler simulation that straightness and cost are read from.

    Returns:
        `straightness`, `cost` (mean square), `excess` (over the cheapest pairing of the same points),
        `distances` (energy distance from fresh data by number of Euler steps); to be drawn: `paths` (see
        `drawing`) and `single` (where one Euler step takes the same points).
    """
    flow = follow(field, fresh.source, euler_times(steps), solver=Euler())
    few = slice(0, _LARGEST_ASSIGNMENT)
    with torch.no_grad():
        single = sample(field, fresh.source[:_DRAWN], [1.0, 0.0], solver=Euler())
    return {
        "straightness": float(flow.straightness().mean()),
        "cost": float(transport_cost(flow.data, fresh.source).mean()),
        "excess": float(excess_transport_cost(flow.data[few], fresh.source[few])),
        "distances": distances(field, fresh, STEPS),
        "paths": drawing(flow),
        "single": rounded(single),
    }


def distances(field: Field, fresh: Paired, steps: tuple[int, ...]) -> dict[str, float]:
    """The energy distance between fresh data and what so many Euler steps make of fresh sources."""
    found = {}
    for count in steps:
        with torch.no_grad():
            ends = sample(field, fresh.source, euler_times(count), solver=Euler())
        found[str(count)] = float(energy_distance(ends, fresh.data))
    return found


def euler_times(steps: int) -> Tensor:
    """So many equal steps from the source to the data."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def drawing(flow: Trajectory, paths: int = _DRAWN, points: int = 61) -> list[list[list[float]]]:
    """Some paths of a flow, thinned out for a figure: (path, time, coordinate)."""
    rows = torch.linspace(0, len(flow.times) - 1, min(points, len(flow.times))).round().long()
    return rounded(flow.states[rows, :paths].transpose(0, 1))  # type: ignore[no-any-return]


def tangents(field: Field, fresh: Paired, steps: int) -> list[list[float]]:
    """The heights at which the tangents of some paths would end, by path and time; for straight lines."""
    flow = follow(field, fresh.source[:_DRAWN], euler_times(steps), solver=Euler())
    return rounded(flow.extrapolated(field)[:, :, 1].T)  # type: ignore[no-any-return]


def some_pairs(coupling: Coupling) -> list[list[list[float]]]:
    """A few pairs as a flow was given them: (pair, end, coordinate), the source first."""
    pair = coupling.draw(_DRAWN, Key(0))
    return rounded(torch.stack([pair.source, pair.data], 1))  # type: ignore[no-any-return]


def rounded(values: Tensor) -> Any:
    """As lists, to three decimals: enough for a figure."""
    return values.double().round(decimals=3).tolist()
