"""Random directions with unit covariance, drawn again from their key whenever they are needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from thalweg import noise
from thalweg.blackbox.coordinates import Coordinates
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.noise import Key


class Bound(Protocol):
    """The directions of one estimate, bound to its parameters and its key; nothing of them is stored.

    `weights` holds one number per direction, by which the slope along it enters the sum that is the gradient.
    """

    @property
    def weights(self) -> tuple[float, ...]:
        """One number per direction."""
        ...

    def part(self, sample: int, index: int, value: Tensor) -> Tensor | None:
        """What direction `sample` holds for parameter `index`, freshly drawn; None where that is all zero.

        Args:
            value: the parameter as it was before anything moved it.
        """
        ...


@runtime_checkable
class Pattern(Protocol):
    """What `directions=` accepts beside a name: `LowRank`, `Sparse`, `Blocks`, `Coordinates` or your own."""

    def bind(self, parameters: Sequence[Tensor], key: Key, samples: int) -> Bound:
        """The directions of one estimate; the same for the same arguments."""
        ...


Plain = Literal["rademacher", "gaussian"]
Name = Literal["rademacher", "gaussian", "sphere", "coordinate"]
Directions = Name | Pattern
PLAIN: tuple[str, ...] = get_args(Plain)
DIRECTIONS: tuple[str, ...] = get_args(Name)


def require_directions(argument: str, value: object, names: tuple[str, ...] = DIRECTIONS) -> None:
    """Raise unless `value` is one of `names` or a pattern."""
    expected = "one of " + ", ".join(map(repr, names)) + ", or a pattern such as LowRank(rank=2)"
    if isinstance(value, str):
        if value not in names:
            raise ArgumentError(argument, value, expected)
    elif isinstance(value, type) or not isinstance(value, Pattern) or hasattr(value, "measure"):
        # a rule binds directions too, and is none
        raise ArgumentTypeError(argument, value, expected)


def reads_values(directions: object) -> bool:
    """Whether a pattern looks at what the parameters hold, as masks by magnitude do."""
    return bool(getattr(directions, "reads_values", False))


def bind(directions: Directions, parameters: Sequence[Tensor], key: Key, samples: int) -> Bound:
    """The directions of one estimate.

    Args:
        directions: "rademacher" (entries -1 or 1; the least second moment), "gaussian" (isotropic), "sphere"
            (uniform on the sphere of radius sqrt(d), d the number of all weights; one draw more), or a
            pattern. "coordinate" is `Coordinates()`. All have the identity as E[z z^T]; patterns say where.
        parameters: what the directions move.
        key: the key of the whole estimate.
        samples: how many directions, at least 1; for `Coordinates` how many sets of them.

    Raises:
        ArgumentError: a pattern that does not fit the parameters.

    Example:
        >>> weight = torch.zeros(4)
        >>> bound = bind("sphere", [weight], Key(0), samples=2)
        >>> bound.part(0, 0, weight).norm(), bound.weights
        (tensor(2.), (0.5, 0.5))
    """
    if directions == "coordinate":
        return Coordinates().bind(parameters, key, samples)
    if directions == "sphere":
        return _Sphere(tuple(parameters), key, samples)
    if isinstance(directions, str):
        return _Independent(directions, key, samples)
    return directions.bind(parameters, key, samples)


def direction(kind: Plain, like: Tensor, key: Key, sample: int, index: int) -> Tensor:
    """Draw the part of one random direction with independent entries that belongs to one parameter.

    Args:
        kind: "rademacher" or "gaussian".
        like: the parameter; its shape, dtype and device count, its values do not.
        key: the key of the whole estimate.
        sample: which direction of the estimate.
        index: which parameter.

    Returns:
        A tensor z like `like`, with E[z z^T] the identity; the same bits for the same arguments.

    Example:
        >>> direction("rademacher", torch.empty(4), Key(0), sample=0, index=0).abs()
        tensor([1., 1., 1., 1.])
    """
    own = own_key(key, sample, index)
    return noise.rademacher(like, own) if kind == "rademacher" else noise.normal(like, own)


def own_key(key: Key, sample: int, index: int) -> Key:
    """The key of one parameter's part of one direction."""
    return Key(seed=key.bits(), step=sample, call=index, device=key.device)


def weighted_sum(
    bound: Bound, coefficients: Sequence[Tensor | float], index: int, parameter: Tensor
) -> Tensor | None:
    """Sum the parts that belong to one parameter, one in memory beside the sum; None where all are zero.

    Args:
        coefficients: one scalar per direction, sample 0 first.

    Returns:
        A new tensor like `parameter`, summed in float32 or better.
    """
    value, total = parameter.detach(), None
    for sample, coefficient in enumerate(coefficients):
        drawn = bound.part(sample, index, value)
        if drawn is None:
            continue
        term = drawn.to(torch.promote_types(drawn.dtype, torch.float32))
        term.mul_(coefficient.to(term.device, term.dtype) if isinstance(coefficient, Tensor) else coefficient)
        total = term if total is None else total.add_(term)
        del drawn, term
    return None if total is None else total.to(parameter.dtype)


def combine(
    directions: Directions, coefficients: Sequence[Tensor], parameters: Sequence[Tensor], key: Key
) -> tuple[Tensor, ...]:
    """Sum directions with coefficients: one gradient per parameter, one direction in memory at a time.

    Args:
        directions: as in `bind`.
        coefficients: one scalar tensor per direction, sample 0 first.
        parameters: the parameters the directions were drawn for.
        key: the key of the whole estimate.

    Returns:
        For each parameter the sum over samples of coefficient times direction, summed in float32 or better.
    """
    bound = bind(directions, parameters, key, len(coefficients))
    sums = [weighted_sum(bound, coefficients, index, p) for index, p in enumerate(parameters)]
    return tuple(torch.zeros_like(p) if total is None else total for p, total in zip(parameters, sums))


@dataclass(frozen=True, slots=True)
class _Independent:
    kind: Plain
    key: Key
    samples: int

    @property
    def weights(self) -> tuple[float, ...]:
        return (1 / self.samples,) * self.samples

    def part(self, sample: int, index: int, value: Tensor) -> Tensor:
        return direction(self.kind, value, self.key, sample, index)


@dataclass(frozen=True, slots=True, eq=False)
class _Sphere:
    parameters: tuple[Tensor, ...]
    key: Key
    samples: int
    _factors: dict[int, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[float, ...]:
        return (1 / self.samples,) * self.samples

    def part(self, sample: int, index: int, value: Tensor) -> Tensor:
        if sample not in self._factors:
            self._factors[sample] = self._factor(sample)
        drawn = direction("gaussian", value, self.key, sample, index)
        return drawn.mul_(self._factors[sample].to(drawn.device))

    def _factor(self, sample: int) -> Tensor:
        """The radius over the length of the Gaussian draw, for which all parameters are drawn once."""
        device, total, size = self.parameters[0].device, None, 0
        for index, parameter in enumerate(self.parameters):
            drawn = direction("gaussian", parameter.detach(), self.key, sample, index)
            square = torch.linalg.vector_norm(drawn, dtype=torch.float64).square().to(device)
            total = square if total is None else total + square
            size += drawn.numel()
            del drawn
        assert total is not None
        factor: Tensor = math.sqrt(size) / total.sqrt()
        return factor
