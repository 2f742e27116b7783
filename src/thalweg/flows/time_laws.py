"""How often each noise level is seen in training: laws of the time, by their quantile functions.

One uniform number per example is all a law needs, so that keyed and stratified draws serve all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_positive
from thalweg.flows.path import Path


@runtime_checkable
class TimeLaw(Protocol):
    """A law of training times: anything with these two methods."""

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """Times of draws that are uniform on [0, 1), by the inverse of the distribution function."""
        ...

    def log_density(self, t: Tensor, path: Path) -> Tensor:
        """The logarithm of the density with respect to t."""
        ...


@dataclass(frozen=True, slots=True)
class UniformTime:
    """Uniform times between two ends: the default.

    Args:
        least: at least 0; where the loss is infinite at t = 0, above.
        most: at most 1.

    Example:
        >>> from thalweg.flows import Straight
        >>> UniformTime(0.5, 1.0).times(torch.tensor([0.0, 0.5]), Straight())
        tensor([0.5000, 0.7500], dtype=torch.float64)
    """

    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.least < self.most <= 1:
            raise ArgumentError("least", self.least, f"0 <= least < most <= 1, with most = {self.most}")

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        return self.least + (self.most - self.least) * uniform.to(torch.float64)

    def log_density(self, t: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        inside = (t >= self.least) & (t <= self.most)
        return torch.where(inside, -math.log(self.most - self.least), -math.inf).to(torch.float64)


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """Times whose logit is normal: most of them in the middle, as in Stable Diffusion 3.

    Args:
        mean: of the logit.
        deviation: of the logit, above 0.

    Example:
        >>> from thalweg.flows import Straight
        >>> LogitNormal().times(torch.tensor([0.5]), Straight())
        tensor([0.5000], dtype=torch.float64)
    """

    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        require_positive("deviation", self.deviation)

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        return torch.sigmoid(self.mean + self.deviation * standard_normal_quantile(uniform))

    def log_density(self, t: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        logit = torch.logit(t.to(torch.float64))
        return _log_normal_density(logit, self.mean, self.deviation) - t.log() - torch.log1p(-t)


@dataclass(frozen=True, slots=True)
class UShaped:
    """Density proportional to e^(-steepness t) + e^(-steepness (1 - t)): both ends, for reflow.

    Args:
        steepness: above 0; 4 in the paper.

    Paper:
        Lee, Lin, Fanti: Improving the Training of Rectified Flows. NeurIPS 2024.

    Example:
        >>> from thalweg.flows import Straight
        >>> UShaped().times(torch.tensor([0.5]), Straight())
        tensor([0.5000], dtype=torch.float64)
    """

    steepness: float = 4.0

    def __post_init__(self) -> None:
        require_positive("steepness", self.steepness)

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        height = math.sinh(self.steepness / 2)
        return 0.5 + torch.asinh((2 * uniform.to(torch.float64) - 1) * height) / self.steepness

    def log_density(self, t: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        a = self.steepness
        return torch.log(a * torch.cosh(a * (t.to(torch.float64) - 0.5)) / (2 * math.sinh(a / 2)))


@dataclass(frozen=True, slots=True)
class LogNormalLevel:
    """log(sigma / alpha) normal: EDM's law of noise levels. Levels beyond the path's end count as its end.

    Args:
        mean: -1.2 in EDM.
        deviation: 1.2 in EDM, above 0.

    Example:
        >>> from thalweg.flows import VarianceExploding
        >>> 80 * LogNormalLevel(0.0, 1.0).times(torch.tensor([0.5]), VarianceExploding(80.0))
        tensor([1.], dtype=torch.float64)
    """

    mean: float = -1.2
    deviation: float = 1.2

    def __post_init__(self) -> None:
        require_positive("deviation", self.deviation)

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        return path.time_at(-(self.mean + self.deviation * standard_normal_quantile(uniform)))

    def log_density(self, t: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        level = -path.half_log_snr(t)
        return _log_normal_density(level, self.mean, self.deviation) + path.half_log_snr_rate(t).abs().log()


@dataclass(frozen=True, slots=True)
class UniformLevel:
    """log(alpha / sigma) uniform between two values: importance sampling of the variational bound.

    Args:
        least: the noisiest level.
        most: the cleanest, above `least`.

    Example:
        >>> from thalweg.flows import Straight
        >>> UniformLevel(-1.0, 1.0).times(torch.tensor([0.5]), Straight())
        tensor([0.5000], dtype=torch.float64)
    """

    least: float
    most: float

    def __post_init__(self) -> None:
        if not -math.inf < self.least < self.most < math.inf:
            raise ArgumentError("least", self.least, f"a number below most, {self.most}")

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        return path.time_at(self.most + (self.least - self.most) * uniform.to(torch.float64))

    def log_density(self, t: Tensor, path: Path) -> Tensor:
        """See `TimeLaw`."""
        level = path.half_log_snr(t)
        inside = (level >= self.least) & (level <= self.most)
        found = path.half_log_snr_rate(t).abs().log() - math.log(self.most - self.least)
        return torch.where(inside, found, -math.inf)


def standard_normal_quantile(uniform: Tensor) -> Tensor:
    """The inverse of the normal distribution function, finite also for draws of 0."""
    bits = torch.finfo(uniform.dtype).eps / 2
    found: Tensor = torch.special.ndtri(uniform.to(torch.float64).clamp(bits, 1 - bits))
    return found


def require_law(value: object) -> None:
    """Raise `ArgumentTypeError` unless `value` is a law of times."""
    if isinstance(value, type) or not isinstance(value, TimeLaw):
        raise ArgumentTypeError("law", value, "a law of times such as UniformTime()")


def _log_normal_density(value: Tensor, mean: float, deviation: float) -> Tensor:
    return -(((value - mean) / deviation) ** 2) / 2 - math.log(deviation) - math.log(2 * math.pi) / 2
