"""The probability flow as an ordinary differential equation: solved to any accuracy, and the likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_floating, require_integer
from thalweg.flows.field import Field
from thalweg.flows.path import clock_times, readable
from thalweg.noise import Key, fresh_key, rademacher
from thalweg.rollouts.ode import Policy, integrate
from thalweg.rollouts.tableaus import Tableau

COORDINATES = ("time", "noise", "data")


def probability_flow(
    field: Field,
    start: Tensor,
    times: Tensor,
    *,
    method: str | Tableau = "heun",
    coordinates: str = "time",
    gradient: Policy | None = None,
    conditions: Mapping[str, Any] | None = None,
    steps_between: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> Tensor:
    """Move points along the probability flow by a solver of ODEs, with its ways of differentiating.

    Choose it over `sample` for adaptive steps, or for the policies of `thalweg.rollouts.integrate`:
    `Discrete`, `Reversible`, `Backsolve`. The equation may be written in other coordinates, which changes the
    solution's error, not the solution:

    | coordinates | the state is | against | its slope |
    | --- | --- | --- | --- |
    | "time" | x | t | velocity |
    | "noise" | x / alpha | sigma / alpha | noise: AdjointDPM, EDM; Euler is DDIM |
    | "data" | x / sigma | alpha / sigma | data: Euler is DDIM again |

    Args:
        field: the field.
        start: the state at `times[0]`, (batch, ...).
        times: in [0, 1], shape (n,), strictly falling or rising. "noise" needs some data at all of them
            (alpha above 0), "data" some noise.
        method: as in `integrate`.
        coordinates: as above.
        gradient: a policy of `integrate`; None for `Backprop()`.
        conditions: handed to the network.
        steps_between, rtol, atol: as in `integrate`.

    Returns:
        The states at all times, (n, batch, ...).

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
        NonFiniteError, UnsupportedError: as in `integrate`.

    Paper:
        Pan, Liao, Yan, Tan, Feng, Yan: AdjointDPM. ICLR 2024, arXiv 2307.10711.

    Example:
        >>> from thalweg.flows import Straight
        >>> from thalweg.rollouts import Discrete
        >>> field = Field(lambda x, t: x, Straight(), predicts="velocity")
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> path = probability_flow(field, x, torch.tensor([1.0, 0.0]), steps_between=20, gradient=Discrete())
        >>> path.shape
        torch.Size([2, 1, 2])
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    require_choice("coordinates", coordinates, COORDINATES)
    require_floating("start", start)
    require_floating("times", times)
    given = dict(conditions or {})
    options: dict[str, Any] = {
        "method": method, "gradient": gradient, "steps_between": steps_between, "rtol": rtol, "atol": atol,
    }  # fmt: skip
    if coordinates == "time":
        clock_times(times)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return field.predict("velocity", x, t, **given)

        return integrate(velocity, start, times, **options)
    alpha, sigma = field.path.coefficients(times)[:2]
    # what the state is divided by, and what is divided by it
    unit, other = (alpha, sigma) if coordinates == "noise" else (sigma, alpha)
    if readable(unit) and bool((unit <= 0).any()):
        lacking = "data" if coordinates == "noise" else "noise"
        mend = "Start or stop a little off that end, or use coordinates='time'."
        raise ArgumentError("times", times.tolist(), f"times at which there is some {lacking}", mend)
    sign = -1.0 if coordinates == "noise" else 1.0

    def slope(y: Tensor, s: Tensor) -> Tensor:
        t = field.path.time_at(sign * s.to(torch.float64).log())
        here = field.path.coefficients(t)
        scale = here.alpha if coordinates == "noise" else here.sigma
        return field.predict("noise" if coordinates == "noise" else "data", scale.to(y) * y, t, **given)

    clock = (other / unit).to(torch.promote_types(start.dtype, torch.float32))
    states = integrate(slope, start / unit[0].to(start), clock, **options)
    return states * unit.to(start).reshape(-1, *(1,) * start.ndim)


