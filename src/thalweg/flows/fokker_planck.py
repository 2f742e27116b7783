"""Whether a field moves densities as it says: residuals of the continuity and the score's own equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentTypeError, require_choice, require_integer
from thalweg.flows.field import Field
from thalweg.flows.path import Path, require_path
from thalweg.flows.prediction import Kind
from thalweg.flows.vector_field import VectorField, per_example, scores, state_and_times, vector_field
from thalweg.noise import Key, fresh_key, rademacher

DIVERGENCES = ("exact", "hutchinson")


def continuity_residual(
    velocity: Field | VectorField,
    log_density: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor | float,
    *,
    divergence: str = "exact",
    probes: int = 1,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """How far a velocity is from carrying a density along: d/dt log p + div U + U . grad log p.

    0 if and only if the flow of U has the marginals p_t. It does not see what the density does not see: a
    field r with div(p r) = 0 added to U, see `gauged`, leaves it as it is.

    Args:
        velocity: a field, of which the velocity is taken; or a function of x and t.
        log_density: log p_t(x), (batch,), a differentiable function of x, (batch, ...), and t, (batch,).
        x: (batch, ...).
        t: (batch,) or one for all.
        divergence: "exact", a product per feature, or "hutchinson", one per probe, unbiased.
        probes: of "hutchinson", at least 1.
        conditions: handed to the network.
        key: names the probes; None takes a fresh one.

    Returns:
        (batch,), in nats per unit of t.

    Example:
        >>> shrinking = lambda x, t: -x
        >>> normal = lambda x, t: -((x * t[:, None].exp()) ** 2).sum(1) / 2 + 2 * t
        >>> bool(continuity_residual(shrinking, normal, torch.randn(4, 2), 0.5).abs().max() < 1e-5)
        True
    """
    if not callable(log_density):
        raise ArgumentTypeError("log_density", log_density, "a function of x and t, such as an oracle's")
    kind: Kind | None = "velocity" if isinstance(velocity, Field) else None
    function = vector_field(velocity, kind, conditions, "velocity")
    x, times = state_and_times(x, t)
    directions = _directions(x, divergence, probes, key)
    rate = torch.func.jvp(lambda s: log_density(x, s), (times,), (torch.ones_like(times),))[1]
    score = scores(lambda at: log_density(at, times), x)[1]
    moved = function(x, times)
    spread = _divergence(lambda at: function(at, times), x, directions, divergence)
    found: Tensor = rate + spread + per_example(moved * score)
    return found


def score_residual(
    field: Field | VectorField,
    x: Tensor,
    t: Tensor | float,
    *,
    path: Path | None = None,
    divergence: str = "exact",
    probes: int = 1,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """How far a score is from evolving as one, without knowing any density.

    d/dt s - grad[(g^2 / 2) (div s + |s|^2) - f (x . s) - d f] for dx = f x dt + g dw; 0 for the exact score,
    and for no field whose rotation changes with time. Derivatives of second order along each direction:
    choose it for small networks, or with "hutchinson".

    Args:
        field: a field, of which the score is taken; or a function of x and t that is one, with `path`.
        x: (batch, ...).
        t: (batch,) or one for all, where the path's rates are finite and there is noise.
        path: the path of a bare function; None for the field's own.
        divergence: "exact" or "hutchinson", as in `continuity_residual`.
        probes: of "hutchinson".
        conditions: handed to the network.
        key: names the probes; None takes a fresh one.

    Returns:
        (batch, ...), in units of the score per unit of t.

    Paper:
        Lai, Takida, Murata, Uesaka, Mitsufuji, Ermon: FP-Diffusion: Improving Score-based Diffusion Models by
        Enforcing the Underlying Score Fokker-Planck Equation. ICML 2023.

    Example:
        >>> from thalweg.flows import VarianceExploding
        >>> spread = lambda t: 1 + (2 * t[:, None]) ** 2
        >>> score = lambda x, t: -x / spread(t)
        >>> found = score_residual(score, torch.randn(4, 2), 0.5, path=VarianceExploding(2.0))
        >>> bool(found.abs().max() < 1e-5)
        True
    """
    chosen = field.path if isinstance(field, Field) and path is None else path
    require_path("path", chosen)
    assert chosen is not None
    function = vector_field(field, None, conditions)
    x, times = state_and_times(x, t)
    directions = _directions(x, divergence, probes, key)
    drift, diffusion = (rate(times).to(x) for rate in (chosen.drift, chosen.squared_diffusion))

    def potential(at: Tensor) -> Tensor:
        score = function(at, times)
        spread = _divergence(lambda place: function(place, times), at, directions, divergence)
        grown = diffusion / 2 * (spread + per_example(score.square())) - drift * per_example(at * score)
        return grown.sum()

    rate = torch.func.jvp(lambda s: function(x, s), (times,), (torch.ones_like(times),))[1]
    found: Tensor = rate - torch.func.grad(potential)(x)
    return found


def _directions(x: Tensor, divergence: str, probes: int, key: Key | None) -> Tensor:
    require_choice("divergence", divergence, DIVERGENCES)
    if divergence == "exact":
        units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        return units.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    require_integer("probes", probes, 1)
    like = x.detach().new_empty((probes, *x.shape))
    return rademacher(like, fresh_key(x) if key is None else key)


def _divergence(function: Any, x: Tensor, directions: Tensor, divergence: str) -> Tensor:
    def along(direction: Tensor) -> Tensor:
        return per_example(direction * torch.func.jvp(function, (x,), (direction,))[1])

    parts: Tensor = torch.func.vmap(along)(directions)
    return parts.sum(0) if divergence == "exact" else parts.mean(0)
