"""What a noising path is: how much data and how much noise there is at each time, and changes of both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.errors import ArgumentError, ArgumentTypeError

Curve = Callable[[Tensor], Tensor]
_HALVINGS = 80
_CHECKED = 257


class Coefficients(NamedTuple):
    """A path at some times, float64, each entry of the times' shape.

    Args:
        alpha: the share of data.
        sigma: the share of noise.
        alpha_rate: the derivative of `alpha` with respect to time.
        sigma_rate: that of `sigma`.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor


class Path(ABC):
    """x_t = alpha(t) data + sigma(t) noise, with independent standard normal noise.

    Time runs from t = 0, data, to t = 1, noise, for every path; a network that counts otherwise is told so
    in its `Field`. To add a path, subclass with `coefficients`, and with `half_log_snr` and `time_at` where
    they are known in closed form. Paths are frozen, comparable and hashable, and hold no tensors.

    Example:
        >>> from thalweg.flows import Straight
        >>> path = Straight()
        >>> path.coefficients(torch.tensor(0.25)).alpha
        tensor(0.7500, dtype=torch.float64)
        >>> bool(torch.isclose(path.time_at(path.half_log_snr(0.3)), torch.tensor(0.3).double()))
        True
    """

    __slots__ = ()

    @abstractmethod
    def coefficients(self, t: Tensor | float) -> Coefficients:
        """The path and its rates at times in [0, 1] of any shape; a rate may be infinite at an end."""

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha / sigma), half the log of the signal-to-noise ratio; infinite where one of them is 0."""
        found = self.coefficients(t)
        return found.alpha.log() - found.sigma.log()

    def half_log_snr_rate(self, t: Tensor | float) -> Tensor:
        """The derivative of `half_log_snr` with respect to time, nowhere positive."""
        found = self.coefficients(t)
        return found.alpha_rate / found.alpha - found.sigma_rate / found.sigma

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """The time at which `half_log_snr` has a value; the end that is nearer, beyond the ends."""
        wanted = torch.as_tensor(half_log_snr, dtype=torch.float64)
        return bisected(self.half_log_snr, wanted)

    def drift(self, t: Tensor | float) -> Tensor:
        """f in dx = f x dt + g dw, the diffusion that has this path's marginals: alpha' / alpha."""
        found = self.coefficients(t)
        return found.alpha_rate / found.alpha

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g squared in dx = f x dt + g dw: 2 sigma sigma' - 2 f sigma^2."""
        found = self.coefficients(t)
        rate = found.sigma_rate - found.sigma * found.alpha_rate / found.alpha
        return 2 * found.sigma * rate

    def noised(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t for data and noise of shape (batch, ...) and times (batch,) or one for all."""
        found = self.coefficients(t)
        return over(found.alpha, data) * data + over(found.sigma, data) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """dx_t / dt for this data and noise: what flow matching regresses on."""
        found = self.coefficients(t)
        return over(found.alpha_rate, data) * data + over(found.sigma_rate, data) * noise


def over(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient per example, or one for all, in the dtype of `like` and broadcast over its features."""
    cast = coefficient.to(device=like.device, dtype=like.dtype)
    return cast if cast.ndim == 0 else cast.reshape(-1, *(1,) * (like.ndim - 1))


def clock_times(t: Tensor | float) -> Tensor:
    """Times in float64; refused outside [0, 1] where looking at them costs no wait for a device."""
    if isinstance(t, bool) or not isinstance(t, Tensor | float | int):
        raise ArgumentTypeError("t", t, "a number in [0, 1], or a tensor of them")
    times = t.to(torch.float64) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if readable(times) and times.numel():
        low, high = times.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ArgumentError("t", t, "times in [0, 1]: 0 is data, 1 is noise")
    return times


def readable(tensor: Tensor) -> bool:
    """Whether looking at values is free: on the CPU, outside of fake tensors, compilation and transforms."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def bisected(falling: Curve, wanted: Tensor) -> Tensor:
    """Where a falling function on [0, 1] takes values; the nearer end where it does not."""
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    with torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = falling(middle) > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=wanted.device)
        first, last = falling(ends)
        return torch.where(wanted >= first, 0.0, torch.where(wanted <= last, 1.0, (low + high) / 2))


def with_rate(curve: Curve, t: Tensor) -> tuple[Tensor, Tensor]:
    """A function of time and its derivative, also where the function is constant."""

    def called(times: Tensor) -> Tensor:
        value = curve(times)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        # a constant of another shape has no tangent of its own
        return value.to(times.dtype) + torch.zeros_like(times)

    found = torch.func.jvp(called, (t,), (torch.ones_like(t),))
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Custom(Path):
    """A path from two functions of time; choose it where none of the named ones is yours.

    Rates come by forward-mode differentiation, the inverse by bisection.

    Args:
        alpha: the share of data, a function of a float64 tensor of times; alpha(0) = 1 is not required.
        sigma: the share of noise, likewise, at least 0.

    Raises:
        ArgumentTypeError: not functions.
        ArgumentError: negative shares, or a signal-to-noise ratio that does not fall from 0 to 1.

    Example:
        >>> path = Custom(lambda t: 1 - t**2, lambda t: t)
        >>> path.coefficients(0.5).alpha_rate
        tensor(-1., dtype=torch.float64)
    """

    alpha: Curve
    sigma: Curve

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            if not callable(getattr(self, name)):
                raise ArgumentTypeError(name, getattr(self, name), "a function of time")
        require_falling(self, "alpha")

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times = clock_times(t)
        alpha, alpha_rate = with_rate(self.alpha, times)
        sigma, sigma_rate = with_rate(self.sigma, times)
        return Coefficients(alpha, sigma, alpha_rate, sigma_rate)


@dataclass(frozen=True, slots=True)
class Retimed(Path):
    """The same points in the same order at other times: choose it to move the steps to where they matter.

    Args:
        path: the path.
        clock: `clock(r)` is the time of `path` at the new time r: rising, from 0 at 0 to 1 at 1.

    Raises:
        ArgumentError: a clock with other ends, or one that does not rise.

    Example:
        >>> from thalweg.flows import Straight
        >>> shifted = Retimed(Straight(), shifted_clock(3.0))
        >>> shifted.coefficients(0.5).sigma
        tensor(0.7500, dtype=torch.float64)
    """

    path: Path
    clock: Curve

    def __post_init__(self) -> None:
        require_path("path", self.path)
        if not callable(self.clock):
            raise ArgumentTypeError("clock", self.clock, "a function of time")
        ends = with_rate(self.clock, torch.tensor([0.0, 1.0], dtype=torch.float64))[0]
        if not bool((ends - torch.tensor([0.0, 1.0])).abs().max() < 1e-9):
            raise ArgumentError("clock", ends.tolist(), "a clock that is 0 at 0 and 1 at 1")
        require_falling(self, "clock")

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times, rate = with_rate(self.clock, clock_times(t))
        found = self.path.coefficients(times.clamp(0, 1))
        return Coefficients(found.alpha, found.sigma, found.alpha_rate * rate, found.sigma_rate * rate)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        times = self.path.time_at(half_log_snr)
        return bisected(lambda r: -with_rate(self.clock, r)[0], -times)


@dataclass(frozen=True, slots=True)
class Rescaled(Path):
    """The points of a path multiplied by a number that depends on time; the signal-to-noise ratio stays.

    `Rescaled(path, lambda t: 1 / path.coefficients(t).alpha)` has alpha 1: the coordinates of k-diffusion and
    AdjointDPM.

    Args:
        path: the path.
        scale: a positive function of a float64 tensor of times, of which forward-mode derivatives exist.

    Example:
        >>> from thalweg.flows import Straight
        >>> Rescaled(Straight(), lambda t: 2 + t).coefficients(0.5).sigma
        tensor(1.2500, dtype=torch.float64)
    """

    path: Path
    scale: Curve

    def __post_init__(self) -> None:
        require_path("path", self.path)
        if not callable(self.scale):
            raise ArgumentTypeError("scale", self.scale, "a function of time")

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """See `Path`."""
        times = clock_times(t)
        scale, rate = with_rate(self.scale, times)
        alpha, sigma, alpha_rate, sigma_rate = self.path.coefficients(times)
        return Coefficients(
            scale * alpha, scale * sigma, rate * alpha + scale * alpha_rate, rate * sigma + scale * sigma_rate
        )

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """See `Path`."""
        return self.path.half_log_snr(t)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """See `Path`."""
        return self.path.time_at(half_log_snr)


def shifted_clock(shift: float) -> Curve:
    """The clock r -> shift r / (1 + (shift - 1) r) of high-resolution flow models, for `Retimed`.

    Args:
        shift: above 0; 1 changes nothing, more spends more steps on noise.
    """
    if not 0 < shift < math.inf:
        raise ArgumentError("shift", shift, "a finite number above 0")
    return lambda r: shift * r / (1 + (shift - 1) * r)


def require_path(argument: str, value: object) -> None:
    """Raise `ArgumentTypeError` unless `value` is a path."""
    if not isinstance(value, Path):
        mend = f"Make one: {value.__name__}()." if isinstance(value, type) else ""
        raise ArgumentTypeError(argument, value, "a thalweg.flows.Path such as Straight()", mend)


def require_falling(path: Path, argument: str) -> None:
    """Refuse a path whose shares are negative or whose signal-to-noise ratio does not fall with time."""
    times = torch.linspace(0, 1, _CHECKED, dtype=torch.float64)
    found = path.coefficients(times)
    if not bool(((found.alpha >= 0) & (found.sigma >= 0) & (found.alpha + found.sigma > 0)).all()):
        raise ArgumentError(argument, path, "shares of data and noise that are nowhere negative")
    falling = path.half_log_snr(times).diff() < 0
    if not bool(falling.all()):
        first = float(times[int(falling.long().argmin())])
        raise ArgumentError(
            argument, f"one that rises after t = {first:.3f}", "a signal-to-noise ratio that falls with time"
        )
