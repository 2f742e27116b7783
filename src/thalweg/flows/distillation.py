"""Distillation of a flow: a few Euler steps that repeat the pairs a long simulation has made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import require_integer
from thalweg.flows.couplings import require_pair
from thalweg.flows.field import Field
from thalweg.flows.losses import matching_loss
from thalweg.flows.rectified import Distance, require_losses, require_velocity
from thalweg.noise import Key, fresh_key, uniform


def distillation_loss(
    field: Field,
    data: Tensor,
    source: Tensor,
    *,
    steps: int = 1,
    distance: Distance | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The error of a velocity at the few times that `steps` Euler steps will look at.

    Choose it last, after the final reflow. Where reflow makes a new and cheaper coupling, distillation
    copies the given one: with crossing or shuffled pairs it averages them. With one step it is the slice of
    `rectified_loss` at t = 1, and the student is sampled by `sample(field, source, [1, 0], solver=Euler())`.

    Args:
        field: the student, as a rule a copy of the flow that made the pairs; predicts "velocity".
        data: what the teacher ended at, (batch, ...).
        source: where it started, shaped as the data; row i belongs to row i.
        steps: how many Euler steps the student will take, at least 1; times are drawn from 1, 1 - 1 / steps,
            ..., 1 / steps.
        distance: `distance(found, wanted)` of the data, (batch,), such as a perceptual one; the data are the
            end of the tangent at that time. None for the mean square of the velocities.
        conditions: handed to the network.
        key: names the times; None takes a fresh one.

    Returns:
        One loss per example, shape (batch,).

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Liu, Gong, Liu: Flow Straight and Fast. ICLR 2023, arXiv 2209.03003.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: torch.ones_like(x), Straight(), coupled=True)
        >>> distillation_loss(field, torch.zeros(3, 2), torch.ones(3, 2))
        tensor([0., 0., 0.])
    """
    require_velocity(field)
    require_pair(data, source)
    require_integer("steps", steps, 1)
    t = distillation_times(len(data), steps, data, key)
    if distance is None:
        return matching_loss(field, data, t=t, noise=source, conditions=conditions)
    found = field.predict("data", field.path.noised(data, source, t), t, **dict(conditions or {}))
    return require_losses(distance(found, data), len(data))


def distillation_times(count: int, steps: int, like: Tensor, key: Key | None) -> Tensor:
    """Times at which `steps` Euler steps begin, drawn with equal chances: (count,), float64."""
    if steps == 1:
        return torch.ones(count, dtype=torch.float64, device=like.device)
    draws = uniform(
        torch.empty(count, dtype=torch.float64, device=like.device), fresh_key(like) if key is None else key
    )
    return 1 - (draws * steps).floor().clamp(max=steps - 1) / steps
