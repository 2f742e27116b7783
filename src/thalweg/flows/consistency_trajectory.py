"""Consistency trajectory models: jumps from any time to any other, written as a step of DDIM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.flows.field import Field, JoinedNetwork
from thalweg.flows.flow_map import FlowMap, require_output
from thalweg.flows.path import over, readable
from thalweg.flows.rectified import Distance, require_losses, squared_distance
from thalweg.flows.teacher_step import ddim_shares, flow_step
from thalweg.flows.training_grid import drawn_interval, require_grid, require_teacher
from thalweg.noise import Key, fresh_key, uniform


@dataclass(frozen=True, slots=True, eq=False)
class ConsistencyTrajectory(FlowMap):
    """G(x, s, t) = (sigma_t / sigma_s) x + (alpha_t - alpha_s sigma_t / sigma_s) g(x, s, t), any s to any t.

    The network g looks like a denoiser: at t = s it is the mean of the data given x, at t = 0 the jump itself
    is g / alpha_0. Choose it to trade steps for quality with one model; where alpha = 1 it is the formula of
    the paper, (t / s) x + (1 - t / s) g in sigma.

    Args:
        network: g, as `network(x, s, t, **conditions)`, with s and t of shape (batch,).
        path: the noising path.

    Paper:
        Kim et al.: Consistency Trajectory Models. ICLR 2024.

    Example:
        >>> from thalweg.flows import Straight
        >>> model = ConsistencyTrajectory(lambda x, s, t: torch.zeros_like(x), Straight())
        >>> model(torch.ones(1, 2), 0.5, 0.25)
        tensor([[0.5000, 0.5000]])
    """

    def _jump(self, x: Tensor, s: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        kept, share = ddim_shares(self.path, s, t)
        said = self.network(x, s, t, **conditions)
        return over(kept, x) * x + over(share, x) * require_output(said, x)

    def field(self) -> Field:
        """The field on the diagonal, g(x, t, t), which predicts data: train it by `matching_loss` as well."""

        def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
            said: Tensor = self.network(x, t, t, **conditions)
            return said

        module = isinstance(self.network, nn.Module)
        return Field(JoinedNetwork(network, (self.network,)) if module else network, self.path, "data")


def trajectory_loss(
    model: ConsistencyTrajectory,
    teacher: Field,
    data: Tensor,
    times: Tensor,
    *,
    target: ConsistencyTrajectory | None = None,
    solver: str = "heun",
    in_data: bool = True,
    distance: Distance = squared_distance,
    index: Tensor | None = None,
    end: Tensor | None = None,
    noise: Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """How much a jump disagrees with a teacher's step followed by a jump of the target, to the same time.

    With every `end` at the last time it is consistency distillation. Add the field's own loss to it,
    `matching_loss(model.field(), data)`, which keeps short jumps right. In data space it is differentiable
    once, and `torch.compile` breaks its graph at the outer jump.

    Args:
        model: what is trained.
        teacher: a field on the model's path.
        data: (batch, ...).
        times: the grid, falling, shape (n,), n >= 2. Example i starts at `times[index[i]]`, its teacher steps
            to the next time, and both jumps end at `times[end[i]]`.
        target: the model that is agreed with, one of averaged weights; None for the model itself. It is
            always detached.
        solver: of the teacher's step; see `flow_step`.
        in_data: compare after one more jump of the target, to the last time, through which the model is
            differentiated, so that errors at all times are measured alike; else at the end itself.
        distance: `distance(found, wanted)`, (batch,).
        index: (batch,), int64, below n - 1; None draws it uniformly.
        end: (batch,), int64, above `index` and below n; None draws it uniformly from those.
        noise: the noise itself.
        conditions: handed to the networks.
        key: names the draws; None takes a fresh one.

    Returns:
        One loss per example, shape (batch,).

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Kim et al.: Consistency Trajectory Models. ICLR 2024.

    Example:
        >>> from thalweg.flows import Straight, time_grid
        >>> net = torch.nn.Linear(2, 2)
        >>> model = ConsistencyTrajectory(lambda x, s, t: net(x), Straight())
        >>> teacher = Field(lambda x, t: torch.zeros_like(x), Straight(), "data")
        >>> grid = time_grid(Straight(), 8, last=0.1)
        >>> trajectory_loss(model, teacher, torch.randn(16, 2), grid).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    if not isinstance(model, ConsistencyTrajectory):
        raise ArgumentTypeError("model", model, "a ConsistencyTrajectory")
    grid = require_grid(times, data)
    require_teacher(teacher, model.path)
    if target is not None and not isinstance(target, ConsistencyTrajectory):
        raise ArgumentTypeError("target", target, "a ConsistencyTrajectory")
    index, noise = drawn_interval(data, len(grid) - 1, index, noise, key)
    end = _drawn_end(data, index, len(grid), end, key)
    s, u, t = grid[index], grid[index + 1], grid[end]
    given = dict(conditions or {})
    x = model.path.noised(data, noise, s)
    agreed = model if target is None else target
    last = grid[-1]
    with torch.no_grad():
        wanted = agreed(flow_step(teacher, x, s, u, solver, **given), u, t, **given)
        if in_data:
            wanted = agreed(wanted, t, last, **given)
    found = model(x, s, t, **given)
    if in_data:
        found = frozen_jump(agreed, found, t, last, **given)
    return require_losses(distance(found, wanted), len(data))


def _drawn_end(data: Tensor, index: Tensor, count: int, end: Tensor | None, key: Key | None) -> Tensor:
    """A place in the grid after `index`, drawn uniformly unless given."""
    if end is None:
        like = torch.empty(len(data), dtype=torch.float64, device=data.device)
        draws = uniform(like, fresh_key(data) if key is None else key.at(call=3 * key.call + 2))
        left = count - 1 - index
        return index + 1 + torch.minimum((draws * left).long(), left - 1)
    if not isinstance(end, Tensor) or end.dtype != torch.int64 or end.shape != (len(data),):
        raise ArgumentError("end", end, f"an int64 tensor of shape ({len(data)},)")
    if readable(end) and bool(((end <= index) | (end >= count)).any()):
        raise ArgumentError("end", end.tolist(), f"places after index, below {count}")
    return end


def frozen_jump(
    flow_map: FlowMap, x: Tensor, s: Tensor | float, t: Tensor | float, **conditions: Any
) -> Tensor:
    """A jump that is differentiated in x and in nothing else: the map's parameters get no gradient.

    Differentiable once; works for networks that are plain functions of hidden modules too.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return flow_map(x, s, t, **conditions)
    leaf = x.detach().requires_grad_()
    landed = flow_map(leaf, s, t, **conditions)

    def pull(cotangent: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a second derivative through a frozen jump: compare with in_data=False, which has none"
            )
        # kept for the caller who keeps its own graph; it goes when that goes
        (pulled,) = torch.autograd.grad(landed, leaf, cotangent, retain_graph=True)
        return pulled

    handle = x.view_as(x)
    handle.register_hook(pull)
    # the difference is 0 and carries the gradient
    return landed.detach() + (handle - handle.detach())
