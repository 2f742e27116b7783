"""Progressive distillation: a student that does in one step of DDIM what its teacher does in two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentTypeError
from thalweg.flows.field import Field
from thalweg.flows.path import over
from thalweg.flows.teacher_step import ddim_shares, flow_step
from thalweg.flows.training_grid import drawn_interval, require_grid, require_teacher
from thalweg.flows.weights import Weight, data_weight
from thalweg.noise import Key


def progressive_distillation_loss(
    student: Field,
    teacher: Field,
    data: Tensor,
    times: Tensor,
    *,
    weight: Weight = "truncated",
    index: Tensor | None = None,
    noise: Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The error of the student's data against the data for which one step of DDIM is two of the teacher's.

    Choose it to halve the steps of a sampler again and again: train on a grid of N steps, let the student be
    the next teacher, take every second time. Start each student from a copy of its teacher. It is sampled on
    `times` by DDIM.

    Args:
        student: what is trained; predicts anything that gives the data at all `times` but the last.
        teacher: a field on the same path.
        data: (batch, ...).
        times: the student's grid, falling, shape (n,), n >= 2; the teacher's second step begins halfway in
            time. It may end at t = 0.
        weight: of the error in the data, as in `data_weight`; "truncated" is the larger of 1 and the
            signal-to-noise ratio.
        index: which step each example takes, (batch,), int64; None draws it uniformly.
        noise: the noise itself, shaped as the data.
        conditions: handed to both networks.
        key: names the draws; None takes a fresh one.

    Returns:
        One loss per example, the mean over features, shape (batch,).

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Salimans, Ho: Progressive Distillation for Fast Sampling of Diffusion Models. ICLR 2022.

    Example:
        >>> from thalweg.flows import Cosine, time_grid
        >>> net = torch.nn.Linear(2, 2)
        >>> student = Field(lambda x, t: net(x), Cosine(), "v")
        >>> teacher = Field(lambda x, t: 0.5 * x, Cosine(), "v")
        >>> grid = time_grid(Cosine(), 4, last=0.0)
        >>> progressive_distillation_loss(student, teacher, torch.randn(16, 2), grid).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    if not isinstance(student, Field):
        raise ArgumentTypeError("student", student, "a thalweg.flows.Field")
    require_teacher(teacher, student.path)
    grid = require_grid(times, data)
    index, noise = drawn_interval(data, len(grid) - 1, index, noise, key)
    s, t = grid[index], grid[index + 1]
    given = dict(conditions or {})
    x = student.path.noised(data, noise, s)
    wanted = progressive_target(teacher, x, s, t, **given)
    error = (student.predict("data", x, s, **given) - wanted).square().reshape(len(data), -1).mean(1)
    return error * data_weight(weight, student.path, s).to(error)


def progressive_target(teacher: Field, x: Tensor, s: Tensor, t: Tensor, **conditions: Any) -> Tensor:
    """The data for which one step of DDIM from s to t ends where two of the teacher's end; detached.

    Args:
        teacher: a field.
        x: (batch, ...) at s.
        s: (batch,).
        t: (batch,), before s.
        conditions: handed to the network.

    Returns:
        Shaped as x.
    """
    with torch.no_grad():
        middle = (s + t) / 2
        halfway = flow_step(teacher, x, s, middle, "ddim", **conditions)
        end = flow_step(teacher, halfway, middle, t, "ddim", **conditions)
        kept, share = ddim_shares(teacher.path, s, t)
        return (end - over(kept, x) * x) / over(share, x)
