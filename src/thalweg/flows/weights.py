"""How much each noise level counts in training: weights of the loss, and laws of the time.

The two are one choice: what counts is the weight times the density of the time, which `effective_weight`
reports. Weights are always those of the squared error of the predicted data, whatever the network predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_positive
from thalweg.flows.path import Path
from thalweg.flows.prediction import Kind, require_kind

WeightName = Literal[
    "data", "noise", "score", "velocity", "v", "elbo", "truncated", "min_snr", "edm", "sigmoid"
]
WEIGHTS: tuple[WeightName, ...] = get_args(WeightName)
Weight = WeightName | Callable[[Path, Tensor], Tensor]


def data_weight(
    weight: Weight, path: Path, t: Tensor, *, clip: float = 5.0, sigma_data: float = 0.5, bias: float = 0.0
) -> Tensor:
    """The weight of |predicted data - data|^2 at times t.

    With snr = (alpha / sigma)^2 and lambda = log(alpha / sigma):

    | weight | is | |
    | --- | --- | --- |
    | "data" | 1 | the plain error of the data |
    | "noise" | snr | that of the noise, as in DDPM |
    | "score" | snr / sigma^2 | that of the score |
    | "velocity" | (alpha lambda')^2 | that of the velocity: flow matching |
    | "v" | ((alpha^2 + sigma^2) / sigma)^2 | that of v; snr + 1 where variance is preserved |
    | "elbo" | - lambda' snr | the variational bound, for uniform times |
    | "truncated" | max(snr, 1) | progressive distillation |
    | "min_snr" | min(snr, clip) | Min-SNR |
    | "edm" | 1 / s^2 + 1 / sigma_data^2, s = sigma / alpha | EDM |
    | "sigmoid" | snr sigmoid(bias - 2 lambda) | sigmoid weighting of the noise error |

    Args:
        weight: a name, or a function of the path and the times.
        path: the noising path.
        t: times, any shape.
        clip: of "min_snr", above 0.
        sigma_data: of "edm", above 0.
        bias: of "sigmoid".

    Returns:
        Shape of t, float64; infinite at t = 0 where the name says so.

    Paper:
        Hang et al.: Efficient Diffusion Training via Min-SNR Weighting Strategy. ICCV 2023. Kingma, Gao:
        Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation. NeurIPS 2023.

    Example:
        >>> from thalweg.flows import Straight
        >>> data_weight("noise", Straight(), torch.tensor(0.5))
        tensor(1., dtype=torch.float64)
    """
    if callable(weight):
        return weight(path, t)
    require_choice("weight", weight, WEIGHTS)
    if weight in ("data", "noise", "score", "velocity", "v"):
        return data_error_share(weight, path, t)
    alpha, sigma = path.coefficients(t)[:2]
    snr = (alpha / sigma) ** 2
    if weight == "elbo":
        return -path.half_log_snr_rate(t) * snr
    if weight == "truncated":
        return snr.clamp(min=1)
    if weight == "min_snr":
        require_positive("clip", clip)
        return snr.clamp(max=clip)
    if weight == "edm":
        require_positive("sigma_data", sigma_data)
        return snr + 1 / sigma_data**2
    return snr * torch.sigmoid(bias - 2 * path.half_log_snr(t))


def data_error_share(kind: Kind, path: Path, t: Tensor) -> Tensor:
    """The squared error of a prediction of `kind`, as a multiple of that of the data it implies."""
    require_kind("kind", kind)
    alpha, sigma, alpha_rate, sigma_rate = path.coefficients(t)
    if kind == "data":
        return torch.ones_like(alpha)
    if kind == "noise":
        return (alpha / sigma) ** 2
    if kind == "score":
        return (alpha / sigma**2) ** 2
    if kind == "v":
        return ((alpha**2 + sigma**2) / sigma) ** 2
    # alpha lambda', without dividing by an alpha of 0
    return (alpha_rate - alpha * sigma_rate / sigma) ** 2


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


def effective_weight(weight: Weight, law: TimeLaw, path: Path, t: Tensor) -> Tensor:
    """What training really weighs: weight times density of the time, per unit of log(alpha / sigma).

    Two trainings with the same effective weight have the same loss in expectation, up to a factor.

    Returns:
        Shape of t, float64.

    Example:
        >>> from thalweg.flows import Straight
        >>> effective_weight("elbo", UniformTime(), Straight(), torch.tensor([0.5]))
        tensor([1.], dtype=torch.float64)
    """
    require_law(law)
    density = law.log_density(t, path).exp() / path.half_log_snr_rate(t).abs()
    return data_weight(weight, path, t) * density


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
