"""How much of the label is in the latent: the noise levels of NoProp, fixed or learned.

Time runs up to the label here, as in the paper: level 0 is almost all noise, the last almost all label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive

Number = TypeVar("Number", float, Tensor)


class Transition(NamedTuple):
    """One step of denoising: the next latent is `guess * u + state * z + noise * normal`.

    Args:
        guess: the weight of the guessed embedding (the paper's a).
        state: the weight of the latent before (b).
        noise: the standard deviation of what is added (the square root of c).
    """

    guess: float | Tensor
    state: float | Tensor
    noise: float | Tensor


def transition(before: Number, after: Number) -> Transition:
    """The posterior step from one signal level to the next.

    Args:
        before, after: levels in (0, 1), the second larger: the share of the label in the latent's variance.

    Example:
        >>> step = transition(0.2, 0.5)
        >>> abs(step.guess + step.state * 0.2**0.5 - 0.5**0.5) < 1e-12  # a right guess stays on the path
        True
    """
    kept = before / after
    away = 1 - before
    variance = (1 - after) * (1 - kept) / away
    return Transition(
        guess=after**0.5 * (1 - kept) / away, state=kept**0.5 * (1 - after) / away, noise=variance**0.5
    )


def deterministic_transition(before: Number, after: Number) -> Transition:
    """The step without noise that maps the same latents onto the next level (as DDIM does).

    Example:
        >>> step = deterministic_transition(0.2, 0.5)
        >>> abs(step.guess + step.state * 0.2**0.5 - 0.5**0.5) < 1e-12, step.noise
        (True, 0.0)
    """
    state = ((1 - after) / (1 - before)) ** 0.5
    return Transition(guess=after**0.5 - state * before**0.5, state=state, noise=0.0)


def signal_to_noise(level: Number) -> Number:
    """The signal-to-noise ratio at a level.

    Example:
        >>> signal_to_noise(0.5)
        1.0
    """
    return level / (1 - level)


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """The levels of NoProp in discrete time, one more than there are blocks; choose `cosine` unless you know.

    Args:
        levels: increasing, each in (0, 1).

    Raises:
        ArgumentError, ArgumentTypeError: fewer than two levels, out of (0, 1), or not increasing. A level of
            1 would make the last weight infinite.

    Example:
        >>> round(NoiseLevels((0.1, 0.5, 0.9)).weight(1), 6)
        8.0
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.levels, tuple) or not all(isinstance(x, float) for x in self.levels):
            raise ArgumentTypeError("levels", self.levels, "a tuple of floats in (0, 1)")
        if len(self.levels) < 2 or not all(0 < level < 1 for level in self.levels):
            raise ArgumentError("levels", self.levels, "at least two levels in (0, 1), both ends left out")
        if not all(a < b for a, b in zip(self.levels, self.levels[1:])):
            mend = "Time runs up to the label here: reverse a schedule made for data at time 0."
            raise ArgumentError("levels", self.levels, "increasing levels", mend)

    @property
    def steps(self) -> int:
        """How many blocks it takes."""
        return len(self.levels) - 1

    def transition(self, step: int) -> Transition:
        """The denoising step of block `step`, counted from 0."""
        return transition(self.levels[step], self.levels[step + 1])

    def weight(self, step: int) -> float:
        """By how much block `step` raises the signal-to-noise ratio: the weight of its loss."""
        return signal_to_noise(self.levels[step + 1]) - signal_to_noise(self.levels[step])


