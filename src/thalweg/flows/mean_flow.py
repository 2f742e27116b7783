"""Mean flow: the mean velocity between two times, learnt from its own derivative along the flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.field import Field, JoinedNetwork, batched_times
from thalweg.flows.flow_map import FlowMap, require_output
from thalweg.flows.path import clock_times, over, readable
from thalweg.flows.time_laws import TimeLaw, UniformTime, require_law
from thalweg.flows.training_grid import require_teacher
from thalweg.noise import Key, fresh_key, normal, uniform


@dataclass(frozen=True, slots=True, eq=False)
class MeanFlow(FlowMap):
    """Psi(x, s, t) = x + (t - s) h(x, s, t), with h the mean velocity on the way from s to t.

    Choose it to learn a flow map from data alone, without a teacher and without averaged weights. At t = s
    the network is the velocity itself.

    Args:
        network: h, as `network(x, s, t, **conditions)`, with s and t of shape (batch,).
        path: the noising path; one whose rates are finite, as `Straight` or `Cosine`.

    Paper:
        Geng, Deng, Bai, Kolter, He: Mean Flows for One-step Generative Modeling. NeurIPS 2025.

    Example:
        >>> from thalweg.flows import Straight
        >>> MeanFlow(lambda x, s, t: 2 * torch.ones_like(x), Straight())(torch.zeros(1, 2), 1.0, 0.5)
        tensor([[-1., -1.]])
    """

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """h for times of shape (batch,)."""
        said = self.network(x, s, t, **conditions)
        return require_output(said, x)

    def _jump(self, x: Tensor, s: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return x + over(t - s, x) * self.mean_velocity(x, s, t, **conditions)

    def field(self) -> Field:
        """The field on the diagonal, h(x, t, t), which predicts the velocity."""

        def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
            return self.mean_velocity(x, t, t, **conditions)

        module = isinstance(self.network, nn.Module)
        return Field(JoinedNetwork(network, (self.network,)) if module else network, self.path, "velocity")


def mean_flow_loss(
    model: MeanFlow,
    data: Tensor,
    *,
    teacher: Field | None = None,
    law: TimeLaw | None = None,
    instantaneous: float = 0.75,
    power: float = 0.0,
    s: Tensor | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The squared error of h against velocity - (s - t) dh/ds, the derivative taken along the flow.

    Where it vanishes, h is the mean velocity. The derivative is one forward-mode product, with tangents
    velocity, 1 and 0 for x, s and t, made in the same call as h; the target is detached, so that backward is
    that of a plain regression. Networks of custom autograd functions need their forward-mode rule;
    attention runs by the math kernel, because the fused ones have none. Supports `torch.compile` without a
    graph break.

    Args:
        model: what is trained.
        data: (batch, ...).
        teacher: a field on the model's path whose velocity is taken; None for the slope of the line from data
            to noise, which is right in the mean.
        law: of both times, the later of which is s; None for uniform ones. `LogitNormal(-0.4, 1.0)` in the
            paper.
        instantaneous: the share of examples with t = s, in [0, 1], which learn the velocity by plain flow
            matching; 0.75 in the paper.
        power: p, at least 0: each loss is divided by (loss + 0.001)^p, detached. 1 in the paper; 0 leaves the
            mean square.
        s: the later times themselves, (batch,), together with `t`.
        t: the earlier times, at most `s`.
        noise: the noise itself, shaped as the data.
        conditions: handed to the networks.
        key: names the draws; None takes a fresh one.

    Returns:
        One loss per example, the mean over features, shape (batch,).

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> from thalweg.flows import Straight
        >>> net = torch.nn.Linear(2, 2)
        >>> model = MeanFlow(lambda x, s, t: net(x) * s[:, None], Straight())
        >>> mean_flow_loss(model, torch.randn(16, 2)).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    if not isinstance(model, MeanFlow):
        raise ArgumentTypeError("model", model, "a MeanFlow")
    if require_floating("data", data).ndim == 0 or len(data) == 0:
        raise ArgumentError("data", data, "a batch of data, shape (batch, ...)")
    if teacher is not None:
        require_teacher(teacher, model.path)
    if not 0 <= power < float("inf"):
        raise ArgumentError("power", power, "a finite number of at least 0")
    begin, end = _times(model, data, law, instantaneous, s, t, key)
    if noise is None:
        noise = normal(data, fresh_key(data) if key is None else key.at(call=4 * key.call + 3))
    elif require_floating("noise", noise).shape != data.shape:
        raise ArgumentError("noise", noise, f"shape {tuple(data.shape)}, as the data")
    given = dict(conditions or {})
    x = model.path.noised(data, noise, begin)
    with torch.no_grad():
        if teacher is None:
            velocity = model.path.velocity(data, noise, begin)
        else:
            velocity = teacher.predict("velocity", x, begin, **given)
    found, wanted = mean_flow_target(model, x, velocity, begin, end, **given)
    losses = (found - wanted).square().reshape(len(data), -1).mean(1)
    return losses if power == 0 else losses / (losses.detach() + 1e-3) ** power


def mean_flow_target(
    model: MeanFlow, x: Tensor, velocity: Tensor, s: Tensor, t: Tensor, **conditions: Any
) -> tuple[Tensor, Tensor]:
    """h with its graph, and what it should be, velocity - (s - t) dh/ds, detached.

    Args:
        model: the mean flow.
        x: (batch, ...) at s.
        velocity: of x at s, shaped as x.
        s: (batch,).
        t: (batch,), at most s.
        conditions: handed to the network.
    """
    begin, end = batched_times(x, s), batched_times(x, t)

    def mean_velocity(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return model.mean_velocity(x, s, t, **conditions)

    tangents = (velocity, torch.ones_like(begin), torch.zeros_like(end))
    with sdpa_kernel(SDPBackend.MATH):
        jet: Any = torch.func.jvp(mean_velocity, (x, begin, end), tangents)
    found, rate = jet
    return found, velocity.detach() - over(begin - end, x) * rate.detach()


def _times(
    model: MeanFlow,
    data: Tensor,
    law: TimeLaw | None,
    instantaneous: float,
    s: Tensor | None,
    t: Tensor | None,
    key: Key | None,
) -> tuple[Tensor, Tensor]:
    """Two times per example, float64, the later first."""
    count = len(data)
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    if (s is None) != (t is None):
        raise ArgumentError("t", t, "both times or neither")
    if s is not None and t is not None:
        if law is not None:
            raise ArgumentError("law", law, "None where the times are given")
        for name, value in (("s", s), ("t", t)):
            if require_floating(name, value).shape != (count,):
                raise ArgumentError(name, value, f"one time per example, shape ({count},)")
        begin, end = clock_times(s), clock_times(t)
        if readable(begin) and bool((end > begin).any()):
            raise ArgumentError("t", t, "times at or before s")
        return begin, end
    law = UniformTime() if law is None else law
    require_law(law)
    if isinstance(instantaneous, bool) or not 0 <= instantaneous <= 1:
        raise ArgumentError("instantaneous", instantaneous, "a share in [0, 1]")
    like = torch.empty(count, dtype=torch.float64, device=data.device)
    draws = [
        uniform(like, fresh_key(data) if key is None else key.at(call=4 * key.call + call))
        for call in range(3)
    ]
    first, second = (law.times(draw, model.path) for draw in draws[:2])
    begin = torch.maximum(first, second)
    return begin, torch.where(draws[2] < instantaneous, begin, torch.minimum(first, second))
