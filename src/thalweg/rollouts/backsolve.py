"""The continuous adjoint: solve an ODE for the gradient backwards in time, with an error of its own."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import require_choice, require_finite
from thalweg.rollouts.adaptive import Tolerances, steps
from thalweg.rollouts.fixed_steps import Grid, Method, adams_bashforth_weights
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.reversible import warn_of_drift
from thalweg.rollouts.tableaus import HEUN, Number, State, Tableau, add, runge_kutta_step


@dataclass(frozen=True, slots=True)
class Backsolve:
    """The gradient from an adjoint ODE, solved backwards by the same method: approximate, for any tolerance.

    Choose it to compare with published work, or where an adaptive solve is so tight that its error does not
    matter; else `Discrete` costs the same and is exact. Its error falls at the order of the method, which for
    Euler's at twenty steps can be as large as the gradient itself: that case warns.

    Args:
        restore: "stored" keeps the state of each step (of each output time, for a method that chooses its own
            steps) and starts every step back from it; "solve" keeps the final state and solves the field
            backwards too, in memory that does not grow, and warns when it misses the start.

    Raises:
        ArgumentError: an unknown `restore`.

    Paper:
        Chen, Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations. NeurIPS 2018,
        arXiv 1806.07366; Pan and others: AdjointDPM. ICLR 2024, arXiv 2307.10711.

    Example:
        >>> from thalweg.rollouts import integrate
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = integrate(lambda x, t: -x, x, torch.linspace(0, 1, 11), method="rk4", gradient=Backsolve())
        >>> y[-1].backward()
        >>> round(float(x.grad), 4)  # exp(-1)
        0.3679
    """

    restore: Literal["stored", "solve"] = "stored"

    def __post_init__(self) -> None:
        require_choice("restore", self.restore, ("stored", "solve"))


class _Adjoint:
    """The field joined with its adjoint, on (state, cotangent).

    The slopes it returns go on beyond that: behind them come those of the captured tensors' gradients, which
    nothing feeds on and which a step therefore only has to sum.
    """

    def __init__(self, recorder: Recorder, width: int) -> None:
        self.recorder = recorder
        self.width = width
        self.totals = [torch.zeros_like(tensor) for tensor in recorder.captured]

    def __call__(self, joined: State, time: Tensor, _key: Hashable = None) -> State:
        leaves, outputs = self.recorder.graph(joined[: self.width], time)
        unmet = self.recorder.unmet(leaves, outputs)
        slope = tuple(part.detach() for part in outputs)
        self.recorder.gradients = [None] * len(self.totals)
        pulled = self.recorder.pull(leaves, outputs, joined[self.width :])
        del leaves, outputs
        self.recorder.refuse(unmet)
        shares = [
            torch.zeros_like(total) if share is None else share.neg_()
            for total, share in zip(self.totals, self.recorder.gradients)
        ]
        return (*slope, *(-part for part in pulled), *shares)

    def gather(self, weight: Number, slope: State) -> None:
        """Add what one evaluation says about the captured tensors."""
        for total, share in zip(self.totals, slope[2 * self.width :]):
            total.copy_(add(total, share, weight))


def backsolve_on_grid(
    recorder: Recorder,
    policy: Backsolve,
    method: Method,
    states: list[State],
    end: State,
    start: State,
    grid: Grid,
    given: list[State],
) -> State:
    """The adjoint ODE with the forward's steps in reverse order.

    Args:
        states: the state before each step, for restore="stored"; used up.
        end: the final state.
        start: the initial one, by which the drift is judged.
        given: the cotangents of the outputs, the initial state's first.

    Returns:
        The gradient of the initial state; that of the captured tensors is left in the recorder.
    """
    width = len(end)
    adjoint = _Adjoint(recorder, width)
    tableau = method if isinstance(method, Tableau) else HEUN
    joined: State = (*end, *given[-1])
    last: State | None = None  # the slope before, for a method of two steps; none after an output's kick
    for n in reversed(range(grid.steps)):
        t, t_next, h = grid.nodes[n + 1], grid.nodes[n], -grid.lengths[n]
        if isinstance(method, Tableau) or last is None:
            joined, slopes = runge_kutta_step(adjoint, tableau, joined, t, t_next, h, None)
            for weight, slope in zip(tableau.b, slopes):
                if weight:
                    adjoint.gather(weight * h, slope)
            last = slopes[0]
        else:
            now, before = adams_bashforth_weights(h, -grid.lengths[n + 1])
            slope = adjoint(joined, t)
            joined = tuple(add(add(part, k, now), old, before) for part, k, old in zip(joined, slope, last))
            adjoint.gather(now, slope)
            adjoint.gather(before, last)
            last = slope
        if policy.restore == "stored":
            joined = (*states.pop(), *joined[width:])
        if n % grid.every == 0:
            joined = _kicked(joined, given[n // grid.every])
            last = None
    return _finished(adjoint, joined, start, policy)


def backsolve_adaptively(
    recorder: Recorder,
    policy: Backsolve,
    tableau: Tableau,
    states: list[State],
    start: State,
    times: list[float],
    tolerances: Tolerances,
    given: list[State],
) -> State:
    """The adjoint ODE with steps of its own between the output times; arguments as in `backsolve_on_grid`.

    Args:
        states: the outputs, or the last of them for restore="solve"; used up.
    """
    end = states.pop()
    width = len(end)
    adjoint = _Adjoint(recorder, width)
    joined: State = (*end, *given[-1])
    length: float | None = None
    for index in reversed(range(1, len(times))):
        longest = 0.0
        for step in steps(adjoint, tableau, joined, times[index], times[index - 1], tolerances, length):
            joined = step.following
            for weight, slope in zip(tableau.b, step.slopes):
                if weight:
                    adjoint.gather(weight * (step.stop - step.start), slope)
            longest = max(longest, abs(step.stop - step.start))
        length = longest
        if policy.restore == "stored":
            joined = (*states.pop(), *joined[width:])
        joined = _kicked(joined, given[index - 1])
    return _finished(adjoint, joined, start, policy)


def _kicked(joined: State, given: State) -> State:
    width = len(given)
    return (*joined[:width], *(a + b for a, b in zip(joined[width:], given)))


def _finished(adjoint: _Adjoint, joined: State, start: State, policy: Backsolve) -> State:
    if policy.restore == "solve":
        found = joined[: adjoint.width]
        for part in found:
            require_finite("Backsolve: the state solved backwards", part)
        warn_of_drift("Backsolve(restore='solve')", found, start)
    adjoint.recorder.gradients = list(adjoint.totals)
    return joined[adjoint.width :]
