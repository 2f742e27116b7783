"""The noising paths that have names: variance preserving, exploding, straight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_positive
from thalweg.flows.path import Coefficients, Path, clock_times


@dataclass(frozen=True, slots=True)
class Straight(Path):
    """alpha = 1 - t, sigma = t: rectified flow and flow matching; choose it for a new model.

    Paper:
        Liu, Gong, Liu: Flow Straight and Fast. ICLR 2023, arXiv 2209.03003.

    Example:
        >>> Straight().velocity(torch.ones(2), torch.zeros(2), 0.5)
        tensor([-1., -1.])
    """

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times = clock_times(t)
        one = torch.ones_like(times)
        return Coefficients(1 - times, times, -one, one)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        return torch.sigmoid(-_double(half_log_snr))


@dataclass(frozen=True, slots=True)
class Cosine(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): variance preserving, and finite at both ends.

    Example:
        >>> found = Cosine().coefficients(1.0)
        >>> float(found.alpha), float(found.sigma)
        (0.0, 1.0)
    """

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times, quarter = clock_times(t), math.pi / 2
        # the sine of the rest is 0 at t = 1, which the cosine is not
        alpha, sigma = torch.sin(quarter * (1 - times)), torch.sin(quarter * times)
        return Coefficients(alpha, sigma, -quarter * sigma, quarter * alpha)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        return torch.atan(torch.exp(-_double(half_log_snr))) * 2 / math.pi


@dataclass(frozen=True, slots=True)
class OffsetCosine(Path):
    """The cosine path of improved DDPM, which starts a little later: variance preserving, normalised at 0.

    Args:
        offset: above 0; 0.008 in the paper.

    Paper:
        Nichol, Dhariwal: Improved Denoising Diffusion Probabilistic Models. ICML 2021.

    Example:
        >>> OffsetCosine().coefficients(0.0).alpha
        tensor(1., dtype=torch.float64)
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        require_positive("offset", self.offset)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        rate = math.pi / 2 / (1 + self.offset)
        start = rate * self.offset
        times = clock_times(t)
        angle, left = start + rate * times, rate * (1 - times)
        alpha = torch.sin(left) / math.cos(start)
        sigma = (torch.sin(rate * times) * torch.sin(angle + start)).sqrt() / math.cos(start)
        sigma_rate = rate * torch.sin(angle) * torch.cos(angle) / (sigma * math.cos(start) ** 2)
        return Coefficients(alpha, sigma, -rate * torch.sin(angle) / math.cos(start), sigma_rate)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        rate = math.pi / 2 / (1 + self.offset)
        start = rate * self.offset
        alpha = torch.sigmoid(2 * _double(half_log_snr)).sqrt()
        return (1 - torch.asin((alpha * math.cos(start)).clamp(max=1)) / rate).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1 with a rate of noising that grows linearly: DDPM and score-based models.

    At t = 0 the rate of sigma is infinite, as that of a square root; at t = 1 alpha is small, not 0.

    Args:
        beta_min: the rate at t = 0, above 0.
        beta_max: the rate at t = 1, at least `beta_min`.

    Paper:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole: Score-Based Generative Modeling through Stochastic
        Differential Equations. ICLR 2021.

    Example:
        >>> found = VariancePreserving().coefficients(0.5)
        >>> bool(torch.isclose(found.alpha**2 + found.sigma**2, torch.tensor(1.0).double()))
        True
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _require_rates(self.beta_min, self.beta_max)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        total, rate = _linear_rates(clock_times(t), self.beta_min, self.beta_max)
        alpha, sigma = torch.exp(-total / 2), torch.sqrt(-torch.expm1(-total))
        return Coefficients(alpha, sigma, -rate * alpha / 2, rate * alpha**2 / (2 * sigma))

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """See `Path`."""
        total, _ = _linear_rates(clock_times(t), self.beta_min, self.beta_max)
        return -total / 2 - torch.log(-torch.expm1(-total)) / 2

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        total = torch.logaddexp(torch.zeros((), dtype=torch.float64), -2 * _double(half_log_snr))
        return _linear_times(total, self.beta_min, self.beta_max)


@dataclass(frozen=True, slots=True)
class SubVariancePreserving(Path):
    """alpha of `VariancePreserving` with sigma = 1 - alpha^2: less noise on the way; arguments likewise.

    Example:
        >>> found = SubVariancePreserving().coefficients(0.5)
        >>> bool(torch.isclose(found.alpha**2 + found.sigma, torch.tensor(1.0).double()))
        True
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _require_rates(self.beta_min, self.beta_max)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        total, rate = _linear_rates(clock_times(t), self.beta_min, self.beta_max)
        alpha, sigma = torch.exp(-total / 2), -torch.expm1(-total)
        return Coefficients(alpha, sigma, -rate * alpha / 2, rate * alpha**2)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        total = 2 * torch.asinh(torch.exp(-_double(half_log_snr)) / 2)
        return _linear_times(total, self.beta_min, self.beta_max)


@dataclass(frozen=True, slots=True)
class VarianceExploding(Path):
    """alpha = 1, sigma = sigma_max t: the coordinates of EDM and k-diffusion, whose sigma this is.

    Args:
        sigma_max: the noise at t = 1, above 0; 80 in EDM.

    Paper:
        Karras, Aittala, Aila, Laine: Elucidating the Design Space of Diffusion-Based Generative Models.
        NeurIPS 2022.

    Example:
        >>> VarianceExploding(80.0).coefficients(0.5).sigma
        tensor(40., dtype=torch.float64)
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_positive("sigma_max", self.sigma_max)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times = clock_times(t)
        one = torch.ones_like(times)
        return Coefficients(one, self.sigma_max * times, torch.zeros_like(times), self.sigma_max * one)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        return (torch.exp(-_double(half_log_snr)) / self.sigma_max).clamp(max=1)


@dataclass(frozen=True, slots=True)
class GeometricVarianceExploding(Path):
    """alpha = 1, sigma from `sigma_min` at t = 0 to `sigma_max` at t = 1 by equal factors: the score models.

    Args:
        sigma_min: above 0; at t = 0 there is still this much noise.
        sigma_max: above `sigma_min`.

    Example:
        >>> round(float(GeometricVarianceExploding(0.01, 100.0).coefficients(0.5).sigma), 12)
        1.0
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        require_positive("sigma_min", self.sigma_min)
        require_positive("sigma_max", self.sigma_max)
        if self.sigma_max <= self.sigma_min:
            raise ArgumentError("sigma_max", self.sigma_max, f"more than sigma_min, {self.sigma_min}")

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times, growth = clock_times(t), math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(growth * times)
        return Coefficients(torch.ones_like(times), sigma, torch.zeros_like(times), growth * sigma)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        growth = math.log(self.sigma_max / self.sigma_min)
        return ((-_double(half_log_snr) - math.log(self.sigma_min)) / growth).clamp(0, 1)


def _double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _require_rates(least: float, most: float) -> None:
    require_positive("beta_min", least)
    require_positive("beta_max", most)
    if most < least:
        raise ArgumentError("beta_max", most, f"at least beta_min, {least}")


def _linear_rates(times: Tensor, least: float, most: float) -> tuple[Tensor, Tensor]:
    """The integral of a rate that grows linearly, and the rate."""
    return least * times + (most - least) * times**2 / 2, least + (most - least) * times


def _linear_times(total: Tensor, least: float, most: float) -> Tensor:
    root = torch.sqrt(least**2 + 2 * (most - least) * total)
    # infinity over infinity is the far end
    return torch.where(total == math.inf, 1.0, 2 * total / (least + root)).clamp(0, 1)
