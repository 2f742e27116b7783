"""The noising path of a trained model, from the table it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows.path import Coefficients, Path, clock_times


@dataclass(frozen=True, slots=True)
class Tabulated(Path):
    """A variance-preserving path from a table, as trained models carry it: `scheduler.alphas_cumprod`.

    Entry n of N belongs to t = (n + 1) / N. Between entries log(alpha / sigma) is linear in t, before the
    first sigma / alpha is, down to data at t = 0.

    Args:
        alphas_cumprod: alpha squared per step, falling, strictly between 0 and 1; at least two.

    Raises:
        ArgumentError, ArgumentTypeError: another table.

    Example:
        >>> path = Tabulated([0.9, 0.5, 0.1])
        >>> round(float(path.coefficients(2 / 3).alpha ** 2), 12)
        0.5
    """

    alphas_cumprod: tuple[float, ...]

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        expected = "at least 2 falling numbers between 0 and 1"
        try:
            table = tuple(float(value) for value in alphas_cumprod)
        except (TypeError, ValueError):
            raise ArgumentTypeError("alphas_cumprod", alphas_cumprod, expected) from None
        inside = all(0 < value < 1 for value in table)
        if len(table) < 2 or not inside or any(b >= a for a, b in pairwise(table)):
            raise ArgumentError("alphas_cumprod", alphas_cumprod, expected)
        object.__setattr__(self, "alphas_cumprod", table)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times = clock_times(t)
        level, rate = self._levels(times)
        alpha, sigma = torch.sigmoid(2 * level).sqrt(), torch.sigmoid(-2 * level).sqrt()
        alpha_rate, sigma_rate = rate * alpha * sigma**2, -rate * sigma * alpha**2
        # at t = 0 the ratio sigma / alpha is 0 and its slope finite
        start = times == 0
        slope = len(self.alphas_cumprod) * torch.exp(-self._knots(times)[0])
        return Coefficients(
            alpha, sigma, torch.where(start, 0.0, alpha_rate), torch.where(start, slope, sigma_rate)
        )

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """See `Path`."""
        return self._levels(clock_times(t))[0]

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        wanted = torch.as_tensor(half_log_snr, dtype=torch.float64)
        knots, count = self._knots(wanted), len(self.alphas_cumprod)
        index = torch.searchsorted(-knots, -wanted).clamp(1, count - 1)
        share = (wanted - knots[index - 1]) / (knots[index] - knots[index - 1])
        inside = ((index + share) / count).clamp(max=1)
        return torch.where(wanted > knots[0], torch.exp(knots[0] - wanted) / count, inside)

    def _knots(self, like: Tensor) -> Tensor:
        table = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=like.device)
        return (table.log() - torch.log1p(-table)) / 2

    def _levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        knots, count = self._knots(times), len(self.alphas_cumprod)
        place = times * count - 1
        index = place.detach().floor().clamp(0, count - 2).long()
        rise = knots[index + 1] - knots[index]
        early = place < 0
        level = torch.where(early, knots[0] - torch.log(times * count), knots[index] + (place - index) * rise)
        return level, torch.where(early, -1 / times, rise * count)
