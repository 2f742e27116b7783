"""One ODE solve, its arguments checked, under each policy for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import UnsupportedError
from thalweg.rollouts import adaptive, fixed_steps
from thalweg.rollouts.adaptive import Tolerances
from thalweg.rollouts.backsolve import Backsolve, backsolve_adaptively, backsolve_on_grid
from thalweg.rollouts.checkpointed import Checkpointed
from thalweg.rollouts.discrete import Discrete, reverse_adams_bashforth, reverse_runge_kutta
from thalweg.rollouts.fixed_steps import Grid, Method, advance, begin, make_grid
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.reversible import Reversible, reverse_reversible_heun
from thalweg.rollouts.rollout import rollout
from thalweg.rollouts.sweep import Gradients, Sweep, attach
from thalweg.rollouts.tableaus import State, Tableau
from thalweg.wrappers import refuse_wrappers


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A solve on tuples.

    Args:
        field: the slope of a state at a time, both tuples.
        start: the initial state.
        times: when outputs are due, the first being the start.
        method: a tableau or the name of a method of its own.
        every: fixed steps per interval of `times`.
        tolerances: for a method that chooses its steps.
    """

    field: Callable[[State, Tensor], State]
    start: State
    times: Tensor
    method: Method
    every: int
    tolerances: Tolerances

    @property
    def dtype(self) -> torch.dtype:
        """That of the times the field sees."""
        return self.start[0].dtype

    @property
    def chooses(self) -> bool:
        """Whether the method chooses its steps."""
        return isinstance(self.method, Tableau) and bool(self.method.error)

    def grid(self) -> Grid:
        """The fixed steps; made anew for a backward, which then need not keep them."""
        return make_grid(self.times, self.every, self.dtype)

    def outputs(self, field: Callable[[State, Tensor], State]) -> State:
        """The plain solve, with whatever graph autograd makes of it."""

        def evaluate(point: State, time: Tensor, _key: Hashable) -> State:
            return field(point, time)

        if self.chooses:
            assert isinstance(self.method, Tableau)
            found, _ = adaptive.solve(evaluate, self.method, self.start, self.times.tolist(), self.tolerances)
        else:
            found, _ = fixed_steps.solve(self.method, evaluate, self.start, self.grid())
        return _stacked(found)

    def checkpointed(self, policy: Checkpointed) -> State:
        """The solve as a rollout of its steps, the method's memory being a part of the state."""
        grid, width = self.grid(), len(self.start)

        def evaluate(point: State, time: Tensor, _key: Hashable) -> State:
            return self.field(point, time)

        def step(joined: State, n: int) -> State:
            y, memory = advance(self.method, evaluate, joined[:width], joined[width:], n, grid)
            return (*y, *memory)

        joined = (*self.start, *begin(self.method, self.start))
        between = len(self.times) > 2
        found = rollout(step, joined, grid.steps, gradient=policy, trajectory=between)
        visited = found[:: self.every] if between else (joined, found)
        return _stacked([state[:width] for state in visited])


def swept(problem: Problem, policy: Discrete | Backsolve | Reversible) -> State:
    """Solve without a graph, then join the outputs to the inputs by a reverse sweep.

    Raises:
        UnsupportedError: a `torch.func` transform is active, or the field does what the policy cannot repeat.
    """
    name = type(policy).__name__
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"{name} inside a torch.func transform: its backward sweep cannot be transformed. Use Backprop()"
        )
    start = tuple(part.detach() for part in problem.start)
    replay = isinstance(policy, Discrete) and not problem.chooses
    recorder = Recorder(problem.field, start, name, replay=replay)
    make = _adaptive_sweep if problem.chooses else _grid_sweep
    with torch.no_grad(), refuse_wrappers(name):
        sweep = make(problem, policy, recorder, start)
    inputs = (*problem.start, *recorder.captured)
    return attach(sweep, inputs) if any(part.requires_grad for part in inputs) else sweep.outputs