def cosine(steps: int = 10, *, offset: float = 0.008, margin: float = 1e-4) -> NoiseLevels:
    """The cosine schedule; its constants are ours, the paper gives none.

    Args:
        steps: blocks, at least 1.
        offset: above 0, keeps the first step from vanishing.
        margin: the first level is at least this and the last at most 1 minus this, so far as there is room
            beside their neighbours; below 1/2.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> [round(level, 3) for level in cosine(4).levels]
        [0.0, 0.144, 0.494, 0.847, 1.0]
    """
    require_integer("steps", steps, 1)
    require_positive("offset", offset)
    require_positive("margin", margin)
    if margin >= 0.5:
        raise ArgumentError("margin", margin, "a number below 1/2")
    angles = [0.5 * math.pi * ((steps - t) / steps + offset) / (1 + offset) for t in range(steps + 1)]
    levels = [math.cos(angle) ** 2 for angle in angles]
    # of many steps the neighbours lie beyond the margin too: the ends must stay outside of them
    levels[0] = min(max(levels[0], margin), levels[1] / 2)
    levels[-1] = max(min(levels[-1], 1 - margin), (1 + levels[-2]) / 2 if levels[-2] >= 1 - margin else 0.0)
    return NoiseLevels(tuple(levels))


@runtime_checkable
class ContinuousSchedule(Protocol):
    """What NoProp in continuous time asks of a schedule; times are in [0, 1], 1 is the label."""

    def level(self, time: Tensor) -> Tensor:
        """The share of the label in the latent's variance, in (0, 1), increasing in time."""
        ...

    def weight(self, time: Tensor) -> Tensor:
        """The slope of the signal-to-noise ratio in time, above 0."""
        ...


class LearnedSchedule(nn.Module):
    """A schedule that is learned with the block: monotone by construction, its two ends learned too.

    The level is sigmoid(-g(t)), where g falls from g(0) = `high` to g(1) = `low` along a network of two
    layers with positive weights.

    Args:
        low, high: initial ends, low < high; -5 and 5 are ours (levels 0.0067 to 0.9933), the paper
            gives none.
        width: hidden units, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> schedule = LearnedSchedule()
        >>> schedule.level(torch.tensor([0.0, 1.0])).detach()
        tensor([0.0067, 0.9933])
    """

    def __init__(self, low: float = -5.0, high: float = 5.0, width: int = 16) -> None:
        super().__init__()
        for name, value in (("low", low), ("high", high)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ArgumentTypeError(name, value, "a finite number")
        require_positive("high - low", high - low)
        require_integer("width", width, 1)
        self.low = nn.Parameter(torch.tensor(float(low)))
        # the softplus of this is how far the other end lies above: it cannot pass below
        self.raw_gap = nn.Parameter(_inverse_softplus(torch.tensor(float(high - low))))
        self.raw_inner = nn.Parameter(_inverse_softplus(torch.full((width,), 2.0)))
        self.raw_outer = nn.Parameter(_inverse_softplus(torch.full((width,), 1.0)))
        self.shift = nn.Parameter(-2.0 * torch.linspace(0, 1, width))

    @property
    def high(self) -> Tensor:
        """Where g starts."""
        return self.low + F.softplus(self.raw_gap)

    def log_noise(self, time: Tensor) -> Tensor:
        """g(t): minus the logarithm of the signal-to-noise ratio."""
        return self.low + F.softplus(self.raw_gap) * (1 - self._risen(time))

    def level(self, time: Tensor) -> Tensor:
        """The share of the label in the latent's variance."""
        return torch.sigmoid(-self.log_noise(time))

    def weight(self, time: Tensor) -> Tensor:
        """The slope of the signal-to-noise ratio in time."""
        inner = F.softplus(self.raw_inner)
        hidden = torch.sigmoid(inner * time[..., None] + self.shift)
        slope = (F.softplus(self.raw_outer) * inner * hidden * (1 - hidden)).sum(-1)
        ends = self._network(time.new_tensor([0.0, 1.0]))
        return F.softplus(self.raw_gap) * slope / (ends[1] - ends[0]) * torch.exp(-self.log_noise(time))

    def _risen(self, time: Tensor) -> Tensor:
        """From 0 at time 0 to 1 at time 1."""
        ends = self._network(time.new_tensor([0.0, 1.0]))
        return (self._network(time) - ends[0]) / (ends[1] - ends[0])

    def _network(self, time: Tensor) -> Tensor:
        hidden = torch.sigmoid(F.softplus(self.raw_inner) * time[..., None] + self.shift)
        return (F.softplus(self.raw_outer) * hidden).sum(-1)


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
