"""Coordinate directions (CGE): one weight after another, or a keyed subset of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_integer
from thalweg.noise import Key


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Move one weight at a time by exactly the scale: the finite differences of a textbook.

    Choose it for few parameters (prompts, gates, physical constants), where the whole gradient costs d or 2 d
    evaluations and has no variance, or with `subset` as an unbiased estimate from m coordinates, drawn
    without repetition and weighed by d / m. Over the draw E[z z^T] d / m is the identity; of `samples` it
    takes independent subsets.

    Args:
        subset: how many coordinates an estimate draws from its key, at least 1; None for all of them.
        limit: without `subset`, more weights than this are refused, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Kiefer, Wolfowitz: Stochastic estimation of the maximum of a regression function. 1952. For networks:
        Chen et al.: DeepZero. arXiv 2310.02025, 2023.

    Example:
        >>> from thalweg.blackbox.spsa import SPSA
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0, -1.0], requires_grad=True)
        >>> rule = SPSA(scale=0.5, directions=Coordinates())
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=rule)
        >>> weight.grad
        tensor([ 6., -2.])
    """

    subset: int | None = None
    limit: int = 10_000

    def __post_init__(self) -> None:
        if self.subset is not None:
            require_integer("subset", self.subset, 1)
        require_integer("limit", self.limit, 1)

    def bind(self, parameters: Sequence[Tensor], key: Key, samples: int) -> BoundCoordinates:
        """The coordinates of one estimate.

        Raises:
            ArgumentError: more weights than the limit, fewer than the subset, or all of them more than once.
        """
        sizes = [parameter.numel() for parameter in parameters]
        total = sum(sizes)
        if not total:
            raise ArgumentError("directions", self, "at least one weight in all parameters")
        if self.subset is None:
            if total > self.limit:
                mend = f"That is as many evaluations: Coordinates(subset=100), or limit={total}."
                raise ArgumentError("directions", self, f"at most {self.limit} weights, not {total}", mend)
            if samples != 1:
                raise ArgumentError(
                    "samples", samples, "1, since Coordinates() takes all coordinates already"
                )
            chosen = tuple(range(total))
        else:
            if self.subset > total:
                raise ArgumentError("directions", self, f"a subset of at most {total}, the number of weights")
            chosen = tuple(
                place
                for each in range(samples)
                for place in _drawn(total, self.subset, Key(key.bits(), step=each))
            )
        return BoundCoordinates(chosen, tuple(accumulate(sizes, initial=0)), total / len(chosen))


def _drawn(total: int, count: int, key: Key) -> list[int]:
    """The first `count` places of a keyed shuffle of range(total), without making the shuffle."""
    moved: dict[int, int] = {}
    found = []
    for place in range(count):
        other = place + key.at(call=place).bits() % (total - place)
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return found


@dataclass(frozen=True, slots=True)
class BoundCoordinates:
    """Unit vectors, by their places in the concatenation of all parameters."""

    chosen: tuple[int, ...]
    starts: tuple[int, ...]
    weight: float

    @property
    def weights(self) -> tuple[float, ...]:
        """d / m for each of m coordinates."""
        return (self.weight,) * len(self.chosen)

    def part(self, sample: int, index: int, value: Tensor) -> Tensor | None:
        """A unit vector in the shape of the parameter that holds the coordinate; else None."""
        place = self.chosen[sample]
        if not self.starts[index] <= place < self.starts[index + 1]:
            return None
        unit = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        unit.view(-1)[place - self.starts[index]] = 1
        return unit
