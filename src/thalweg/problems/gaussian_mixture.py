"""Gaussian mixtures: every field, flow, guidance and likelihood of their noising is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_finite, require_floating, require_integer
from thalweg.flows.field import Field, batched_times
from thalweg.flows.path import Path, clock_times, over, require_path
from thalweg.flows.prediction import Kind, require_kind
from thalweg.noise import Key, normal, uniform
from thalweg.rollouts.ode import integrate

UNCONDITIONAL = -1


@dataclass(frozen=True, slots=True, eq=False)
class GaussianMixture:
    """Data from a mixture of Gaussians: choose it to test a sampler, a loss or a diagnostic on the truth.

    Noised along any path it stays a mixture, so that predictions of every kind, densities, guidance and the
    probability flow have closed forms; for one component the flow itself does. The labels are the
    components. Computed in float64 and returned in the dtype of x.

    Args:
        weights: of the k components, positive with sum 1, shape (k,).
        means: shape (k, d).
        covariances: symmetric, positive semi-definite, shape (k, d, d); zero for single points.

    Raises:
        ArgumentError, ArgumentTypeError: other shapes or values.

    Example:
        >>> from thalweg.flows import Straight
        >>> mixture = GaussianMixture.on_circle(8, radius=2.0, deviation=0.2)
        >>> field = mixture.field(Straight(), "velocity")
        >>> field(torch.zeros(1, 2), 0.5, label=torch.tensor([3])).shape
        torch.Size([1, 2])
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            value = require_floating(name, getattr(self, name)).detach().to(torch.float64)
            require_finite(name, value)
            object.__setattr__(self, name, value)
        if self.means.ndim != 2 or 0 in self.means.shape:
            raise ArgumentError("means", self.means, "shape (k, d)")
        k, d = self.means.shape
        if self.weights.shape != (k,) or not bool((self.weights > 0).all()):
            raise ArgumentError("weights", self.weights, f"{k} positive weights")
        if abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ArgumentError("weights", float(self.weights.sum()), "weights with sum 1")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())
        if self.covariances.shape != (k, d, d):
            raise ArgumentError("covariances", self.covariances, f"shape ({k}, {d}, {d})")
        if not torch.allclose(self.covariances, self.covariances.mT):
            raise ArgumentError("covariances", self.covariances, "symmetric matrices")
        if bool((torch.linalg.eigvalsh(self.covariances) < -1e-9).any()):
            raise ArgumentError("covariances", self.covariances, "positive semi-definite matrices")

    @staticmethod
    def isotropic(
        means: Sequence[Sequence[float]] | Tensor, deviation: float, weights: Sequence[float] | None = None
    ) -> GaussianMixture:
        """Components of one standard deviation around given means, of equal weight unless said otherwise."""
        centres = torch.as_tensor(means, dtype=torch.float64)
        if centres.ndim != 2 or 0 in centres.shape:
            raise ArgumentError("means", centres, "shape (k, d)")
        if not 0 <= deviation < math.inf:
            raise ArgumentError("deviation", deviation, "a finite number of at least 0")
        k, d = centres.shape
        shares = torch.full((k,), 1 / k, dtype=torch.float64)
        if weights is not None:
            shares = torch.as_tensor(weights, dtype=torch.float64)
        square = torch.eye(d, dtype=torch.float64) * deviation**2
        return GaussianMixture(shares, centres, square.expand(k, d, d).clone())

    @staticmethod
    def on_circle(count: int, radius: float = 2.0, deviation: float = 0.2) -> GaussianMixture:
        """`count` equal components in the plane, evenly on a circle: the field's usual toy."""
        require_integer("count", count, 1)
        angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        return GaussianMixture.isotropic(radius * torch.stack([angles.cos(), angles.sin()], 1), deviation)

    @staticmethod
    def drawn(components: int = 3, dimensions: int = 2, seed: int = 0) -> GaussianMixture:
        """A mixture with random weights, means and full covariances, named by a seed."""
        require_integer("components", components, 1)
        require_integer("dimensions", dimensions, 1)
        shape = torch.empty(components, dimensions, dimensions, dtype=torch.float64)
        factors = normal(shape, Key(seed, call=0)) * 0.3
        covariances = factors @ factors.mT + 0.05 * torch.eye(dimensions, dtype=torch.float64)
        weights = uniform(shape[:, 0, 0], Key(seed, call=1)) + 0.5
        return GaussianMixture(
            weights / weights.sum(), 2 * normal(shape[:, 0], Key(seed, call=2)), covariances
        )

    def to(self, device: torch.device | str) -> GaussianMixture:
        """The same mixture on another device; states have to be where it is."""
        return GaussianMixture(*(part.to(device) for part in (self.weights, self.means, self.covariances)))

    def sample(self, count: int, key: Key) -> tuple[Tensor, Tensor]:
        """Draw data, shape (count, d), float64, and their labels, shape (count,)."""
        require_integer("count", count, 1)
        edges = self.weights.cumsum(0)[:-1]
        labels = torch.searchsorted(edges, uniform(self.means.new_empty(count), key.at(call=2 * key.call)))
        values, vectors = torch.linalg.eigh(self.covariances)
        spreads = vectors * values.clamp(min=0).sqrt()[:, None]
        drawn = normal(self.means.new_empty(count, self.means.shape[1]), key.at(call=2 * key.call + 1))
        return self.means[labels] + (spreads[labels] @ drawn[:, :, None])[:, :, 0], labels

    def log_density(self, x: Tensor, t: Tensor | float, path: Path, label: Tensor | None = None) -> Tensor:
        """log p_t(x), or log p_t(x | label), shape (batch,); differentiable in x and t."""
        joint = self._noised(x, t, path, label)[0]
        found = joint.logsumexp(1)
        if label is not None:
            found = found - self._log_weights(label, len(x)).logsumexp(1)
        return found.to(x.dtype)

    def label_log_probabilities(self, x: Tensor, t: Tensor | float, path: Path) -> Tensor:
        """log p_t(label | x), shape (batch, k): the exact classifier of noised data."""
        return self._noised(x, t, path, None)[0].log_softmax(1).to(x.dtype)

    def predict(
        self, kind: Kind, x: Tensor, t: Tensor | float, path: Path, label: Tensor | None = None
    ) -> Tensor:
        """The exact prediction, given the label where there is one; regular at both ends.

        Args:
            kind: as in `thalweg.flows.Field`.
            x: (batch, d).
            t: (batch,) or one for all.
            path: the noising path.
            label: (batch,), int64; -1 where there is none.
        """
        require_kind("kind", kind)
        joint, pulls = self._noised(x, t, path, label)
        alpha, sigma, alpha_rate, sigma_rate = (over(c, pulls[:, :, 0]) for c in self._path(x, t, path))
        shares = joint.softmax(1)[:, :, None]
        if kind == "score":
            return -(shares * pulls).sum(1).to(x.dtype)
        noise = sigma * (shares * pulls).sum(1)
        if kind == "noise":
            return noise.to(x.dtype)
        # the mean of the data given x, component by component
        spread = torch.einsum("kij,bkj->bki", self.covariances, pulls)
        data = (shares * (self.means + alpha[:, :, None] * spread)).sum(1)
        if kind == "data":
            return data.to(x.dtype)
        if kind == "velocity":
            return (alpha_rate * data + sigma_rate * noise).to(x.dtype)
        return (alpha * noise - sigma * data).to(x.dtype)

    def field(self, path: Path, predicts: Kind = "velocity") -> Field:
        """The exact field; it takes a condition `label`, shape (batch,), -1 for none."""
        require_path("path", path)

        def network(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return self.predict(predicts, x, t, path, label)

        return Field(network, path, predicts)

    def guided_field(self, path: Path, weight: float, predicts: Kind = "velocity") -> Field:
        """The exact field of classifier-free guidance, from the gradient of the exact classifier.

        Its score is that of p_t(x) p_t(label | x)^weight at each t; no noising of one law of the data is so.
        """

        def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            differentiable = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
            with torch.enable_grad():
                leaf = x if differentiable and x.requires_grad else x.detach().requires_grad_()
                chances = self.label_log_probabilities(leaf, t, path)
                chosen = chances.gather(1, label[:, None]).sum()
                (pull,) = torch.autograd.grad(chosen, leaf, create_graph=differentiable)
            return self.predict("score", x, t, path) + weight * pull

        require_path("path", path)
        return Field(network, path, "score").converted(predicts)

    def flow(
        self, x: Tensor, start: float, end: float, path: Path, label: Tensor | None = None, steps: int = 400
    ) -> Tensor:
        """Move points along the probability flow from one time to another.

        In closed form for one component, which `label` may pick out for all; else by the classical
        Runge-Kutta method in equal steps of time, so that the error falls with the fourth power of `steps`.

        Args:
            x: (batch, d) at time `start`.
            start: in [0, 1].
            end: in [0, 1].
            path: the noising path.
            label: (batch,), -1 for none.
            steps: of the solver, at least 1.

        Returns:
            The points at time `end`, (batch, d).
        """
        require_integer("steps", steps, 1)
        if start == end:
            return x
        if len(self.weights) == 1 or (label is not None and bool((label >= 0).all())):
            return self._gaussian_flow(x, start, end, path, label)
        times = torch.tensor([start, end], dtype=torch.float64, device=x.device)

        def slope(state: Tensor, t: Tensor) -> Tensor:
            return self.predict("velocity", state, t, path, label)

        found = integrate(slope, x.to(torch.float64), times, method="rk4", steps_between=steps)
        return found[-1].to(x.dtype)

    def _gaussian_flow(self, x: Tensor, start: float, end: float, path: Path, label: Tensor | None) -> Tensor:
        chosen = (
            torch.zeros(len(x), dtype=torch.long, device=x.device) if label is None else label.clamp(min=0)
        )
        values, vectors = torch.linalg.eigh(self.covariances)
        first, last = (path.coefficients(time) for time in (start, end))
        spread = [(c.alpha**2 * values.clamp(min=0) + c.sigma**2).sqrt() for c in (first, last)]
        away = (x.to(torch.float64) - first.alpha * self.means[chosen])[:, None] @ vectors[chosen]
        moved = (away * (spread[1] / spread[0])[chosen][:, None]) @ vectors[chosen].mT
        ended: Tensor = last.alpha * self.means[chosen] + moved[:, 0]
        return ended.to(x.dtype)

    def _path(self, x: Tensor, t: Tensor | float, path: Path) -> tuple[Tensor, ...]:
        times = t if isinstance(t, Tensor) and t.ndim else batched_times(x.to(torch.float64), t)
        return tuple(path.coefficients(clock_times(times)))

    def _noised(
        self, x: Tensor, t: Tensor | float, path: Path, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log weight times density, (batch, k), and covariance^-1 (x - mean), (batch, k, d)."""
        d = self.means.shape[1]
        if require_floating("x", x).ndim != 2 or x.shape[1] != d:
            raise ArgumentError("x", x, f"shape (batch, {d})")
        alpha, sigma, _, _ = (c[:, None, None] for c in self._path(x, t, path))
        values, vectors = torch.linalg.eigh(self.covariances)
        variances = alpha**2 * values.clamp(min=0) + sigma**2
        away = torch.einsum("kji,bkj->bki", vectors, x.to(torch.float64)[:, None] - alpha * self.means)
        densities = -((away**2 / variances + variances.log()).sum(2) + d * math.log(2 * math.pi)) / 2
        joint = self._log_weights(label, len(x)) + densities
        return joint, torch.einsum("kij,bkj->bki", vectors, away / variances)

    def _log_weights(self, label: Tensor | None, batch: int) -> Tensor:
        k = len(self.weights)
        if label is None:
            return self.weights.log().expand(batch, k)
        if not isinstance(label, Tensor) or label.dtype != torch.long:
            raise ArgumentTypeError("label", label, "an int64 tensor")
        if label.shape != (batch,):
            raise ArgumentError("label", label, f"one label per example, shape ({batch},)")
        if bool(((label < UNCONDITIONAL) | (label >= k)).any()):
            raise ArgumentError("label", label.tolist(), f"labels below {k}, or -1 for none")
        allowed = (label[:, None] == torch.arange(k, device=label.device)) | (label[:, None] == UNCONDITIONAL)
        return torch.where(allowed, self.weights.log(), -math.inf)
