"""How straight a flow is and what it costs: the quantities that rectification is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice
from thalweg.flows.couplings import optimal_assignment, require_pair
from thalweg.flows.field import Field
from thalweg.flows.linear_steps import Solver
from thalweg.flows.reflow import Times
from thalweg.flows.samplers import checked_times, sample

COSTS = ("length", "square", "fourth")
Cost = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A simulated flow: the states and the slopes on a grid of times, without gradient.

    Args:
        times: (n,), from noise to data.
        states: (n, batch, ...).
        velocities: dx/dt at them, likewise.
    """

    times: Tensor
    states: Tensor
    velocities: Tensor

    @property
    def source(self) -> Tensor:
        """Where it started."""
        return self.states[0]

    @property
    def data(self) -> Tensor:
        """Where it ended."""
        return self.states[-1]

    def straightness(self) -> Tensor:
        """The integral of |chord - slope|^2 over the time, per example: (batch,).

        0 if and only if each path is a straight line at constant speed; then one Euler step is exact. By the
        trapezoid rule on the grid, whose error falls with the square of the spacing.
        """
        chord = (self.states[-1] - self.states[0]) / (self.times[-1] - self.times[0]).to(self.states)
        return time_mean(_squares(self.velocities - chord), self.times)

    def extrapolated(self, field: Field, **conditions: Any) -> Tensor:
        """The data that the tangent at each time points at, (n, batch, ...): constant where straight."""
        rows = [field.predict("data", x, float(t), **conditions) for x, t in zip(self.states, self.times)]
        return torch.stack([row.detach() for row in rows])


def follow(
    field: Field,
    source: Tensor,
    times: Times,
    *,
    solver: Solver | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Trajectory:
    """Simulate a flow and look at its slope on the way.

    Args:
        field: any field; its slope is its velocity.
        source: the states at `times[0]`, (batch, ...).
        times: falling, as in `sample`; what is integrated over, so fine enough.
        solver: a deterministic one; None for `DDIM()`.
        conditions: handed to the network.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: torch.ones_like(x), Straight())
        >>> follow(field, torch.zeros(3, 2), [1.0, 0.5, 0.0]).straightness()
        tensor([0., 0., 0.], dtype=torch.float64)
    """
    given = dict(conditions or {})
    grid = checked_times(times)
    with torch.no_grad():
        states = sample(field, source, grid, solver=solver, conditions=given, trajectory=True)
        slopes = [field.predict("velocity", x, t, **given) for x, t in zip(states, grid)]
    return Trajectory(
        torch.tensor(grid, dtype=torch.float64, device=source.device),
        torch.stack(states),
        torch.stack(slopes),
    )


def crossing(
    field: Field,
    data: Tensor,
    source: Tensor,
    times: Times,
    *,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """How much the lines between pairs disagree with the mean slope where they cross, per pair: (n,).

    The integral over time of |slope of the line - v|^2. With the exact velocity of the coupling its mean is
    the part of the loss that no network can remove, 0 if and only if lines do not cross; with a trained one
    it is the loss, an upper bound of that.

    Args:
        field: the velocity that was trained on these pairs, or the exact one.
        data: (n, ...).
        source: shaped as the data.
        times: a grid in [0, 1], falling or rising, for the trapezoid rule.
        conditions: handed to the network.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: torch.zeros_like(x), Straight())
        >>> crossing(field, torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]), [1.0, 0.0])
        tensor([1., 1.], dtype=torch.float64)
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    require_pair(data, source)
    grid = checked_times(times)
    given = dict(conditions or {})
    errors = []
    with torch.no_grad():
        for t in grid:
            x = field.path.noised(data, source, t)
            errors.append(field.path.velocity(data, source, t) - field.predict("velocity", x, t, **given))
        return time_mean(
            _squares(torch.stack(errors)), torch.tensor(grid, dtype=torch.float64, device=data.device)
        )


def transport_cost(data: Tensor, source: Tensor, cost: Cost = "square") -> Tensor:
    """What each pair pays for its displacement, (n,), float64.

    Args:
        data: (n, ...).
        source: shaped as the data.
        cost: "length" |z|, "square" |z|^2, "fourth" the sum of fourth powers; or a convex function of the
            displacements, (n, ...) to (n,). Rectification lowers the mean of each of them.

    Example:
        >>> transport_cost(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), "length")
        tensor([5.], dtype=torch.float64)
    """
    require_pair(data, source)
    displacement = (data - source).detach().double()
    if callable(cost):
        found = cost(displacement)
        if not isinstance(found, Tensor) or found.shape != (len(data),):
            raise ArgumentError("cost", found, f"one cost per pair, shape ({len(data)},)")
        return found
    require_choice("cost", cost, COSTS)
    square = displacement.reshape(len(data), -1).square()
    if cost == "fourth":
        return square.square().sum(1)
    total = square.sum(1)
    return total.sqrt() if cost == "length" else total


def excess_transport_cost(data: Tensor, source: Tensor) -> Tensor:
    """The mean squared distance of the pairs less that of the cheapest pairing of the same points.

    In one dimension 0 for a rectified flow; in more it need not be. In many dimensions no pairing of a few
    thousand points is much cheaper than another, and the number says nothing. Needs scipy, and time cubic in
    the number of points: take at most 2048.

    Example:
        >>> excess_transport_cost(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor(1., dtype=torch.float64)
    """
    order = optimal_assignment(data, source)
    return transport_cost(data, source).mean() - transport_cost(data, source[order]).mean()


def time_mean(values: Tensor, times: Tensor) -> Tensor:
    """The mean over time of (n, batch) by the trapezoid rule on a falling or rising grid."""
    share = (times - times[0]) / (times[-1] - times[0])
    return torch.trapezoid(values, share.to(values), dim=0)


def _squares(values: Tensor) -> Tensor:
    return values.double().square().flatten(2).sum(2) if values.ndim > 2 else values.double().square()
