"""Rectified flow: regression of a velocity on the straight line between the two ends of each pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows.couplings import require_pair
from thalweg.flows.field import Field
from thalweg.flows.losses import matching_loss, noised_batch, target
from thalweg.flows.time_laws import TimeLaw
from thalweg.noise import Key

Distance = Callable[[Tensor, Tensor], Tensor]


def rectified_loss(
    field: Field,
    data: Tensor,
    source: Tensor,
    *,
    distance: Distance | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    law: TimeLaw | None = None,
    t: Tensor | None = None,
    stratified: bool = False,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The squared error of a velocity on pairs: flow matching for any coupling of data and source.

    Its least value is the crossing of the pairs; the flow of its minimiser keeps the law at every time, and
    on the straight path it lowers every convex cost of transport. Nothing is simulated: memory does not
    depend on how many steps a sampler takes. Without `distance` and `features` it is `matching_loss`, bit by
    bit.

    Args:
        field: predicts "velocity". Say `coupled=True` of it unless the source is normal noise, independent
            of the data.
        data: the end at t = 0, (batch, ...).
        source: the end at t = 1, shaped as the data; row i belongs to row i of the data.
        distance: `distance(found, wanted)` of the velocities, (batch,), in place of the mean square; such as
            `pseudo_huber`, which is less upset by rows that are far off.
        features: a differentiable function of x, (batch, ...) to (batch, ...): the error is measured by how
            much it changes them, so that only what matters for them has to be learnt. One forward-mode
            derivative per call.
        law: of the times; `UShaped()` for reflow, None for uniform ones.
        t: the times themselves, (batch,), in place of a law.
        stratified: spread the times evenly over the batch.
        conditions: handed to the network.
        key: names the draws; None takes a fresh one.

    Returns:
        One loss per example, shape (batch,).

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Liu, Gong, Liu: Flow Straight and Fast. ICLR 2023, arXiv 2209.03003. Lee, Lin, Fanti: Improving the
        Training of Rectified Flows. NeurIPS 2024, arXiv 2405.20320.

    Example:
        >>> from thalweg.flows import Straight
        >>> net = torch.nn.Linear(2, 2)
        >>> field = Field(lambda x, t: net(x), Straight(), coupled=True)
        >>> rectified_loss(field, torch.randn(8, 2), torch.randn(8, 2) + 3).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    require_velocity(field)
    require_pair(data, source)
    drawn: dict[str, Any] = {"law": law, "t": t, "noise": source, "stratified": stratified, "key": key}
    if distance is None and features is None:
        return matching_loss(field, data, conditions=conditions, **drawn)
    if distance is not None and features is not None:
        raise ArgumentError("features", features, "None where a distance is given")
    batch = noised_batch(field, data, **drawn)
    output = field(batch.x, batch.t, **dict(conditions or {}))
    wanted = target(field, "velocity", batch)
    if distance is not None:
        return require_losses(distance(output, wanted), len(data))
    assert features is not None
    if not callable(features):
        raise ArgumentTypeError("features", features, "a differentiable function of x")
    changed: Tensor = torch.func.jvp(features, (batch.x,), (output - wanted,))[1]
    return changed.square().reshape(len(data), -1).mean(1)


def squared_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean square over features, per example."""
    return (found - wanted).square().reshape(len(found), -1).mean(1)


def pseudo_huber(found: Tensor, wanted: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|found - wanted|^2 + c^2) - c per example: a square near 0, a length far away.

    Args:
        found: (batch, ...).
        wanted: shaped as `found`.
        c: where the one turns into the other, above 0; None for 0.00054 times the number of features, as for
            the second rectified flow. Improved consistency training has 0.00054 times its root.

    Returns:
        Shape (batch,).

    Paper:
        Lee, Lin, Fanti: Improving the Training of Rectified Flows. NeurIPS 2024, arXiv 2405.20320.

    Example:
        >>> pseudo_huber(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=12.0)
        tensor([1.])
    """
    difference = (found - wanted).reshape(len(found), -1)
    if c is None:
        c = 0.00054 * difference.shape[1]
    if not 0 < c < float("inf"):
        raise ArgumentError("c", c, "a finite number above 0")
    return (difference.square().sum(1) + c**2).sqrt() - c


def require_velocity(field: object) -> Field:
    """Raise unless `field` predicts a velocity; return it."""
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    if field.predicts != "velocity":
        raise ArgumentError(
            "field",
            f"one that predicts {field.predicts!r}",
            "a field that predicts 'velocity'",
            "Convert it: field.converted('velocity').",
        )
    return field


def require_losses(losses: object, count: int) -> Tensor:
    """Raise unless a distance gave one number per example."""
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        raise ArgumentError("distance", losses, f"a function that returns one number per example, ({count},)")
    return losses
