"""Explicit Runge-Kutta methods as tables of coefficients, and the sums that a step is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_integer

State = tuple[Tensor, ...]
Number = float | Tensor
Evaluate = Callable[[State, Tensor, int], State]  # state, time, which stage


@dataclass(frozen=True, slots=True)
class Tableau:
    """An explicit Runge-Kutta method; pass your own as `method=` to `integrate`.

    One step of length h from y is  k_j = f(y + h sum_l a[j][l] k_l, t + c[j] h),  y' = y + h sum_j b[j] k_j.

    Args:
        name: what messages call it.
        a: one row per stage, row j with j coefficients; each row sums to its node c[j].
        b: the weights of the result, summing to 1.
        order: the order of convergence, at least 1.
        error: b minus the weights of the embedded method, which makes the method choose its own steps; or
            empty, for steps of the caller.
        middle: the weights of the state at half a step, for output between the steps, or empty.

    Raises:
        ArgumentError, ArgumentTypeError: the rows do not fit together or the weights do not sum to 1.

    Example:
        >>> Tableau("midpoint", a=((), (0.5,)), b=(0.0, 1.0), order=2).c
        (0.0, 0.5)
    """

    name: str
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    error: tuple[float, ...] = ()
    middle: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require_integer("order", self.order, 1)
        if not self.a or [len(row) for row in self.a] != list(range(len(self.a))):
            raise ArgumentError("a", self.a, "an explicit table: row j holds j coefficients, the first none")
        for name in ("b", "error", "middle"):
            weights = getattr(self, name)
            if (weights or name == "b") and len(weights) != len(self.a):
                raise ArgumentError(name, weights, f"{len(self.a)} weights, one per stage")
        if self.error and not (self.middle and self.ends_with_next):
            mend = "Leave out `error` to use the method with fixed steps."
            expected = "an embedded pair whose last stage is the next step's first, with `middle`"
            raise ArgumentError("error", self.error, expected, mend)
        if not math.isclose(sum(self.b), 1.0, abs_tol=1e-9):
            raise ArgumentError("b", self.b, "weights that sum to 1")

    @property
    def c(self) -> tuple[float, ...]:
        """The nodes: when within the step each stage is evaluated, 0 at its start and 1 at its end."""
        return tuple(_exact(sum(row)) for row in self.a)

    @property
    def ends_with_next(self) -> bool:
        """Whether the last stage is the first one of the next step, and need not be evaluated twice."""
        return len(self.a) > 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    def between(self, fraction: float) -> tuple[float, ...]:
        """The weights b at a fraction of a step: the quartic through both ends and the middle."""
        x = fraction
        ends = [0.0] * len(self.b)
        start, stop = list(ends), list(ends)
        start[0], stop[-1] = 1.0, 1.0
        return tuple(
            x**4 * (2 * (f1 - f0) - 8 * b + 16 * m)
            + x**3 * (5 * f0 - 3 * f1 + 14 * b - 32 * m)
            + x**2 * (f1 - 4 * f0 - 5 * b + 16 * m)
            + x * f0
            for f0, f1, b, m in zip(start, stop, self.b, self.middle)
        )


def _exact(node: float) -> float:
    # nodes such as 1 come out of sums of fractions; the field must see the very end of the step
    return float(round(node)) if abs(node - round(node)) < 1e-12 else node


EULER = Tableau("euler", ((),), (1.0,), 1)
HEUN = Tableau("heun", ((), (1.0,)), (0.5, 0.5), 2)
RK4 = Tableau("rk4", ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4)
# Dormand, Prince 1980; the embedded weights and the middle are Shampine's 1986, which torchdiffeq uses too
DOPRI5 = Tableau(
    "dopri5",
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    5,
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)


def times(factor: float, h: Number) -> Number:
    """The product of a coefficient and a step length."""
    return h if factor == 1.0 else factor * h


def add(y: Tensor, k: Tensor, weight: Number) -> Tensor:
    """`y + weight k`, in one operation where the weight is a number."""
    if isinstance(weight, Tensor):
        return torch.addcmul(y, k, weight.to(y.dtype))
    return torch.add(y, k, alpha=weight)


def combine(y: State, weights: Sequence[float], slopes: Sequence[State], h: Number) -> State:
    """`y + h sum_j weights[j] slopes[j]`, part by part; zero weights cost nothing."""
    parts = list(y)
    for weight, slope in zip(weights, slopes):
        if weight:
            scaled = times(weight, h)
            parts = [add(part, k, scaled) for part, k in zip(parts, slope)]
    return tuple(parts)


def stage_time(node: float, t: Tensor, t_next: Tensor, h: Number) -> Tensor:
    """When a stage is evaluated; exactly the ends of the step for the nodes 0 and 1."""
    if node == 0.0:
        return t
    return t_next if node == 1.0 else t + node * h


def runge_kutta_step(
    evaluate: Evaluate, tableau: Tableau, y: State, t: Tensor, t_next: Tensor, h: Number, first: State | None
) -> tuple[State, list[State]]:
    """One step: the state at `t_next` and the slopes of all stages but those that nothing needs.

    Args:
        evaluate: the field, `evaluate(state, time, stage)`.
        first: the slope at the start of the step where it is known already.
    """
    slopes: list[State] = []
    for stage, (row, node) in enumerate(zip(tableau.a, tableau.c)):
        if stage == 0 and first is not None:
            slopes.append(first)
            continue
        point = combine(y, row, slopes, h)
        slopes.append(evaluate(point, stage_time(node, t, t_next, h), stage))
    # the last stage was evaluated at the result
    return (point if tableau.ends_with_next else combine(y, tableau.b, slopes, h)), slopes
