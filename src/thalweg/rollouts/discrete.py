"""The exact reverse sweep of a solver: only the state of each step is kept, its evaluations are repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from thalweg.errors import require_choice
from thalweg.rollouts.fixed_steps import Grid, adams_bashforth_weights
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.tableaus import HEUN, Number, State, Tableau, add, combine, stage_time


@dataclass(frozen=True, slots=True)
class Discrete:
    """The exact gradient of the solve itself, in the memory of one state per step.

    Choose it when a solve does not fit: the gradient is that of `Backprop` to round-off, for every
    Runge-Kutta method, for `adams_bashforth_2` and for the steps that `dopri5` took. Kept are the states;
    `Checkpointed` keeps fewer for more evaluations. It replays the random numbers of a field with dropout.

    Args:
        recompute: "step" evaluates each stage once more and holds the graphs of one step's stages; "stage"
            holds the graph of a single evaluation, for about one evaluation more per stage.

    Raises:
        ArgumentError: an unknown `recompute`.

    Paper:
        Matsubara, Miyatake, Yaguchi: Symplectic Adjoint Method for Exact Gradient of Neural ODE with Minimal
        Memory. NeurIPS 2021, arXiv 2102.09750.

    Example:
        >>> import torch
        >>> from thalweg.rollouts import integrate
        >>> rate = torch.tensor(-1.0, requires_grad=True)
        >>> y = integrate(lambda x, t: rate * x, torch.ones(1), torch.linspace(0, 1, 11), gradient=Discrete())
        >>> y[-1].backward()
        >>> round(float(rate.grad), 4)  # d (1 + rate / 10) ** 10 / d rate
        0.3874
    """

    recompute: Literal["step", "stage"] = "step"

    def __post_init__(self) -> None:
        require_choice("recompute", self.recompute, ("step", "stage"))


def reverse_step(
    recorder: Recorder,
    policy: Discrete,
    tableau: Tableau,
    y: State,
    span: tuple[Tensor, Tensor, Number],
    cotangent: State,
    n: int,
    extra: dict[int, State] | None = None,
) -> State:
    """The reverse of one Runge-Kutta step: from the cotangent of its result to that of its start.

    Args:
        span: start, end and signed length of the step.
        cotangent: of the state at the end.
        n: the number of the step, by which its random numbers are found.
        extra: cotangents of single slopes that come from elsewhere, by stage.
    """
    extra = extra or {}
    t, t_next, h = span
    stages = [j for j in range(len(tableau.a)) if _is_needed(tableau, j, extra)]
    times = [stage_time(node, t, t_next, h) for node in tableau.c]
    points: list[State] = []
    slopes: list[State] = []
    graphs: list[tuple[State, State]] = []
    for j in stages:
        points.append(combine(y, tableau.a[j], slopes, h))
        if policy.recompute == "step":
            graphs.append(recorder.graph(points[-1], times[j], (n, j)))
            slopes.append(tuple(slope.detach() for slope in graphs[-1][1]))
        elif j != stages[-1]:
            slopes.append(tuple(s.detach() for s in recorder.graph(points[-1], times[j], (n, j))[1]))
    pulled: dict[int, State] = {}
    for j in reversed(stages):
        weights = [tableau.b[j], *(tableau.a[later][j] for later in pulled)]
        slope_cotangent = _weighted(weights, [cotangent, *pulled.values()], h, extra.get(j))
        graph = graphs.pop() if graphs else None
        if slope_cotangent is None:
            continue
        graph = graph or recorder.graph(points[j], times[j], (n, j))
        pulled[j] = recorder.pull(*graph, slope_cotangent)
        del graph
    for part in pulled.values():
        cotangent = tuple(a + b for a, b in zip(cotangent, part))
    return cotangent


def _is_needed(tableau: Tableau, stage: int, extra: dict[int, State]) -> bool:
    # a later stage may need this one; only the last can be idle, where it serves the next step
    return stage < len(tableau.a) - 1 or tableau.b[stage] != 0 or stage in extra


def _weighted(
    weights: Sequence[float], cotangents: Sequence[State], h: Number, extra: State | None
) -> State | None:
    total = extra
    for weight, cotangent in zip(weights, cotangents):
        if weight:
            if total is None:
                total = tuple(part * (weight * h) for part in cotangent)
            else:
                total = tuple(add(a, b, weight * h) for a, b in zip(total, cotangent))
    return total


def reverse_runge_kutta(
    recorder: Recorder,
    policy: Discrete,
    tableau: Tableau,
    states: list[State],
    grid: Grid,
    given: list[State],
) -> State:
    """The whole sweep on a grid.

    Args:
        states: the state before each step; used up.
        given: the cotangents of the outputs, the initial state's first.
    """
    cotangent = given[-1]
    for n in reversed(range(grid.steps)):
        span = (grid.nodes[n], grid.nodes[n + 1], grid.lengths[n])
        cotangent = reverse_step(recorder, policy, tableau, states.pop(), span, cotangent, n)
        cotangent = _joined(cotangent, given, n, grid)
    return cotangent


def reverse_adams_bashforth(
    recorder: Recorder, policy: Discrete, states: list[State], grid: Grid, given: list[State]
) -> State:
    """The sweep of the two-step method: a slope serves two steps and gathers the cotangents of both."""
    cotangent = given[-1]
    later: State | None = None  # what the step after this one sends to this one's slope
    for n in reversed(range(1, grid.steps)):
        now, before = adams_bashforth_weights(grid.lengths[n], grid.lengths[n - 1])
        slope_cotangent = tuple(part * now for part in cotangent)
        if later is not None:
            slope_cotangent = tuple(a + b for a, b in zip(slope_cotangent, later))
        later = tuple(part * before for part in cotangent)
        pulled = recorder.pull(*recorder.graph(states.pop(), grid.nodes[n], (n, 0)), slope_cotangent)
        cotangent = _joined(tuple(a + b for a, b in zip(cotangent, pulled)), given, n, grid)
    span = (grid.nodes[0], grid.nodes[1], grid.lengths[0])
    extra = {} if later is None else {0: later}
    cotangent = reverse_step(recorder, policy, HEUN, states.pop(), span, cotangent, 0, extra)
    return _joined(cotangent, given, 0, grid)


def _joined(cotangent: State, given: list[State], n: int, grid: Grid) -> State:
    if n % grid.every:
        return cotangent
    return tuple(a + b for a, b in zip(cotangent, given[n // grid.every]))
