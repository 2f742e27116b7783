"""Random directions with unit covariance, drawn again from their key whenever they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from thalweg import noise
from thalweg.noise import Key

Directions = Literal["rademacher", "gaussian"]
DIRECTIONS = ("rademacher", "gaussian")


def direction(kind: Directions, like: Tensor, key: Key, sample: int, index: int) -> Tensor:
    """Draw the part of one random direction that belongs to one parameter.

    Args:
        kind: "rademacher" (entries -1 or 1; the least second moment) or "gaussian" (isotropic).
        like: the parameter; its shape, dtype and device count, its values do not.
        key: the key of the whole estimate.
        sample: which direction of the estimate.
        index: which parameter.

    Returns:
        A tensor z like `like`, with E[z z^T] the identity; the same bits for the same arguments.

    Example:
        >>> direction("rademacher", torch.empty(4), Key(0), sample=0, index=0).abs()
        tensor([1., 1., 1., 1.])
    """
    own = Key(seed=key.bits(), step=sample, call=index, device=key.device)
    return noise.rademacher(like, own) if kind == "rademacher" else noise.normal(like, own)


def combine(
    kind: Directions, coefficients: Sequence[Tensor], parameters: Sequence[Tensor], key: Key
) -> tuple[Tensor, ...]:
    """Sum directions with coefficients: one gradient per parameter, one direction in memory at a time.

    Args:
        kind: as in `direction`.
        coefficients: one scalar tensor per direction, sample 0 first.
        parameters: the parameters the directions were drawn for.
        key: the key of the whole estimate.

    Returns:
        For each parameter the sum over samples of coefficient times direction, summed in float32 or better.
    """
    gradients = []
    for index, parameter in enumerate(parameters):
        like = parameter.detach()
        total: Tensor | None = None
        for sample, coefficient in enumerate(coefficients):
            drawn = direction(kind, like, key, sample, index)
            term = drawn.to(torch.promote_types(drawn.dtype, torch.float32))
            term.mul_(coefficient.to(term.device, term.dtype))
            total = term if total is None else total.add_(term)
        assert total is not None
        gradients.append(total.to(parameter.dtype))
    return tuple(gradients)
