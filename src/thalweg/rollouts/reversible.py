"""Running a reversible solver backwards: nothing is kept but the end, and the gradient is exact."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from thalweg.rollouts.fixed_steps import Grid
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.tableaus import State, add, combine

_DRIFT = 1e-3  # relative; a state that is off by more than this no longer gives an exact gradient


@dataclass(frozen=True, slots=True)
class Reversible:
    """The exact gradient of a reversible solver in memory that does not grow with the steps.

    Choose it with `method="reversible_heun"` for long solves in float32 or float64 where even one state per
    step is too much. Each step is undone instead of remembered, so the gradient is that of `Backprop` up
    to the round-off that undoing gathers; the start is known, and a drift away from it by more than a
    thousandth is reported as a warning. The method is only weakly stable: take at least 20 steps.

    Paper:
        Kidger, Foster, Li, Lyons: Efficient and Accurate Gradients for Neural SDEs. NeurIPS 2021,
        arXiv 2105.13493.

    Example:
        >>> from thalweg.rollouts import integrate
        >>> x = torch.ones(1, requires_grad=True)
        >>> times = torch.linspace(0, 1, 65)
        >>> y = integrate(lambda x, t: -x, x, times, method="reversible_heun", gradient=Reversible())
        >>> y[-1].backward()
        >>> round(float(x.grad), 3)  # exp(-1)
        0.368
    """


def reverse_reversible_heun(
    recorder: Recorder, start: State, end: State, hat: State, grid: Grid, given: list[State]
) -> State:
    """Undo the steps one by one; each evaluation serves the undoing and the gradient.

    Args:
        start: the initial state, by which the drift is judged and the last evaluation made exact.
        end: the final state.
        hat: its shadow.
        given: the cotangents of the outputs, the initial state's first.
    """
    y = end
    of_state = given[-1]
    of_hat = of_slope = tuple(torch.zeros_like(part) for part in end)
    leaves, outputs = recorder.graph(hat, grid.nodes[-1])
    for n in reversed(range(grid.steps)):
        h = grid.lengths[n]
        slope = tuple(part.detach() for part in outputs)
        of_slope = tuple(add(a, b, 0.5 * h) for a, b in zip(of_slope, of_state))
        pulled = recorder.pull(leaves, outputs, of_slope)
        of_hat = tuple(a + b for a, b in zip(of_hat, pulled))
        # the step had made: hat' = 2 y - hat + h slope, y' = y + h/2 (slope + slope')
        of_slope = tuple(add(0.5 * h * a, b, h) for a, b in zip(of_state, of_hat))
        of_state = tuple(a + 2 * b for a, b in zip(of_state, of_hat))
        of_hat = tuple(-part for part in of_hat)
        hat = tuple(add(2 * part - shadow, k, -h) for part, shadow, k in zip(y, hat, slope))
        if n == 0:
            warn_of_drift("Reversible", hat, start)
            hat = start
        leaves, outputs = recorder.graph(hat, grid.nodes[n])
        before = tuple(part.detach() for part in outputs)
        y = combine(y, (-0.5, -0.5), (before, slope), h)
        if n % grid.every == 0:
            of_state = tuple(a + b for a, b in zip(of_state, given[n // grid.every]))
    pulled = recorder.pull(leaves, outputs, of_slope)
    return tuple(a + b + c for a, b, c in zip(of_state, of_hat, pulled))


def warn_of_drift(policy: str, found: State, start: State) -> None:
    """Warn when a state that was computed backwards is not the one the forward began with."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(start[0], FakeTensor) or start[0].is_meta:
        return
    off = sum(float((a - b).double().square().sum()) for a, b in zip(found, start))
    size = sum(float(part.double().square().sum()) for part in start)
    drift = (off / size if size else off) ** 0.5
    if not drift <= _DRIFT:
        warnings.warn(
            f"{policy}: the initial state computed backwards is off by {drift:.1e} of its norm, so the "
            "gradient is not exact. Take more steps, or use Discrete() or Checkpointed()",
            RuntimeWarning,
            stacklevel=2,
        )
