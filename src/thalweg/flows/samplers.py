"""Sampling from a generative field, with the way the result is differentiated as one keyword."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.field import Field, Network
from thalweg.flows.linear_steps import LinearStep, Solver, linear_steps
from thalweg.flows.path import Path
from thalweg.flows.prediction import Kind
from thalweg.flows.stochastic_solvers import DDIM
from thalweg.noise import Key, normal
from thalweg.rollouts.rollout import rollout
from thalweg.rollouts.route import Policy
from thalweg.step import draw_key

State = Tensor | tuple[Tensor, ...]


def sample(
    field: Field,
    start: Tensor,
    times: Tensor | Sequence[float],
    *,
    solver: Solver | None = None,
    gradient: Policy | None = None,
    conditions: Mapping[str, Any] | None = None,
    then: Callable[[Any], Any] | None = None,
    key: Key | None = None,
    trajectory: bool = False,
) -> Any:
    """Run a sampler over a grid of times, and choose how the result is differentiated.

    Every solver is a row of weighted sums computed beforehand in float64, so that beside the network a step
    costs a few additions; every policy of `thalweg.rollouts.rollout` works through every solver, because one
    step of the rollout is one step of the solver. Transforms as in the policy; `torch.compile` breaks its
    graph where the sums are computed, so compile the network rather than the sampler.

    | solver | order | calls a step | choose it |
    | --- | --- | --- | --- |
    | `DDIM(eta)` | 1 | 1 | as the default; eta=1 is ancestral sampling |
    | `DPMSolverPP2M(eta)` | 2 | 1 | for 10 to 50 steps |
    | `AdamsBashforth(order)` | 1 to 4 | 1 | likewise, on smooth fields |
    | `DPMSolver2()` | 2 | 2 | for noise predictions |
    | `Euler()` | 1 | 1 | for straight flows |
    | `Heun()`, `RungeKutta4()` | 2, 4 | 2, 4 | for accurate flows |
    | `EDM(churn)` | 2 | 2 | for EDM's models |
    | `EulerMaruyama(eta)` | 1 in law | 1 | for the reverse diffusion |

    Args:
        field: the field; guided fields are fields.
        start: the state at `times[0]`, (batch, ...); at t = 1 noise times `path.coefficients(1).sigma`.
        times: at least two, strictly falling in [0, 1], as from `time_grid`; rising to go from data to noise
            with a deterministic solver.
        solver: one of the above, or your own with `memory` and `advance`; None for `DDIM()`.
        gradient: a policy of `rollout`; None for `Backprop()`. For `Skipped` and masks the network is the
            field's.
        conditions: handed to the network at each call.
        then: a read-out of the result (a decoder, a reward), differentiated under the same policy.
        key: the noise of stochastic solvers and random policies; None takes one from torch's generator.
        trajectory: return the states at all times, as a tuple.

    Returns:
        The state at the last time, or the trajectory, or what `then` makes of it.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; a grid at which the solver needs what the field's
            prediction does not give; noise asked for on the way to noise.
        NonFiniteError: the result holds nan or infinity.

    Example:
        >>> from thalweg.flows import Straight, time_grid
        >>> from thalweg.rollouts import Checkpointed
        >>> field = Field(lambda x, t: -x, Straight(), predicts="velocity")
        >>> noise = torch.randn(4, 2, requires_grad=True)
        >>> x = sample(field, noise, time_grid(field.path, 10, last=0.0), gradient=Checkpointed(slots=3))
        >>> x.sum().backward()
        >>> noise.grad.shape
        torch.Size([4, 2])
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    if require_floating("start", start).ndim == 0:
        raise ArgumentError("start", start, "a batch of states, shape (batch, ...)")
    solver = DDIM() if solver is None else solver
    if isinstance(solver, type) or not isinstance(solver, Solver):
        mend = f"Make one: {solver.__name__}()." if isinstance(solver, type) else ""
        raise ArgumentTypeError("solver", solver, "a solver such as DDIM()", mend)
    steps = _table(solver, field.path, field.predicts, checked_times(times))
    given = dict(conditions or {})
    noisy = any(step.noises for step in steps)
    if noisy and field.coupled:
        mend = "Fresh noise is not distributed as a coupled field's own: use a deterministic solver."
        raise ArgumentError("solver", solver, "a solver that adds no noise", mend)
    if key is None and noisy:
        key = draw_key()

    def step(network: Network, state: State, k: int, key: Key | None = None) -> State:
        x, *memory = (state,) if isinstance(state, Tensor) else state
        seen: Field = field if network is field.network else field.with_network(network)

        def predict(at: Tensor, time: float) -> Tensor:
            return seen(at, time, **given)

        def draw(call: int) -> Tensor:
            assert key is not None
            return normal(x, key.at(call=call))

        new, kept = steps[k].run(x, memory, predict, draw)
        if isinstance(state, Tensor):
            return new
        return (new, *memory) if kept is None else (new, kept, *memory[:-1])

    state: State = start
    if solver.memory:
        state = (start, *(torch.zeros_like(start) for _ in range(solver.memory)))

    def read(result: Any) -> Any:
        return tuple(map(_latest, result)) if trajectory else _latest(result)

    def read_out(result: Any) -> Any:
        assert then is not None
        return then(read(result))

    result = rollout(
        step,
        state,
        len(steps),
        gradient=gradient,
        network=field.network,
        then=read_out if callable(then) else then,
        key=key,
        trajectory=trajectory,
    )
    return result if then is not None else read(result)


def checked_times(times: Tensor | Sequence[float]) -> tuple[float, ...]:
    """Times as numbers: at least two, in [0, 1], strictly falling or strictly rising."""
    expected = "at least 2 times in [0, 1], strictly falling (or rising, towards noise)"
    try:
        # plain numbers stay plain, which compilation can follow
        values = tuple(times.double().tolist() if isinstance(times, Tensor) else map(float, times))
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError("times", times, expected) from None
    if len(values) < 2 or not all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        raise ArgumentError("times", times, expected)
    falling = [b < a for a, b in pairwise(values)]
    if any(falling) != all(falling) or len(set(values)) < len(values):
        raise ArgumentError("times", values, expected)
    return values


def _table(solver: Solver, path: Path, source: Kind, times: tuple[float, ...]) -> tuple[LinearStep, ...]:
    hashable = isinstance(solver, Hashable) and isinstance(path, Hashable)
    if hashable and not torch.compiler.is_compiling():
        found: tuple[LinearStep, ...] = _remembered(solver, path, source, times)
        return found
    return linear_steps(solver, path, source, times)


_remembered: Any = lru_cache(maxsize=64)(linear_steps)


def _latest(state: State) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]
