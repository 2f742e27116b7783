"""Consistency models: from any time straight to the data, learnt by agreeing with itself one step earlier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_integer,
    require_positive,
)
from thalweg.flows.field import Field
from thalweg.flows.flow_map import FlowMap, require_output
from thalweg.flows.path import over, readable
from thalweg.flows.rectified import Distance, require_losses, squared_distance
from thalweg.flows.teacher_step import flow_step
from thalweg.flows.training_grid import drawn_interval, require_grid, require_teacher
from thalweg.noise import Key


@dataclass(frozen=True, slots=True, eq=False)
class ConsistencyModel(FlowMap):
    """The map to the data, f(x, s) = c_skip x + c_out network(c_in x, s): choose it for one-step sampling.

    With y = x / alpha and r = sigma / alpha, and r_0 that of `least`: c_skip = d^2 / ((r - r_0)^2 + d^2) and
    c_out = d (r - r_0) / sqrt(r^2 + d^2) on y, so that f(x, least) = x; written so that it holds where
    alpha = 0 too.

    Args:
        network: `network(x, s, **conditions)`; it sees inputs of unit variance and returns the like.
        path: the noising path.
        least: the time of the data, in [0, 1); above 0 where the teacher needs some noise.
        sigma_data: d, the standard deviation of the data, above 0.

    Paper:
        Song, Dhariwal, Chen, Sutskever: Consistency Models. ICML 2023.

    Example:
        >>> from thalweg.flows import Straight
        >>> model = ConsistencyModel(lambda x, s: torch.zeros_like(x), Straight(), sigma_data=1.0)
        >>> model(torch.ones(1, 2), 0.5, 0.0), model(torch.ones(1, 2), 0.0, 0.0)
        (tensor([[1., 1.]]), tensor([[1., 1.]]))
    """

    least: float = 0.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        # the zero-argument form does not see the class that slots make
        FlowMap.__post_init__(self)
        if not 0 <= self.least < 1:
            raise ArgumentError("least", self.least, "a time in [0, 1)")
        require_positive("sigma_data", self.sigma_data)

    @property
    def last(self) -> float | None:
        """See `FlowMap`."""
        return self.least

    def _jump(self, x: Tensor, s: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if readable(t) and bool((t != self.least).any()):
            mend = "A map to any time is ConsistencyTrajectory or MeanFlow."
            raise ArgumentError("t", t, f"t = {self.least}, where this map ends", mend)
        return self.to_data(x, s, **conditions)

    def to_data(self, x: Tensor, s: Tensor, **conditions: Any) -> Tensor:
        """f(x, s) for times of shape (batch,)."""
        alpha, sigma = self.path.coefficients(s)[:2]
        end = self.path.coefficients(torch.tensor(self.least, dtype=torch.float64, device=x.device))
        d = self.sigma_data
        excess = sigma - end.sigma / end.alpha * alpha
        spread = sigma**2 + d**2 * alpha**2
        skip = end.alpha * d**2 * alpha / (excess**2 + d**2 * alpha**2)
        out = end.alpha * d * excess * spread.rsqrt()
        said = self.network(x * over(spread.rsqrt(), x), s, **conditions)
        return over(skip, x) * x + over(out, x) * require_output(said, x)


def consistency_loss(
    model: ConsistencyModel,
    data: Tensor,
    times: Tensor,
    *,
    teacher: Field | None = None,
    target: ConsistencyModel | None = None,
    solver: str = "heun",
    distance: Distance = squared_distance,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """How much the model disagrees with itself between two neighbouring times of a grid.

    With a teacher this is consistency distillation: the earlier state is the teacher's step. Without, it is
    consistency training: the earlier state has the same data and noise, which is right in the limit of a fine
    grid. The target is detached in either case.

    Args:
        model: what is trained.
        data: (batch, ...).
        times: the grid, falling from noise to the model's `least`, shape (n,), n >= 2; as from
            `time_grid(path, n - 1, "karras")`.
        teacher: a field on the model's path.
        target: the model that is agreed with, one of averaged weights (`model.with_network(average)`); None
            for the model itself.
        solver: of the teacher's step: "heun", "ddim" or "euler"; see `flow_step`.
        distance: `distance(found, wanted)`, (batch,); the mean square, or `pseudo_huber`.
        index: which interval of the grid each example takes, (batch,), int64; None draws it uniformly.
        noise: the noise itself, shaped as the data.
        conditions: handed to the networks.
        key: names the draws; None takes a fresh one.

    Returns:
        One loss per example, shape (batch,). To weigh intervals, pass `index` and multiply.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Song, Dhariwal, Chen, Sutskever: Consistency Models. ICML 2023. Song, Dhariwal: Improved Techniques
        for Training Consistency Models. ICLR 2024.

    Example:
        >>> from thalweg.flows import Straight, time_grid
        >>> net = torch.nn.Linear(2, 2)
        >>> model = ConsistencyModel(lambda x, s: net(x), Straight())
        >>> grid = time_grid(Straight(), 8, last=0.0)
        >>> consistency_loss(model, torch.randn(16, 2), grid).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    if not isinstance(model, ConsistencyModel):
        raise ArgumentTypeError("model", model, "a ConsistencyModel")
    grid = require_grid(times, data, model.last)
    if target is not None and not isinstance(target, ConsistencyModel):
        raise ArgumentTypeError("target", target, "a ConsistencyModel")
    if teacher is not None:
        require_teacher(teacher, model.path)
    index, noise = drawn_interval(data, len(grid) - 1, index, noise, key)
    s, t = grid[index], grid[index + 1]
    given = dict(conditions or {})
    x = model.path.noised(data, noise, s)
    with torch.no_grad():
        if teacher is None:
            earlier = model.path.noised(data, noise, t)
        else:
            earlier = flow_step(teacher, x, s, t, solver, **given)
        wanted = (model if target is None else target)(earlier, t, model.least, **given)
    return require_losses(distance(model(x, s, model.least, **given), wanted), len(data))


def progressive_intervals(step: int, steps: int, *, first: int = 2, last: int = 150) -> int:
    """How many times the grid has at a step of consistency training: few at first, many at the end.

    ceil(sqrt(step / steps ((last + 1)^2 - first^2) + first^2) - 1) + 1.

    Args:
        step: from 0 to `steps`.
        steps: of the whole training, at least 1.
        first: at the start, at least 1.
        last: at the end, at least `first`.

    Example:
        >>> progressive_intervals(0, 1000), progressive_intervals(1000, 1000)
        (2, 151)
    """
    require_integer("steps", steps, 1)
    require_integer("step", step, 0)
    require_integer("first", first, 1)
    require_integer("last", last, first)
    if step > steps:
        raise ArgumentError("step", step, f"at most {steps}")
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def adaptive_decay(intervals: int, *, first: int = 2, decay: float = 0.9) -> float:
    """The decay of the target's average for a number of times, exp(first log(decay) / intervals).

    Args:
        intervals: as `progressive_intervals` says, at least 1.
        first: the number at the start.
        decay: the decay at the start, in (0, 1).

    Example:
        >>> round(adaptive_decay(2, decay=0.9), 12)
        0.9
    """
    require_integer("intervals", intervals, 1)
    require_integer("first", first, 1)
    if not 0 < decay < 1:
        raise ArgumentError("decay", decay, "a number in (0, 1)")
    return math.exp(first * math.log(decay) / intervals)