def _grid_sweep(
    problem: Problem, policy: Discrete | Backsolve | Reversible, recorder: Recorder, start: State
) -> Sweep:
    method, grid, width = problem.method, problem.grid(), len(start)
    keeps = isinstance(policy, Discrete) or (isinstance(policy, Backsolve) and policy.restore == "stored")
    dense = keeps and grid.every == 1  # then the outputs are the states
    states: list[Tensor] = []

    def visit(n: int, y: State) -> None:
        if keeps and not dense and n > 0:
            states.extend(y)

    found, memory = fixed_steps.solve(method, recorder.value, start, grid, visit)
    outputs = _stacked(found)
    if dense:
        kept = outputs
    elif isinstance(policy, Discrete):
        kept = tuple(states)
    else:
        kept = (*states, *_end(outputs, found), *(memory[:width] if isinstance(policy, Reversible) else ()))

    def run(inputs: State, kept: State, cotangents: State) -> Gradients:
        grid, given = problem.grid(), _by_time(cotangents)
        first = tuple(part.detach() for part in inputs[:width])
        states = _by_time(kept) if dense else [first, *_in_groups(kept, width)]
        recorder.gradients = [None] * len(recorder.captured)
        if isinstance(policy, Reversible):
            _, end, hat = states
            result = reverse_reversible_heun(recorder, first, _last(end, first), hat, grid, given)
        elif isinstance(policy, Backsolve):
            end = _last(states.pop(), first)
            result = backsolve_on_grid(recorder, policy, method, states, end, first, grid, given)
        else:
            del states[grid.steps :]
            if isinstance(method, Tableau):
                result = reverse_runge_kutta(recorder, policy, method, states, grid, given)
            else:
                result = reverse_adams_bashforth(recorder, policy, states, grid, given)
        return (*result, *recorder.gradients)

    return Sweep(type(policy).__name__, outputs, kept, run)


def _adaptive_sweep(
    problem: Problem, policy: Discrete | Backsolve | Reversible, recorder: Recorder, start: State
) -> Sweep:
    assert isinstance(problem.method, Tableau)
    method, width, times, tolerances = problem.method, len(start), problem.times.tolist(), problem.tolerances
    found, taken = adaptive.solve(recorder.value, method, start, times, tolerances)
    ends = [(step.start, step.stop) for step in taken]
    outputs = _stacked(found)
    if isinstance(policy, Discrete):
        kept = tuple(part for step in taken[1:] for part in step.y)
    else:
        kept = outputs if getattr(policy, "restore", "") == "stored" else _end(outputs, found)

    def run(inputs: State, kept: State, cotangents: State) -> Gradients:
        given = _by_time(cotangents)
        first = tuple(part.detach() for part in inputs[:width])
        recorder.gradients = [None] * len(recorder.captured)
        if isinstance(policy, Discrete):
            states = [first, *_in_groups(kept, width)]
            result = adaptive.reverse_adaptive(recorder, policy, method, states, ends, times, given)
        else:
            assert isinstance(policy, Backsolve)
            states = _by_time(kept) if policy.restore == "stored" else [_last(kept, first)]
            result = backsolve_adaptively(recorder, policy, method, states, first, times, tolerances, given)
        return (*result, *recorder.gradients)

    return Sweep(type(policy).__name__, outputs, kept, run)


def _stacked(states: list[State]) -> State:
    return tuple(torch.stack(parts) for parts in zip(*states))


def _end(outputs: State, found: list[State]) -> State:
    # two output times are handed out in any case; of many, the caller may look at the last one only
    return outputs if len(found) == 2 else found[-1]


def _last(kept: State, like: State) -> State:
    return tuple(part[-1] if part.ndim > one.ndim else part for part, one in zip(kept, like))


def _by_time(stacked: State) -> list[State]:
    return list(zip(*(part.detach().unbind() for part in stacked)))


def _in_groups(kept: State, width: int) -> list[State]:
    return [kept[i : i + width] for i in range(0, len(kept), width)]