def log_likelihood(
    field: Field,
    data: Tensor,
    times: Tensor,
    *,
    trace: str = "exact",
    probes: int = 1,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    method: str | Tableau = "rk4",
    gradient: Policy | None = None,
    conditions: Mapping[str, Any] | None = None,
    steps_between: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    key: Key | None = None,
) -> Tensor:
    """The log-density that the probability flow gives to data, by the change of variables.

    log p(x at times[0]) = log prior(x at times[-1]) + the integral of the velocity's divergence.

    Args:
        field: the field.
        data: (batch, ...) at `times[0]`.
        times: rising in [0, 1], from data to where the prior holds; start a little above 0 where the velocity
            is infinite there.
        trace: "exact", one derivative per feature; or "hutchinson", unbiased, one per probe.
        probes: of "hutchinson", at least 1.
        log_prior: the log-density at the last time, of shape (batch,); None for independent normals of
            variance sigma^2 there.
        method, gradient, conditions, steps_between, rtol, atol: as in `probability_flow`; the divergence is a
            derivative itself, so `gradient` is for training through it.
        key: names the probes; None takes a fresh one.

    Returns:
        Shape (batch,), in nats. To evaluate only, call it under `torch.no_grad()`, or every step is kept.

    Paper:
        Song et al.: Score-Based Generative Modeling through Stochastic Differential Equations. ICLR 2021.

    Example:
        >>> from thalweg.flows import VarianceExploding
        >>> field = Field(lambda x, t: torch.zeros_like(x), VarianceExploding(2.0), predicts="noise")
        >>> found = log_likelihood(field, torch.zeros(1, 2), torch.tensor([0.1, 1.0]))
        >>> bool(torch.isclose(found.exp(), torch.tensor(1 / (8 * torch.pi))))
        True
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    require_floating("data", data)
    require_floating("times", times)
    clock_times(times)
    require_choice("trace", trace, ("exact", "hutchinson"))
    require_integer("probes", probes, 1)
    if times.ndim == 1 and len(times) > 1 and bool(times[-1] <= times[0]):
        raise ArgumentError("times", times.tolist(), "rising times, from data to the prior")
    given = dict(conditions or {})
    directions = _directions(data, trace, probes, key)

    def slope(state: tuple[Tensor, ...], t: Tensor) -> tuple[Tensor, ...]:
        x = state[0]
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            velocity = field.predict("velocity", at, t, **given)
            divergence = _divergence(velocity, at, directions, differentiable)
        if not differentiable:
            velocity, divergence = velocity.detach(), divergence.detach()
        return velocity, divergence

    start = (data, data.new_zeros(len(data)))
    states, totals = integrate(
        slope,
        start,
        times,
        method=method,
        gradient=gradient,
        steps_between=steps_between,
        rtol=rtol,
        atol=atol,
    )
    if log_prior is not None:
        return log_prior(states[-1]) + totals[-1]
    sigma = field.path.coefficients(times[-1]).sigma
    features = data[0].numel()
    square = states[-1].square().flatten(1).sum(1) / sigma**2
    normal = -(square + features * (2 * sigma.log() + math.log(2 * math.pi))) / 2
    return normal.to(data.dtype) + totals[-1]


def _directions(data: Tensor, trace: str, probes: int, key: Key | None) -> Tensor | None:
    """Probes of shape (probes, batch, ...), or None for all unit vectors."""
    if trace == "exact":
        return None
    like = data.detach().new_empty((probes, *data.shape))
    return rademacher(like, fresh_key(data) if key is None else key)


def _divergence(velocity: Tensor, at: Tensor, directions: Tensor | None, differentiable: bool) -> Tensor:
    if not velocity.requires_grad:
        return at.new_zeros(len(at))
    if directions is None:
        units = torch.eye(at[0].numel(), dtype=at.dtype, device=at.device)
        directions = units.reshape(-1, 1, *at.shape[1:]).expand(-1, *at.shape)
        mean = 1.0
    else:
        mean = 1 / len(directions)
    total = at.new_zeros(len(at))
    for direction in directions:
        (pulled,) = torch.autograd.grad(
            velocity, at, direction, create_graph=differentiable, retain_graph=True, allow_unused=True
        )
        if pulled is not None:
            total = total + (pulled * direction).flatten(1).sum(1)
    return total * mean
