"""Shares of Jacobians by step: numbers, tuples, and rules that choose the steps to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.noise import Key


@runtime_checkable
class MaskRule(Protocol):
    """A rule that gives each step its share; a frozen dataclass, so that routes print, compare and pickle."""

    def values(self, steps: int, key: Key) -> tuple[float, ...]:
        """One share in [0, 1] per step; random rules draw from `key` only."""
        ...


Mask = float | tuple[float, ...] | MaskRule


@dataclass(frozen=True, slots=True)
class Last:
    """Keep the last `count` steps, drop those before.

    Example:
        >>> Last(2).values(4, Key(0))
        (0.0, 0.0, 1.0, 1.0)
    """

    count: int

    def __post_init__(self) -> None:
        require_integer("count", self.count, 1)

    def draw(self, steps: int, key: Key) -> int:
        """How many steps are kept."""
        if self.count > steps:
            raise ArgumentError("last", self.count, f"at most {steps}, the number of steps")
        return self.count

    def values(self, steps: int, key: Key) -> tuple[float, ...]:
        """One for each of the last steps, zero for the others."""
        kept = self.draw(steps, key)
        return (0.0,) * (steps - kept) + (1.0,) * kept


@dataclass(frozen=True, slots=True)
class RandomLast:
    """Keep the last K steps, K drawn once per call, uniformly from `least` to `most`, both included.

    AlignProp's paper draws from 0 to all steps; its code of 2023 drew anew for every step, which is another
    rule (`Bernoulli("ramp")`) and no truncation.

    Args:
        least: at least 0; with 0 some calls have no gradient at all.
        most: at most the number of steps; None for all of them.

    Paper:
        Prabhudesai, Goyal, Pathak, Fragkiadaki: Aligning Text-to-Image Diffusion Models with Reward
        Backpropagation. arXiv 2310.03739, 2023.

    Example:
        >>> RandomLast(1, 3).draw(10, Key(0)) in (1, 2, 3)
        True
    """

    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        require_integer("least", self.least, 0)
        if self.most is not None:
            require_integer("most", self.most, max(self.least, 1))

    def draw(self, steps: int, key: Key) -> int:
        """How many steps are kept."""
        most = steps if self.most is None else self.most
        if not self.least <= most <= steps:
            got = f"{self.least} to {most}"
            raise ArgumentError("last", got, f"a range within 0 to {steps}, the number of steps")
        # integer arithmetic on the key's bits: no tensor is read, so the draw works under fake tensors too
        return self.least + key.bits() % (most - self.least + 1)

    def values(self, steps: int, key: Key) -> tuple[float, ...]:
        """One for each of the last steps, zero for the others."""
        kept = self.draw(steps, key)
        return (0.0,) * (steps - kept) + (1.0,) * kept


@dataclass(frozen=True, slots=True)
class Bernoulli:
    """Keep each step or not, by independent draws.

    Args:
        probability: of keeping a step, in [0, 1]; or "ramp", (k + 1) / (steps + 1) for step k, which is what
            AlignProp's released code does.

    Example:
        >>> set(Bernoulli(0.5).values(8, Key(0))) <= {0.0, 1.0}
        True
    """

    probability: float | str = "ramp"

    def __post_init__(self) -> None:
        if self.probability != "ramp":
            _require_share("probability", self.probability)

    def values(self, steps: int, key: Key) -> tuple[float, ...]:
        """One or zero per step."""
        ramp = [(k + 1) / (steps + 1) for k in range(steps)]
        chances = ramp if isinstance(self.probability, str) else [self.probability] * steps
        # 63 well-mixed bits of a key of its own per step, as a number in [0, 1)
        draws = [key.at(call=key.call + 1 + k).bits() / 2**63 for k in range(steps)]
        return tuple(float(draw < chance) for draw, chance in zip(draws, chances))


def shares(argument: str, mask: Mask, steps: int, key: Key) -> tuple[float, ...]:
    """The shares of a mask, one per step; equal random rules give equal draws."""
    if isinstance(mask, int | float):
        return (float(mask),) * steps
    found = mask if isinstance(mask, tuple) else mask.values(steps, key)
    if len(found) != steps:
        raise ArgumentError(argument, f"{len(found)} values", f"{steps}, one per step")
    for value in found:
        _require_share(argument, value)
    return tuple(float(value) for value in found)


def is_one(mask: Mask) -> bool:
    """Whether a mask is sure to keep every step whole."""
    if isinstance(mask, tuple):
        return all(value == 1 for value in mask)
    return isinstance(mask, int | float) and mask == 1


def require_mask(argument: str, mask: object) -> None:
    """Raise unless `mask` is a share in [0, 1], a tuple of them, or a rule."""
    if isinstance(mask, tuple):
        for index, value in enumerate(mask):
            _require_share(f"{argument}[{index}]", value)
    elif isinstance(mask, type) or not isinstance(mask, MaskRule):
        _require_share(argument, mask)


def _require_share(argument: str, value: object) -> None:
    mend = "A mask is a number, a tuple with one number per step, or a rule such as Last(5)."
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(argument, value, "a number in [0, 1]", mend)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ArgumentError(argument, value, "a number in [0, 1]", mend)
