"""A gradient in few numbers: a coefficient for each keyed direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from thalweg.blackbox.directions import Bound, weighted_sum
from thalweg.blackbox.estimate import Evaluations
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """What a rule found out about a gradient, before any gradient is made.

    Args:
        loss: detached scalar.
        coefficients: one scalar per direction; the gradient is the sum of coefficient times direction.
        bound: the directions.
        evaluations: how often the closure was called.
    """

    loss: Tensor
    coefficients: tuple[Tensor, ...]
    bound: Bound
    evaluations: int

    def part(self, index: int, parameter: Tensor) -> Tensor | None:
        """The gradient of one parameter, made anew; None where no direction moves it."""
        return weighted_sum(self.bound, self.coefficients, index, parameter)

    def estimate(self, parameters: Sequence[Tensor]) -> Estimate:
        """The gradients of all parameters, made."""
        gradients = tuple(self.part(index, parameter) for index, parameter in enumerate(parameters))
        return Estimate(self.loss, gradients, self.evaluations)


@runtime_checkable
class Measuring(Protocol):
    """A rule whose gradient is a sum over keyed directions: SPSA and its family, forward gradients."""

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Bound:
        """The directions of the estimate with this key."""
        ...

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """Evaluate, and return the coefficients; draws only from `key`, changes nothing."""
        ...

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """As of every rule."""
        ...
