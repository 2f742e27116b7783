"""Deterministic samplers, each as its formula: Euler, Heun, DPM-Solver, Adams-Bashforth.

In all formulas p is the start of the step and q its end, D the predicted data, E the noise, U the velocity,
and H = half_log_snr(q) - half_log_snr(p), which is positive when denoising.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thalweg.errors import ArgumentError, require_integer
from thalweg.flows.linear_steps import Prediction, Step, Sum


@dataclass(frozen=True, slots=True)
class Euler:
    """x + (q - p) U, order 1, one call: the plain solver; exact in one step for straight flows.

    Example:
        >>> import torch
        >>> from thalweg.flows import Field, Straight, sample
        >>> field = Field(lambda x, t: -2 * x.new_ones(x.shape), Straight())
        >>> sample(field, torch.zeros(1, 1), [1.0, 0.0], solver=Euler())
        tensor([[2.]])
    """

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        velocity = step.predict(step.x, step.start).of("velocity")
        return step.x + (step.end.time - step.start.time) * velocity


@dataclass(frozen=True, slots=True)
class Heun:
    """The mean of the velocities at both ends, order 2, two calls; an Euler step where it ends on data.

    Example:
        >>> Heun().memory
        0
    """

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        length = step.end.time - step.start.time
        first = step.predict(step.x, step.start).of("velocity")
        ahead = step.x + length * first
        if step.end.sigma == 0:
            return ahead
        return step.x + (length / 2) * (first + step.predict(ahead, step.end).of("velocity"))


@dataclass(frozen=True, slots=True)
class RungeKutta4:
    """The classical method on the velocity, order 4, four calls: for reference solutions of smooth fields.

    Example:
        >>> RungeKutta4().memory
        0
    """

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        length = step.end.time - step.start.time
        middle = type(step.start).of(step.path, (step.start.time + step.end.time) / 2)
        first = step.predict(step.x, step.start).of("velocity")
        second = step.predict(step.x + (length / 2) * first, middle).of("velocity")
        third = step.predict(step.x + (length / 2) * second, middle).of("velocity")
        last = step.predict(step.x + length * third, step.end).of("velocity")
        return step.x + (length / 6) * (first + 2 * second + 2 * third + last)


@dataclass(frozen=True, slots=True)
class DPMSolver2:
    """DPM-Solver-2: the noise at the middle of the step in half_log_snr, order 2, two calls.

    A step of DDIM where one end has no noise or no data.

    Paper:
        Lu, Zhou, Bao, Chen, Li, Zhu: DPM-Solver. NeurIPS 2022.

    Example:
        >>> DPMSolver2().memory
        0
    """

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        p, q = step.start, step.end
        first = step.predict(step.x, p)
        if q.sigma == 0 or p.alpha == 0 or q.alpha == 0 or p.sigma == 0:
            return ddim(first, q.alpha, q.sigma)
        length = q.half_log_snr - p.half_log_snr
        middle = step.point_at(p.half_log_snr + length / 2)
        halfway = (middle.alpha / p.alpha) * step.x - middle.sigma * math.expm1(length / 2) * first.of(
            "noise"
        )
        noise = step.predict(halfway, middle).of("noise")
        return (q.alpha / p.alpha) * step.x - q.sigma * math.expm1(length) * noise


@dataclass(frozen=True, slots=True)
class AdamsBashforth:
    """Adams-Bashforth on the noise against sigma / alpha: order 1 to 4, one call; LMS and rho-AB-DEIS.

    The first steps are of lower order. Order 1 is DDIM.

    Args:
        order: how many predictions are combined, 1 to 4.

    Paper:
        Zhang, Chen: Fast Sampling of Diffusion Models with Exponential Integrator. ICLR 2023.

    Example:
        >>> AdamsBashforth(order=3).memory
        2
    """

    order: int = 2

    def __post_init__(self) -> None:
        require_integer("order", self.order, 1)
        if self.order > 4:
            raise ArgumentError("order", self.order, "an order of 1 to 4")

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return self.order - 1

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        p, q = step.start, step.end
        now = step.predict(step.x, p)
        if p.alpha == 0 or q.alpha == 0:
            return ddim(now, q.alpha, q.sigma)
        noises = [now.of("noise"), *step.remembered]
        if self.order > 1:
            step.remember(noises[0])
        # a point without data lies at infinity, and the step from it remembered nothing
        earlier = [step.points[step.index - lag] for lag in range(len(noises))]
        nodes = [point.ratio for point in earlier if point.alpha]
        change = [
            noise * weight for noise, weight in zip(noises, lagrange_integrals(nodes, p.ratio, q.ratio))
        ]
        total = (1 / p.alpha) * step.x
        for part in change:
            total = total + part
        return q.alpha * total


def ddim(now: Prediction, alpha: float, sigma: float) -> Sum:
    """alpha D + sigma E: the step that is exact if the prediction does not change on the way."""
    if sigma == 0:
        return alpha * now.of("data")
    if alpha == 0:
        return sigma * now.of("noise")
    return alpha * now.of("data") + sigma * now.of("noise")


def lagrange_integrals(nodes: Sequence[float], low: float, high: float) -> list[float]:
    """The integral from `low` to `high` of each Lagrange polynomial on some nodes.

    Example:
        >>> lagrange_integrals([1.0, 0.0], 1.0, 2.0)
        [1.5, -0.5]
    """
    # in units of the step, so that powers neither grow nor vanish
    unit = high - low
    places = [(node - low) / unit for node in nodes]
    found = []
    for index, own in enumerate(places):
        polynomial = [1.0]
        for other in (place for number, place in enumerate(places) if number != index):
            shifted = [0.0, *polynomial]
            for power, coefficient in enumerate(polynomial):
                shifted[power] -= other * coefficient
            polynomial = [coefficient / (own - other) for coefficient in shifted]
        found.append(
            unit * math.fsum(coefficient / (power + 1) for power, coefficient in enumerate(polynomial))
        )
    return found
