"""Solving an ODE with an embedded pair that chooses its own steps, and the exact reverse of its steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, NonFiniteError
from thalweg.rollouts.discrete import Discrete, reverse_step
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.tableaus import State, Tableau, add, combine, runge_kutta_step

_SAFETY, _GROWTH, _SHRINKAGE = 0.9, 10.0, 0.2  # Hairer, Norsett, Wanner: Solving ODEs I, II.4
_MOST_STEPS = 100_000

Evaluate = Callable[[State, Tensor, Hashable], State]


@dataclass(frozen=True, slots=True)
class Tolerances:
    """The error that one step may make: `absolute + relative |y|`, as a root mean square over each part."""

    relative: float
    absolute: float

    def ratio(self, error: State, y: State, following: State) -> float:
        """The error of a step in units of what it may be; above 1 the step is taken again, shorter."""
        ratios = [
            (e / (self.absolute + self.relative * torch.maximum(a.abs(), b.abs()))).square().mean().sqrt()
            for e, a, b in zip(error, y, following)
        ]
        return float(torch.stack([r.double() for r in ratios]).max())


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """One step that was taken: its two ends, the states there, and the slopes of the stages."""

    start: float
    stop: float
    y: State
    following: State
    slopes: list[State]


def steps(
    evaluate: Evaluate,
    tableau: Tableau,
    y: State,
    start: float,
    stop: float,
    tolerances: Tolerances,
    length: float | None = None,
) -> Iterator[Accepted]:
    """The accepted steps from `start` to `stop`, which the last one meets exactly.

    Args:
        evaluate: the field; its last argument numbers the attempt and the stage.
        length: the first step to try; None works one out.

    Raises:
        NonFiniteError: the error of a step is nan or infinite at every length.
        ArgumentError: the tolerance asks for steps too short to be told from none.
    """
    sign = 1.0 if stop > start else -1.0
    dtype, device = y[0].dtype, y[0].device

    def moment(time: float) -> Tensor:
        return torch.tensor(time, dtype=dtype, device=device)

    now, attempt = start, 0
    first = evaluate(y, moment(start), (attempt, 0))
    if length is None:
        length = _first_length(evaluate, tableau, y, first, start, sign, tolerances, moment)
    while now != stop:
        attempt += 1
        if length < 10 * torch.finfo(dtype).eps * max(abs(now), abs(stop - start)) or attempt > _MOST_STEPS:
            reason = f"a tolerance that {dtype} can meet: at t = {now} the steps had shrunk to {length:.1e}"
            raise ArgumentError("rtol", tolerances.relative, reason, "Loosen rtol and atol, or use float64.")
        ends = length >= abs(stop - now) * (1 - 1e-12)
        following = stop if ends else now + sign * length
        h = following - now

        def stage_value(point: State, time: Tensor, stage: int, attempt: int = attempt) -> State:
            return evaluate(point, time, (attempt, stage))

        result, slopes = runge_kutta_step(stage_value, tableau, y, moment(now), moment(following), h, first)
        with torch.no_grad():
            zeros = tuple(torch.zeros_like(part) for part in y)
            ratio = tolerances.ratio(combine(zeros, tableau.error, slopes, h), y, result)
        if ratio <= 1:
            yield Accepted(now, following, y, result, slopes)
            now, y, first = following, result, slopes[-1]
        elif ratio != ratio:
            _refuse_nonfinite(y, first, now)
        # nan compares false throughout and shortens the step
        scale = (
            _SAFETY * ratio ** (-1 / tableau.order) if 0 < ratio < float("inf") else _GROWTH * (ratio == 0)
        )
        length = abs(h) * min(_GROWTH, max(1.0 if ratio < 1 else _SHRINKAGE, scale))


def _refuse_nonfinite(y: State, slope: State, now: float) -> None:
    for what, parts in (("state", y), ("field", slope)):
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NonFiniteError(f"integrate: the {what} at t = {now} holds nan or infinity")


@torch.no_grad()
def _first_length(
    evaluate: Evaluate,
    tableau: Tableau,
    y: State,
    slope: State,
    start: float,
    sign: float,
    tolerances: Tolerances,
    moment: Callable[[float], Tensor],
) -> float:
    zeros = tuple(torch.zeros_like(part) for part in y)
    size, speed = tolerances.ratio(y, y, zeros), tolerances.ratio(slope, y, zeros)
    trial = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    if not trial < float("inf"):
        _refuse_nonfinite(y, slope, start)
    ahead = tuple(add(part, k, sign * trial) for part, k in zip(y, slope))
    after = evaluate(ahead, moment(start + sign * trial), (0, 1))
    change = tuple(b - a for a, b in zip(slope, after))
    bend = max(speed, tolerances.ratio(change, y, zeros) / trial)
    guess = max(1e-6, trial * 1e-3) if bend <= 1e-15 else (0.01 / bend) ** (1 / tableau.order)
    return min(100 * trial, guess)


def outputs_within(step: Accepted, times: Sequence[float], first: int) -> list[int]:
    """The numbers of the output times, from `first` on, that lie in a step."""
    found = []
    for index in range(first, len(times)):
        if abs(times[index] - step.start) > abs(step.stop - step.start):
            break
        found.append(index)
    return found


def solve(
    evaluate: Evaluate, tableau: Tableau, y: State, times: Sequence[float], tolerances: Tolerances
) -> tuple[list[State], list[Accepted]]:
    """The states at the output times, by the method's own interpolation between the steps, and the steps."""
    found, taken = [y], []
    for step in steps(evaluate, tableau, y, times[0], times[-1], tolerances):
        within = outputs_within(step, times, len(found))
        found.extend(_between(tableau, step, times[index]) for index in within)
        taken.append(step)
    return found, taken


def _between(tableau: Tableau, step: Accepted, time: float) -> State:
    if time == step.stop:
        return step.following
    h = step.stop - step.start
    return combine(step.y, tableau.between((time - step.start) / h), step.slopes, h)


def reverse_adaptive(
    recorder: Recorder,
    policy: Discrete,
    tableau: Tableau,
    states: list[State],
    ends: list[tuple[float, float]],
    times: Sequence[float],
    given: list[State],
) -> State:
    """The exact reverse of the steps that were taken, outputs between them included.

    Args:
        states: the state before each step; used up.
        ends: start and stop of each step.
        given: the cotangents of the outputs, the initial state's first.
    """
    cotangent = tuple(torch.zeros_like(part) for part in given[0])
    last = len(times) - 1
    for n in reversed(range(len(ends))):
        start, stop = ends[n]
        h = stop - start
        extra: dict[int, State] = {}
        direct: list[State] = []
        while last > 0 and abs(times[last] - start) > 0 and (times[last] - start) / h > 0:
            if times[last] == stop:
                cotangent = tuple(a + b for a, b in zip(cotangent, given[last]))
            else:
                direct.append(given[last])
                for stage, weight in enumerate(tableau.between((times[last] - start) / h)):
                    share = tuple(part * (weight * h) for part in given[last])
                    known = extra.get(stage)
                    extra[stage] = share if known is None else tuple(a + b for a, b in zip(known, share))
            last -= 1
        y = states.pop()
        t = torch.tensor([start, stop], dtype=y[0].dtype, device=y[0].device)
        cotangent = reverse_step(recorder, policy, tableau, y, (t[0], t[1], h), cotangent, n, extra)
        for part in direct:
            cotangent = tuple(a + b for a, b in zip(cotangent, part))
    return tuple(a + b for a, b in zip(cotangent, given[0]))
