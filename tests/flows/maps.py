"""Exact flow maps of one Gaussian, N(m, c^2 I), in every parametrisation: nothing is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.flows import ConsistencyModel, ConsistencyTrajectory, MeanFlow, Path
from thalweg.problems import GaussianMixture

CENTRE, DEVIATION = (1.5, -0.5), 0.7
GAUSSIAN = GaussianMixture.isotropic([CENTRE], DEVIATION)


def flow(x: Tensor, s: Tensor, t: Tensor, path: Path) -> Tensor:
    """Psi_{s->t}(x) = a_t m + (nu_t / nu_s) (x - a_s m) with nu = sqrt(a^2 c^2 + sigma^2), by example."""
    centre = torch.tensor(CENTRE, dtype=x.dtype)
    (a, b), (p, q) = (tuple(c[:, None] for c in path.coefficients(time)[:2]) for time in (s, t))
    ratio = ((p * DEVIATION) ** 2 + q**2).sqrt() / ((a * DEVIATION) ** 2 + b**2).sqrt()
    return p * centre + ratio * (x - a * centre)


def velocity(x: Tensor, t: Tensor, path: Path) -> Tensor:
    """The exact velocity at times by example."""
    return GAUSSIAN.predict("velocity", x, t, path)


def consistency(path: Path, least: float = 0.0, sigma_data: float = 0.5) -> ConsistencyModel:
    """The network that makes a consistency model exact, by solving its formula for the output."""

    def network(seen: Tensor, s: Tensor) -> Tensor:
        unit = ConsistencyModel(lambda x, s: torch.ones_like(x), path, least, sigma_data)
        blank = ConsistencyModel(lambda x, s: torch.zeros_like(x), path, least, sigma_data)
        a, b = path.coefficients(s)[:2]
        x = seen * ((b**2 + (sigma_data * a) ** 2).sqrt()[:, None])
        skipped = blank.to_data(x, s)
        out = unit.to_data(x, s) - skipped
        wanted = flow(x, s, torch.full_like(s, least), path)
        return torch.where(out == 0, 0.0, (wanted - skipped) / torch.where(out == 0, 1.0, out))

    return ConsistencyModel(network, path, least, sigma_data)


def trajectory(path: Path) -> ConsistencyTrajectory:
    """g(x, s, t) = (Psi - kept x) / share, and the data on the diagonal."""

    def network(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        (a, b), (p, q) = (tuple(c[:, None] for c in path.coefficients(time)[:2]) for time in (s, t))
        share = p - a * q / b
        inside = (flow(x, s, t, path) - q / b * x) / torch.where(share == 0, 1.0, share)
        return torch.where(share == 0, GAUSSIAN.predict("data", x, s, path), inside)

    return ConsistencyTrajectory(network, path)


def mean_flow(path: Path) -> MeanFlow:
    """h(x, s, t) = (Psi - x) / (t - s), and the velocity on the diagonal."""

    def network(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        length = (t - s)[:, None]
        inside = (flow(x, s, t, path) - x) / torch.where(length == 0, 1.0, length)
        return torch.where(length == 0, velocity(x, s, path), inside)

    return MeanFlow(network, path)


class Net(nn.Module):
    """A small network of x and any number of times."""

    def __init__(self, times: int, features: int = 2, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(features + times, width), nn.Tanh(), nn.Linear(width, features)
        ).double()

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        """Concatenate and apply."""
        found: Tensor = self.inner(torch.cat([x, *(t[:, None].to(x) for t in times)], 1))
        return found
