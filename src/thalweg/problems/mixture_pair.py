"""Two Gaussian mixtures drawn independently: the velocity of rectified flow between them is known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.couplings import Pair, require_draw
from thalweg.flows.field import Field, batched_times
from thalweg.flows.path import Path, require_path
from thalweg.noise import Key
from thalweg.problems.gaussian_mixture import GaussianMixture


@dataclass(frozen=True, slots=True, eq=False)
class MixturePair:
    """Data from one mixture and a source from another, independent of each other.

    Choose it to test what is said of rectified flows between two sets of data, in closed form. On a line
    between the two the state is a mixture over pairs of components. Computed in float64 and returned in the
    dtype of x.

    Args:
        data: the law at t = 0.
        source: the law at t = 1, of the same dimension.

    Paper:
        Liu, Gong, Liu: Flow Straight and Fast. ICLR 2023, arXiv 2209.03003.

    Example:
        >>> from thalweg.flows import Straight
        >>> pair = MixturePair(GaussianMixture.on_circle(3), GaussianMixture.on_circle(2, radius=5.0))
        >>> pair.field(Straight())(torch.zeros(1, 2), 0.5).shape
        torch.Size([1, 2])
    """

    data: GaussianMixture
    source: GaussianMixture

    def __post_init__(self) -> None:
        for name in ("data", "source"):
            if not isinstance(getattr(self, name), GaussianMixture):
                raise ArgumentTypeError(name, getattr(self, name), "a GaussianMixture")
        if self.data.means.shape[1] != self.source.means.shape[1]:
            raise ArgumentError("source", self.source.means, f"dimension {self.data.means.shape[1]}")

    def draw(self, count: int, key: Key) -> Pair:
        """Independent pairs, as a `Coupling`."""
        require_draw(count, key)
        data = self.data.sample(count, key.at(call=2 * key.call))[0]
        return Pair(data, self.source.sample(count, key.at(call=2 * key.call + 1))[0])

    def law(self, t: float, path: Path) -> GaussianMixture:
        """The law of the state at a time, itself a mixture."""
        alpha, sigma = path.coefficients(t)[:2]
        means = alpha * self.data.means[:, None] + sigma * self.source.means
        covariances = alpha**2 * self.data.covariances[:, None] + sigma**2 * self.source.covariances
        weights = self.data.weights[:, None] * self.source.weights
        return GaussianMixture(weights.flatten(), means.flatten(0, 1), covariances.flatten(0, 1))

    def ends(self, x: Tensor, t: Tensor | float, path: Path) -> tuple[Tensor, Tensor]:
        """The mean data and the mean source given x at time t, each (batch, d).

        Args:
            x: (batch, d).
            t: (batch,) or one for all.
            path: the path; a state must have some spread at every such time.
        """
        d = self.data.means.shape[1]
        if require_floating("x", x).ndim != 2 or x.shape[1] != d:
            raise ArgumentError("x", x, f"shape (batch, {d})")
        state = x.to(torch.float64)
        found = path.coefficients(batched_times(state, t))
        alpha, sigma = (c[:, None, None, None] for c in found[:2])
        # over (batch, data component, source component, ...)
        mean = alpha * self.data.means[:, None] + sigma * self.source.means
        spread_data = alpha[..., None] * self.data.covariances[:, None]
        spread_source = sigma[..., None] * self.source.covariances
        total = alpha[..., None] * spread_data + sigma[..., None] * spread_source
        factor = torch.linalg.cholesky(total)
        away = (state[:, None, None] - mean)[..., None]
        pull = torch.cholesky_solve(away, factor)
        scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        density = -(away * pull).sum((-1, -2)) / 2 - scale - d * math.log(2 * math.pi) / 2
        joint = self.data.weights.log()[:, None] + self.source.weights.log() + density
        share = joint.flatten(1).softmax(1).reshape(joint.shape)[..., None]
        data = self.data.means[:, None] + (spread_data @ pull)[..., 0]
        source = self.source.means + (spread_source @ pull)[..., 0]
        return (share * data).sum((1, 2)), (share * source).sum((1, 2))

    def field(self, path: Path) -> Field:
        """The exact velocity, as a coupled field: its source need not be normal noise."""
        require_path("path", path)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            data, source = self.ends(x, t, path)
            rates = (c[:, None] for c in path.coefficients(batched_times(x.double(), t))[2:])
            alpha_rate, sigma_rate = rates
            return (alpha_rate * data + sigma_rate * source).to(x.dtype)

        return Field(velocity, path, "velocity", coupled=True)
