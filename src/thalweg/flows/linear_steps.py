"""A sampler's step as linear combinations: formulas are written once, on symbols, and run on tensors.

A solver of a generative field adds multiples of the state, of what the network said, of earlier predictions
and of noise. It is therefore run once on symbols, in float64, before anything is sampled; what is left for
each step on the device is one weighted sum of tensors beside the network's call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thalweg.errors import ArgumentError
from thalweg.flows.path import Path
from thalweg.flows.prediction import Kind, conversion

_COARSE = (torch.float16, torch.bfloat16)
Weights = tuple[tuple[str, float], ...]


class Sum:
    """A linear combination of named tensors that are not there yet."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[str, float]) -> None:
        self.terms = {name: weight for name, weight in terms.items() if weight != 0}

    def __add__(self, other: Sum) -> Sum:
        names = [*self.terms, *(name for name in other.terms if name not in self.terms)]
        return Sum({name: self.terms.get(name, 0.0) + other.terms.get(name, 0.0) for name in names})

    def __sub__(self, other: Sum) -> Sum:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Sum:
        return Sum({name: weight * factor for name, weight in self.terms.items()})

    __rmul__ = __mul__

    def weights(self) -> Weights:
        """The terms as a value."""
        return tuple(self.terms.items())


@dataclass(frozen=True, slots=True)
class Point:
    """A path at one time, in plain numbers; arguments as in `Coefficients`."""

    time: float
    alpha: float
    sigma: float
    alpha_rate: float
    sigma_rate: float
    half_log_snr: float

    @staticmethod
    def of(path: Path, time: float) -> Point:
        """Evaluate a path once."""
        alpha, sigma, alpha_rate, sigma_rate = map(float, path.coefficients(time))
        return Point(time, alpha, sigma, alpha_rate, sigma_rate, float(path.half_log_snr(time)))

    @property
    def ratio(self) -> float:
        """sigma / alpha; infinite where there is no data."""
        return self.sigma / self.alpha if self.alpha else math.inf


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says at one state of a step, as sums."""

    x: Sum
    output: Sum
    point: Point
    source: Kind

    def of(self, kind: Kind) -> Sum:
        """The prediction of any kind, refused where this point does not give it."""
        point = self.point
        state: float
        output: float
        path = (point.alpha, point.sigma, point.alpha_rate, point.sigma_rate)
        try:
            state, output = conversion(self.source, kind, path)
        except ZeroDivisionError:
            state = output = math.nan
        if not (math.isfinite(state) and math.isfinite(output)):
            mend = "Start or stop a little off the end, or use a network that predicts 'v' or 'velocity'."
            expected = f"times at which {kind!r} can be had from {self.source!r}"
            raise ArgumentError("times", point.time, expected, mend)
        return self.x * state + self.output * output


class Step:
    """What a solver sees of the step it has to take, from `start` to `end`.

    Args:
        path: the field's path.
        source: what its network predicts.
        points: all points of the grid.
        index: this step's place in it.
        remembered: what the solver remembered in earlier steps, the latest first.
    """

    def __init__(
        self, path: Path, source: Kind, points: Sequence[Point], index: int, remembered: Sequence[Sum]
    ) -> None:
        self.path = path
        self.points = points
        self.index = index
        self.start = points[index]
        self.end = points[index + 1]
        self.x = Sum({"x": 1.0})
        self.remembered = remembered
        self.memory: Sum | None = None
        self.calls: list[tuple[float, Weights]] = []
        self.noises = 0
        self._source: Kind = source

    @property
    def steps(self) -> int:
        """How many steps there are in all."""
        return len(self.points) - 1

    def point_at(self, half_log_snr: float) -> Point:
        """The point of the path with this ratio."""
        return Point.of(self.path, float(self.path.time_at(half_log_snr)))

    def predict(self, x: Sum, point: Point) -> Prediction:
        """Call the network."""
        output = Sum({f"output{len(self.calls)}": 1.0})
        self.calls.append((point.time, x.weights()))
        return Prediction(x, output, point, self._source)

    def noise(self) -> Sum:
        """Fresh standard normal noise."""
        self.noises += 1
        return Sum({f"noise{self.noises - 1}": 1.0})

    def remember(self, value: Sum) -> None:
        """Keep a sum for later steps; as many are kept as the solver's `memory`."""
        self.memory = value


@runtime_checkable
class Solver(Protocol):
    """How to take one step; `memory` says how many earlier predictions it wants back."""

    @property
    def memory(self) -> int:
        """How many remembered sums are carried along with the state."""
        ...

    def advance(self, step: Step) -> Sum:
        """The state at `step.end`."""
        ...


@dataclass(frozen=True, slots=True)
class LinearStep:
    """One step in plain numbers.

    Args:
        calls: for each call of the network its time and its input.
        result: the next state.
        memory: what to remember, or nothing.
        noises: how many tensors of noise are drawn.
    """

    calls: tuple[tuple[float, Weights], ...]
    result: Weights
    memory: Weights
    noises: int

    def run(
        self,
        x: Tensor,
        remembered: Sequence[Tensor],
        network: Callable[[Tensor, float], Tensor],
        draw: Callable[[int], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """The next state, and what is to be remembered."""
        known = {"x": x}
        known.update((f"memory{index}", value) for index, value in enumerate(remembered))
        known.update((f"noise{index}", draw(index)) for index in range(self.noises))
        for index, (time, weights) in enumerate(self.calls):
            known[f"output{index}"] = network(weighted_sum(weights, known), time)
        kept = weighted_sum(self.memory, known) if self.memory else None
        return weighted_sum(self.result, known), kept


def linear_steps(solver: Solver, path: Path, source: Kind, times: Sequence[float]) -> tuple[LinearStep, ...]:
    """Run a solver over a grid of times on symbols.

    Raises:
        ArgumentError: a time at which the solver needs what the network's prediction does not give.
    """
    points = [Point.of(path, time) for time in times]
    found = []
    for index in range(len(times) - 1):
        back = [Sum({f"memory{lag}": 1.0}) for lag in range(min(index, solver.memory))]
        step = Step(path, source, points, index, back)
        try:
            result = solver.advance(step)
            sums = [result.weights(), *(weights for _, weights in step.calls)]
        except (ZeroDivisionError, OverflowError):
            result, sums = step.x, [(("x", math.nan),)]
        for weights in sums:
            if not all(math.isfinite(weight) for _, weight in weights):
                mend = "Start or stop a little off the end, or take a solver that allows it, such as DDIM()."
                expected = f"times that {type(solver).__name__} can step between"
                raise ArgumentError("times", [step.start.time, step.end.time], expected, mend)
        memory = step.memory.weights() if step.memory is not None else ()
        found.append(LinearStep(tuple(step.calls), result.weights(), memory, step.noises))
    return tuple(found)


def weighted_sum(weights: Weights, known: Mapping[str, Tensor]) -> Tensor:
    """The sum of tensors by name; of half precision, in float32, because the weights nearly cancel."""
    dtype = known["x"].dtype
    coarse = dtype in _COARSE
    total: Tensor | None = None
    for name, weight in weights:
        value = known[name].float() if coarse else known[name]
        if total is None:
            total = value if weight == 1 else value * weight
        else:
            total = torch.add(total, value, alpha=weight)
    if total is None:
        return torch.zeros_like(known["x"])
    return total.to(dtype)
