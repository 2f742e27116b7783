"""Noising as steepest descent of a free energy in the space of densities: Wasserstein gradient flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.path import Path, over, require_path
from thalweg.flows.vector_field import per_example, scores


@dataclass(frozen=True, slots=True, eq=False)
class FreeEnergy:
    """A free energy of a density and how fast it falls.

    Args:
        value: F, in nats.
        slope: dF / d(clock) = - E|grad (dF / drho)|^2 along the steepest descent, never positive.
        value_error: the standard error of `value` over the samples; 0 under a quadrature.
        slope_error: likewise.
    """

    value: Tensor
    slope: Tensor
    value_error: Tensor
    slope_error: Tensor


def free_energy(
    log_density: Callable[[Tensor], Tensor],
    samples: Tensor,
    *,
    variance: float = 1.0,
    weights: Tensor | None = None,
) -> FreeEnergy:
    """The free energy that noising lowers, and its slope, from a density that can be evaluated.

    The Wasserstein gradient flow of F moves points by - grad (dF / drho), `descent_velocity`:

    | variance | F | velocity | the noising of |
    | --- | --- | --- | --- |
    | v | KL(rho, N(0, v I)) | - (x / v + grad log rho) | variance-preserving paths, v = 1 |
    | infinity | E log rho, the negative entropy | - grad log rho | variance-exploding paths |

    Its clock runs `descent_clock` times as fast as that of a path: dF/dt = `descent_clock` times `slope`.

    Args:
        log_density: log rho(x), (batch,), differentiable.
        samples: of rho, (batch, ...); or the nodes of a quadrature.
        variance: v, above 0; `math.inf` for the entropy. `reference_variance` gives a path's.
        weights: of the quadrature, rho included, (batch,); None for samples.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Jordan, Kinderlehrer, Otto: The Variational Formulation of the Fokker-Planck Equation. SIAM Journal on
        Mathematical Analysis, 1998. Vuong, McCann, Santos, Lin: Are We Really Learning the Score Function?
        TMLR 2025, arXiv 2509.00336.

    Example:
        >>> x = torch.randn(1000, 2)
        >>> normal = lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi)
        >>> found = free_energy(normal, x)
        >>> bool(found.value.abs() < 1e-6), bool(found.slope.abs() < 1e-6)
        (True, True)
    """
    if not callable(log_density):
        raise ArgumentTypeError("log_density", log_density, "a function of x")
    _require_variance(variance)
    if require_floating("samples", samples).ndim < 2 or 0 in samples.shape:
        raise ArgumentError("samples", samples, "a batch of states with features, shape (batch, ...)")
    values, score = scores(log_density, samples)
    if values.shape != (len(samples),):
        raise ArgumentError("log_density", values, f"one number per sample, shape ({len(samples)},)")
    features = samples[0].numel()
    if not math.isinf(variance):
        reference = per_example(samples.square()) / variance + features * math.log(2 * math.pi * variance)
        values = values + reference / 2
    slopes = -per_example(descent_velocity(score, samples, variance=variance).square())
    if weights is None:
        root = math.sqrt(len(samples))
        return FreeEnergy(values.mean(), slopes.mean(), values.std() / root, slopes.std() / root)
    if require_floating("weights", weights).shape != values.shape or not bool((weights >= 0).all()):
        raise ArgumentError("weights", weights, f"one weight per node, at least 0, {tuple(values.shape)}")
    nothing = torch.zeros_like(values.sum())
    return FreeEnergy((weights * values).sum(), (weights * slopes).sum(), nothing, nothing)


def descent_velocity(score: Tensor, x: Tensor, *, variance: float = 1.0) -> Tensor:
    """- grad (dF / drho), with which the steepest descent of `free_energy` moves points.

    Times `descent_clock` it is the velocity of a path's probability flow: training a field on noised data is
    matching this velocity, sampling is running the flow backwards, and only its gradient part is known from
    the marginals.

    Args:
        score: grad log rho at x, (batch, ...).
        x: likewise.
        variance: as in `free_energy`.

    Example:
        >>> descent_velocity(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        tensor([[-3.]])
    """
    _require_variance(variance)
    if require_floating("score", score).shape != require_floating("x", x).shape:
        raise ArgumentError("score", score, f"the shape of x, {tuple(x.shape)}")
    return -score - x / variance


def descent_clock(path: Path, t: Tensor | float) -> Tensor:
    """How fast a path's noising descends, per unit of t: g^2 / 2, float64.

    Example:
        >>> from thalweg.flows import VarianceExploding
        >>> descent_clock(VarianceExploding(2.0), 0.5)
        tensor(2., dtype=torch.float64)
    """
    require_path("path", path)
    return path.squared_diffusion(t) / 2


def reference_variance(path: Path, t: Tensor | float) -> Tensor:
    """The variance of the normal law that noising heads for at a time: - g^2 / (2 f), float64.

    1 on variance-preserving paths, infinite on exploding ones, where the free energy is the negative entropy.
    On others it depends on t: at each time noising descends a free energy, and not the same one.

    Example:
        >>> from thalweg.flows import Cosine, Straight, VarianceExploding
        >>> [round(float(reference_variance(path, 0.5)), 6) for path in (Cosine(), Straight())]
        [1.0, 0.5]
        >>> reference_variance(VarianceExploding(2.0), 0.5)
        tensor(inf, dtype=torch.float64)
    """
    require_path("path", path)
    # without the minus sign of 0, whose quotient would be minus infinity
    return path.squared_diffusion(t) / (2 * path.drift(t).abs())


def matched_velocity(path: Path, score: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """The velocity of a path's probability flow as steepest descent: clock times `descent_velocity`.

    f x - (g^2 / 2) score for any path: what flow matching regresses on, with the exact score.

    Args:
        path: the noising path.
        score: grad log p_t at x, (batch, ...).
        x: likewise.
        t: (batch,) or one for all.

    Example:
        >>> from thalweg.flows import VarianceExploding
        >>> matched_velocity(VarianceExploding(2.0), torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 0.5)
        tensor([[2.]])
    """
    require_path("path", path)
    drift, rate = path.drift(t), path.squared_diffusion(t)
    return over(drift, x) * x - over(rate, x) / 2 * score


def _require_variance(variance: object) -> None:
    if isinstance(variance, bool) or not isinstance(variance, int | float):
        raise ArgumentTypeError("variance", variance, "a number above 0, or math.inf")
    if not variance > 0:
        raise ArgumentError("variance", variance, "a number above 0, or math.inf")
