"""Solving an ODE on a grid that is known beforehand: Runge-Kutta, Adams-Bashforth, reversible Heun."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual

from thalweg.rollouts.tableaus import HEUN, Number, State, Tableau, add, combine, runge_kutta_step

Multistep = Literal["adams_bashforth_2", "reversible_heun"]
Method = Tableau | Multistep
Evaluate = Callable[[State, Tensor, Hashable], State]  # state, time, which evaluation


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The nodes of a solve and the signed lengths of its steps; an output is due every `every` steps."""

    nodes: list[Tensor]
    lengths: list[Number]
    every: int

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.lengths)


def make_grid(times: Tensor, every: int, dtype: torch.dtype) -> Grid:
    """Cut each interval between two output times into `every` equal steps; differentiable by `times`."""
    grid = times
    if every > 1:
        fractions = torch.arange(every, dtype=times.dtype, device=times.device) / every
        inner = times[:-1, None] + (times[1:] - times[:-1])[:, None] * fractions
        grid = torch.cat([inner.reshape(-1), times[-1:]])
    lengths: list[Number]
    values = plain_values(times)
    if values is None:
        lengths = list((grid[1:] - grid[:-1]).unbind())
    else:
        # numbers: they scale a tensor in one operation, and are known where tensors are fake
        lengths = [(b - a) / every for a, b in pairwise(values) for _ in range(every)]
    return Grid(list(grid.to(dtype).unbind()), lengths, every)


def plain_values(times: Tensor) -> list[float] | None:
    """The times as numbers, or None where they are differentiated, transformed or without values."""
    if times.requires_grad or isinstance(times, FakeTensor) or times.is_meta:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(times) or unpack_dual(times).tangent is not None:
        return None
    return list(times.tolist())


def begin(method: Method, y: State) -> State:
    """What a method carries from step to step beside the state, before the first one."""
    if isinstance(method, Tableau):
        return ()
    zeros = tuple(torch.zeros_like(part) for part in y)
    return zeros if method == "adams_bashforth_2" else zeros * 2


def advance(
    method: Method, evaluate: Evaluate, y: State, memory: State, n: int, grid: Grid
) -> tuple[State, State]:
    """Step n of any method: the next state, and what the method remembers."""
    t, t_next, h = grid.nodes[n], grid.nodes[n + 1], grid.lengths[n]
    if isinstance(method, Tableau):
        y, _ = runge_kutta_step(
            lambda point, time, stage: evaluate(point, time, (n, stage)), method, y, t, t_next, h, None
        )
        return y, ()
    if method == "reversible_heun":
        if n == 0:
            memory = (*y, *evaluate(y, t, (-1, 0)))
        y, hat, slope = reversible_heun_step(
            lambda point: evaluate(point, t_next, (n, 0)), y, memory[: len(y)], memory[len(y) :], h
        )
        return y, (*hat, *slope)
    if n == 0:
        y, slopes = runge_kutta_step(
            lambda point, time, stage: evaluate(point, time, (n, stage)), HEUN, y, t, t_next, h, None
        )
        return y, slopes[0]
    now, before = adams_bashforth_weights(h, grid.lengths[n - 1])
    slope = evaluate(y, t, (n, 0))
    y = tuple(add(add(part, k, now), old, before) for part, k, old in zip(y, slope, memory))
    return y, slope


def adams_bashforth_weights(h: Number, previous: Number) -> tuple[Number, Number]:
    """The weights of this slope and of the last one, for a step h after one of length `previous`."""
    half = h / previous / 2
    return h * (1 + half), -(h * half)


def reversible_heun_step(
    evaluate: Callable[[State], State], y: State, hat: State, slope: State, h: Number
) -> tuple[State, State, State]:
    """One step of reversible Heun on (y, its shadow, the slope at the shadow).

    Paper:
        Kidger, Foster, Li, Lyons: Efficient and Accurate Gradients for Neural SDEs. NeurIPS 2021,
        arXiv 2105.13493.
    """
    hat = tuple(add(2 * part - shadow, k, h) for part, shadow, k in zip(y, hat, slope))
    following = evaluate(hat)
    y = combine(y, (0.5, 0.5), (slope, following), h)
    return y, hat, following


def solve(
    method: Method,
    evaluate: Evaluate,
    y: State,
    grid: Grid,
    visit: Callable[[int, State], None] | None = None,
) -> tuple[list[State], State]:
    """Run all steps.

    Args:
        visit: called before step n as `visit(n, state)`, to keep the states.

    Returns:
        The states at the output times, the initial one included, and the memory at the end.
    """
    memory = begin(method, y)
    found = [y]
    for n in range(grid.steps):
        if visit is not None:
            visit(n, y)
        y, memory = advance(method, evaluate, y, memory, n, grid)
        if (n + 1) % grid.every == 0:
            found.append(y)
    return found, memory
