"""Training a field: regression on what made the noised data, with weights, times and keyed noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.field import Field
from thalweg.flows.path import Coefficients, clock_times, over
from thalweg.flows.prediction import Kind
from thalweg.flows.time_laws import TimeLaw, UniformTime, require_law
from thalweg.flows.weights import Weight, data_error_share, data_weight
from thalweg.noise import Key, fresh_key, normal, uniform


class Noised(NamedTuple):
    """A batch for training.

    Args:
        x: the noised data, (batch, ...).
        t: the times, (batch,), float64.
        data: the data.
        noise: the noise that was added.
    """

    x: Tensor
    t: Tensor
    data: Tensor
    noise: Tensor


def matching_loss(
    field: Field,
    data: Tensor,
    *,
    weight: Weight | None = None,
    law: TimeLaw | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    stratified: bool = False,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The squared error of the field on noised data: flow matching, denoising, score matching.

    Which of them is decided by what the field predicts; its minimum is the mean of that given x. The weight
    is one of the error in the *data*, so that the same name means the same training for every prediction;
    None leaves the error of the prediction as it is, which is flow matching for a velocity and the simple
    loss of DDPM for the noise.

    Args:
        field: what is trained.
        data: (batch, ...).
        weight: see `data_weight`; a callable for other constants: `partial(data_weight, "min_snr", clip=3)`
            will do, in the order path, t.
        law: the law of the times; None for `UniformTime()`. A density and a weight are one choice: see
            `effective_weight`.
        t: the times themselves, (batch,), in place of a law.
        noise: the noise itself, shaped as the data; for another source than noise (rectified flow between
            two sets of data) a batch of that source.
        stratified: spread the uniform draws behind the times evenly over the batch, for less variance.
        conditions: handed to the network.
        key: names the draws; None takes a fresh one, governed by `torch.manual_seed`.

    Returns:
        One loss per example, the mean over features, shape (batch,); targets carry no gradient.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> from thalweg.flows import Straight
        >>> net = torch.nn.Linear(2, 2)
        >>> field = Field(lambda x, t: net(x), Straight(), predicts="velocity")
        >>> matching_loss(field, torch.randn(8, 2), key=Key(0)).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    batch, path = _noised(field, data, law, t, noise, stratified, key)
    output = field(batch.x, batch.t, **dict(conditions or {}))
    error = (output - _target(path, field.predicts, batch)).square()
    losses = error.flatten(1).mean(1) if error.ndim > 1 else error
    if weight is None:
        return losses
    if not callable(weight) and weight == field.predicts:
        return losses
    scale = data_weight(weight, field.path, batch.t) / data_error_share(field.predicts, field.path, batch.t)
    return losses * scale.to(losses)


def noised_batch(
    field: Field,
    data: Tensor,
    *,
    law: TimeLaw | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    stratified: bool = False,
    key: Key | None = None,
) -> Noised:
    """Draw times and noise and put them together; arguments as in `matching_loss`.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: x, Straight())
        >>> noised_batch(field, torch.zeros(4, 3), key=Key(1)).x.shape
        torch.Size([4, 3])
    """
    return _noised(field, data, law, t, noise, stratified, key)[0]


def _noised(
    field: Field,
    data: Tensor,
    law: TimeLaw | None,
    t: Tensor | None,
    noise: Tensor | None,
    stratified: bool,
    key: Key | None,
) -> tuple[Noised, Coefficients]:
    """The batch, and the path at its times, which the target needs again."""
    if require_floating("data", data).ndim == 0 or len(data) == 0:
        raise ArgumentError("data", data, "a batch of data, shape (batch, ...)")
    if t is not None and law is not None:
        raise ArgumentError("law", law, "None where t= gives the times")
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    if noise is not None and (noise.shape != data.shape or not noise.is_floating_point()):
        expected = f"a floating-point tensor of the data's shape {tuple(data.shape)}"
        raise ArgumentError("noise", noise, expected)
    count = len(data)
    if t is None:
        law = UniformTime() if law is None else law
        require_law(law)
        like = data.new_empty(count, dtype=torch.float64)
        draws = uniform(like, fresh_key(data) if key is None else key.at(call=2 * key.call))
        if stratified:
            # one draw for all, and each example in a stratum of its own
            draws = (draws[:1] + torch.arange(count, device=data.device) / count) % 1
        times = law.times(draws, field.path)
    else:
        require_floating("t", t)
        if t.shape != (count,):
            raise ArgumentError("t", t, f"one time per example, shape ({count},)")
        times = clock_times(t)
    if noise is None:
        noise = normal(data, fresh_key(data) if key is None else key.at(call=2 * key.call + 1))
    path = field.path.coefficients(times)
    x = over(path.alpha, data) * data + over(path.sigma, data) * noise
    return Noised(x, times, data, noise), path


def target(field: Field, kind: Kind, batch: Noised) -> Tensor:
    """What a prediction of `kind` is regressed on: the data, the noise, or what they make together."""
    return _target(field.path.coefficients(batch.t), kind, batch)


def _target(path: Coefficients, kind: Kind, batch: Noised) -> Tensor:
    with torch.no_grad():
        if kind == "data":
            return batch.data
        if kind == "noise":
            return batch.noise
        alpha, sigma, alpha_rate, sigma_rate = (over(c, batch.data) for c in path)
        if kind == "score":
            return -batch.noise / sigma
        if kind == "velocity":
            return alpha_rate * batch.data + sigma_rate * batch.noise
        return alpha * batch.noise - sigma * batch.data
