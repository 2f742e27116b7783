"""What a rectified flow has achieved, in one report: costs, straightness, crossing, laws, few-step errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import require_integer
from thalweg.flows.couplings import Coupling, require_coupling
from thalweg.flows.energy_distance import energy_distance
from thalweg.flows.field import Field
from thalweg.flows.linear_steps import Solver
from thalweg.flows.reflow import Times
from thalweg.flows.samplers import sample
from thalweg.flows.solvers import Euler
from thalweg.flows.straightness import (
    COSTS,
    Trajectory,
    crossing,
    excess_transport_cost,
    follow,
    transport_cost,
)
from thalweg.noise import Key
from thalweg.table import align, short

_LARGEST_ASSIGNMENT = 2048


@dataclass(frozen=True, slots=True)
class StepError:
    """What a few Euler steps make of the source.

    Args:
        steps: how many.
        error: root mean square distance, per point, from where the long simulation ends.
        distance: the energy distance from the data.
    """

    steps: int
    error: float
    distance: float


@dataclass(frozen=True, slots=True)
class RectificationReport:
    """What `rectification_report` found. Numbers are means over pairs; "before" are the training pairs.

    Args:
        pairs: how many pairs were drawn.
        costs_before: by name of the cost.
        costs_after: of the flow's own pairs.
        excess: of the flow's pairs over the cheapest pairing, on at most 2048 of them.
        straightness: 0 for straight paths.
        crossing: the error on the training pairs: at least what no velocity can remove.
        balance: the drop of the squared cost less straightness and crossing; 0 for an exact velocity on the
            straight path, but for the solver and sampling.
        balance_error: the standard error of `balance` from the pairs drawn.
        marginals: the energy distance of the flow's law from that of the lines, by time.
        floor: the energy distance of two halves of the training data: what two samples of one law have.
        few_steps: one entry per number of steps.
    """

    pairs: int
    costs_before: Mapping[str, float]
    costs_after: Mapping[str, float]
    excess: float
    straightness: float
    crossing: float
    balance: float
    balance_error: float
    marginals: Mapping[float, float]
    floor: float
    few_steps: tuple[StepError, ...]

    def __str__(self) -> str:
        costs = [
            [f"cost: {name}", short(self.costs_before[name]), short(self.costs_after[name])]
            for name in self.costs_before
        ]
        single = [
            ["excess over the optimum", "", short(self.excess)],
            ["straightness S", "", short(self.straightness)],
            ["crossing V", short(self.crossing), ""],
            ["cost drop - (S + V)", "", f"{short(self.balance)} +- {short(self.balance_error, 2)}"],
            ["law floor", short(self.floor), ""],
            *[[f"law at t = {t:g}", "", short(found)] for t, found in self.marginals.items()],
        ]
        steps = [[str(row.steps), short(row.error), short(row.distance)] for row in self.few_steps]
        first = align([f"{self.pairs} pairs", "given", "flow"], costs + single)
        return first + "\n\n" + align(["Euler steps", "rms error", "energy distance"], steps)


def rectification_report(
    field: Field,
    coupling: Coupling,
    times: Times,
    *,
    count: int = 2000,
    solver: Solver | None = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> RectificationReport:
    """Measure a flow against the pairs that it was trained on.

    Read straightness and distance together: collapsed samples are straight too.

    Args:
        field: the flow.
        coupling: the pairs, `Independent(...)` for a first flow, the stored ones for the next.
        times: falling from 1 to 0, a fine grid for the long simulation and the integrals.
        count: how many pairs to draw, at least 2.
        solver: of the long simulation; None for `DDIM()`.
        steps: numbers of Euler steps to try.
        conditions: handed to the network, the same for all rows; those of the pairs come on top.
        key: names the draws; None for `Key(0)`, so that reports can be compared.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
        MissingExtraError: scipy is not installed.

    Example:
        >>> from thalweg.flows import Paired, Straight
        >>> field = Field(lambda x, t: torch.ones_like(x), Straight(), coupled=True)
        >>> pairs = Paired(torch.zeros(10, 2), torch.ones(10, 2))
        >>> report = rectification_report(field, pairs, [1.0, 0.5, 0.0], count=10)
        >>> report.straightness, report.crossing, report.costs_after["square"]
        (0.0, 0.0, 2.0)
    """
    require_coupling("coupling", coupling)
    require_integer("count", count, 2)
    for number in steps:
        require_integer("steps", number, 1)
    pair = coupling.draw(count, Key(0) if key is None else key)
    data, source = pair.data, pair.source
    given = {**(conditions or {}), **pair.conditions}
    path = follow(field, source, times, solver=solver, conditions=given)
    before = {name: float(transport_cost(data, source, name).mean()) for name in COSTS}
    after = {name: float(transport_cost(path.data, source, name).mean()) for name in COSTS}
    straight = path.straightness()
    crossed = crossing(field, data, source, times, conditions=given)
    drop = transport_cost(data, source) - transport_cost(path.data, source)
    balance = drop - straight - crossed
    few = slice(0, _LARGEST_ASSIGNMENT)
    return RectificationReport(
        pairs=count,
        costs_before=before,
        costs_after=after,
        excess=float(excess_transport_cost(path.data[few], source[few])),
        straightness=float(straight.mean()),
        crossing=float(crossed.mean()),
        balance=float(balance.mean()),
        balance_error=float(balance.std()) / count**0.5,
        marginals=_marginals(field, path, data),
        floor=float(energy_distance(data[: count // 2], data[count // 2 :])),
        few_steps=tuple(_few(field, path, data, number, given) for number in steps),
    )


def _marginals(field: Field, path: Trajectory, data: Tensor) -> dict[float, float]:
    """At the ends of the simulation and the quarters of its grid."""
    last = len(path.times) - 1
    found = {}
    for index in sorted({round(last * share / 4) for share in (1, 2, 3, 4)}):
        t = float(path.times[index])
        lines = field.path.noised(data, path.source, t)
        found[t] = float(energy_distance(path.states[index], lines))
    return found


def _few(field: Field, path: Trajectory, data: Tensor, steps: int, given: Mapping[str, Any]) -> StepError:
    ends = float(path.times[0]), float(path.times[-1])
    grid = torch.linspace(*ends, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        found = sample(field, path.source, grid, solver=Euler(), conditions=given)
    error = (found - path.data).double().square().flatten(1).sum(1).mean().sqrt()
    return StepError(steps, float(error), float(energy_distance(found, data)))
