"""Samplers that can add noise on the way: DDIM and ancestral, DPM-Solver++, EDM's churn, Euler-Maruyama.

Letters as in `thalweg.flows.solvers`; z is fresh standard normal noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows.linear_steps import Step, Sum
from thalweg.flows.solvers import ddim


@dataclass(frozen=True, slots=True)
class DDIM:
    """alpha_q D + sqrt(sigma_q^2 - n^2) E + n z, order 1, one call: the default.

    With eta = 0 it is the exponential Euler method, exact if the predicted data do not change. With eta = 1
    it is ancestral sampling: of DDPM on variance-preserving paths, of k-diffusion (Euler ancestral) where
    alpha = 1. n^2 = eta^2 (sigma_q / sigma_p)^2 (sigma_p^2 - (alpha_p / alpha_q)^2 sigma_q^2).

    Args:
        eta: the share of fresh noise, at least 0; above 1 only where sigma_q^2 >= n^2.

    Paper:
        Song, Meng, Ermon: Denoising Diffusion Implicit Models. ICLR 2021.

    Example:
        >>> DDIM(eta=1.0)
        DDIM(eta=1.0)
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        require_share("eta", self.eta)

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        p, q = step.start, step.end
        now = step.predict(step.x, p)
        if self.eta == 0 or q.sigma == 0:
            return ddim(now, q.alpha, q.sigma)
        require_denoising(step)
        fresh = (self.eta * q.sigma / p.sigma) ** 2 * (p.sigma**2 - (p.alpha * q.sigma / q.alpha) ** 2)
        kept = q.sigma**2 - fresh
        if kept < 0:
            raise ArgumentError("eta", self.eta, f"no more noise than there is at t = {q.time}")
        return ddim(now, q.alpha, math.sqrt(kept)) + math.sqrt(fresh) * step.noise()


@dataclass(frozen=True, slots=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M), order 2, one call: choose it for few steps. eta > 0 is its stochastic variant.

    x e^(-eta H) sigma_q / sigma_p - alpha_q expm1(-(1 + eta) H) D' + sigma_q sqrt(1 - e^(-2 eta H)) z with
    D' = D + (D - D_before) H / (2 H_before). The first step, and one that ends on data, is of order 1.

    Args:
        eta: 0 for the probability flow, 1 for the reverse diffusion.

    Paper:
        Lu, Zhou, Bao, Chen, Li, Zhu: DPM-Solver++. arXiv 2211.01095, 2022.

    Example:
        >>> DPMSolverPP2M().memory
        1
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        require_share("eta", self.eta)

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 1

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        p, q = step.start, step.end
        data = step.predict(step.x, p).of("data")
        step.remember(data)
        if q.sigma == 0:
            return q.alpha * data
        length = q.half_log_snr - p.half_log_snr
        mean = data
        if step.remembered:
            before = p.half_log_snr - step.points[step.index - 1].half_log_snr
            mean = data + (data - step.remembered[0]) * (length / before / 2)
        if self.eta == 0:
            return (q.sigma / p.sigma) * step.x - q.alpha * math.expm1(-length) * mean
        require_denoising(step)
        decay = self.eta * length
        kept = (q.sigma / p.sigma) * math.exp(-decay) * step.x
        fresh = q.sigma * math.sqrt(-math.expm1(-2 * decay))
        return kept - q.alpha * math.expm1(-length - decay) * mean + fresh * step.noise()


@dataclass(frozen=True, slots=True)
class EDM:
    """Heun on x / alpha against sigma / alpha, order 2, two calls, with EDM's churn.

    Churn adds noise before a step and takes it away again. Levels are sigma / alpha. A step that ends on
    data is an Euler step.

    Args:
        churn: how much noise is added over all steps; 0 for the deterministic sampler.
        least: churn at levels from here,
        most: up to here.
        inflation: the standard deviation of the added noise, 1 in theory.

    Paper:
        Karras, Aittala, Aila, Laine: Elucidating the Design Space of Diffusion-Based Generative Models.
        NeurIPS 2022, algorithm 2.

    Example:
        >>> EDM(churn=40.0, least=0.05, most=50.0, inflation=1.003).memory
        0
    """

    churn: float = 0.0
    least: float = 0.0
    most: float = math.inf
    inflation: float = 1.0

    def __post_init__(self) -> None:
        require_share("churn", self.churn)
        require_share("inflation", self.inflation)
        if not 0 <= self.least < self.most:
            raise ArgumentError("most", self.most, f"a level above least, {self.least}")

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        p, q = step.start, step.end
        if p.alpha == 0:
            raise ArgumentError(
                "times", p.time, "a first time with some data", "Start a little before t = 1."
            )
        state = (1 / p.alpha) * step.x
        gain = min(self.churn / step.steps, math.sqrt(2) - 1) if self.least <= p.ratio <= self.most else 0.0
        if gain > 0:
            require_denoising(step)
            level = p.ratio * (1 + gain)
            more = step.point_at(-math.log(level))
            if abs(more.ratio / level - 1) > 1e-6:
                mend = "Start a little later, or set most below the first level."
                raise ArgumentError(
                    "churn", self.churn, f"no more noise than at the path's end, {more.ratio}", mend
                )
            fresh = self.inflation * math.sqrt(level**2 - p.ratio**2)
            state, p = state + fresh * step.noise(), more
        first = step.predict(p.alpha * state, p).of("noise")
        ahead = state + (q.ratio - p.ratio) * first
        if q.sigma > 0:
            last = step.predict(q.alpha * ahead, q).of("noise")
            ahead = state + ((q.ratio - p.ratio) / 2) * (first + last)
        return q.alpha * ahead


@dataclass(frozen=True, slots=True)
class EulerMaruyama:
    """Euler-Maruyama on dx = [f x - (1 + eta^2) / 2 g^2 S] dt + eta g dw, backwards; one call.

    Of order 1 in law. All eta have the same marginals: 0 is the probability flow, 1 the reverse diffusion of
    score-based models.

    Args:
        eta: at least 0.

    Paper:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole: Score-Based Generative Modeling through Stochastic
        Differential Equations. ICLR 2021.

    Example:
        >>> EulerMaruyama(eta=0.5).memory
        0
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        require_share("eta", self.eta)

    @property
    def memory(self) -> int:
        """See `Solver`."""
        return 0

    def advance(self, step: Step) -> Sum:
        """See `Solver`."""
        p, length = step.start, step.end.time - step.start.time
        now = step.predict(step.x, p)
        moved = step.x + length * now.of("velocity")
        if self.eta == 0:
            return moved
        require_denoising(step)
        if p.alpha == 0:
            raise ArgumentError(
                "times", p.time, "a first time with some data", "Start a little before t = 1."
            )
        square = 2 * p.sigma * (p.sigma_rate - p.sigma * p.alpha_rate / p.alpha)
        pull = length * self.eta**2 * square / (2 * p.sigma) * now.of("noise")
        return moved + pull + self.eta * math.sqrt(-length * square) * step.noise()


def require_denoising(step: Step) -> None:
    """Refuse to add noise on the way from data to noise."""
    if step.end.time > step.start.time:
        mend = "From data to noise take a deterministic solver, or path.noised."
        raise ArgumentError("times", [step.start.time, step.end.time], "falling times", mend)


def require_share(argument: str, value: object) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(argument, value, "a finite number of at least 0")
    if not 0 <= value < math.inf:
        raise ArgumentError(argument, value, "a finite number of at least 0")
