"""The energy distance: how far two clouds of points are from following one law."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_floating, require_integer


def energy_distance(a: Tensor, b: Tensor, *, chunk: int = 1024) -> Tensor:
    """2 E|a - b| - E|a - a'| - E|b - b'| over all pairs of rows; nowhere negative.

    Zero in the limit of many points if and only if the laws agree. Of n and m points from one law it is about
    E|a - a'| (1 / n + 1 / m): set that floor beside it, by two samples of the same law. In many dimensions
    compare features, not pixels.

    Args:
        a: (n, ...).
        b: (m, ...).
        chunk: rows compared at once, which bounds the memory.

    Returns:
        A scalar, float64, not squared and without root. It carries no gradient.

    Paper:
        Székely, Rizzo: Energy Statistics. Journal of Statistical Planning and Inference, 2013.

    Example:
        >>> energy_distance(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]))
        tensor(10., dtype=torch.float64)
    """
    require_integer("chunk", chunk, 1)
    for name, value in (("a", a), ("b", b)):
        if require_floating(name, value).ndim == 0 or len(value) == 0:
            raise ArgumentError(name, value, "a batch of points, shape (n, ...)")
    if a.shape[1:] != b.shape[1:]:
        raise ArgumentError("b", b, f"points of shape {tuple(a.shape[1:])}, as in a")
    first, second = (value.detach().double().reshape(len(value), -1) for value in (a, b))
    return (
        2 * _mean_distance(first, second, chunk)
        - _mean_distance(first, first, chunk)
        - _mean_distance(second, second, chunk)
    )


def _mean_distance(a: Tensor, b: Tensor, chunk: int) -> Tensor:
    total = a.new_zeros(())
    for rows in a.split(chunk):
        # by differences, so that equal points have distance 0
        total = total + torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist").sum()
    return total / (len(a) * len(b))
