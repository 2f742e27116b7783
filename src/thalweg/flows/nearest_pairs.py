"""A velocity without a network: the mean direction to the data of the stored pairs that pass nearby."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive
from thalweg.flows.couplings import Paired, squared_distances
from thalweg.flows.field import Field
from thalweg.flows.named_paths import Straight


def nearest_pairs_field(pairs: Paired, *, neighbors: int = 100, bandwidth: float = 1.0) -> Field:
    """The rectified flow of stored pairs by nearest neighbours: for toys, where nothing should be trained.

    At x and t the pairs whose point at that time lies closest say where their data are; the velocity leads
    away from these, (x - data) / t, weighted by a Gaussian of the distance. It ends on convex combinations
    of the stored data. Each call looks at all pairs.

    Args:
        pairs: the pairs.
        neighbors: how many of them are averaged, at least 1; capped by how many there are.
        bandwidth: the standard deviation of the weights, above 0, in units of x.

    Returns:
        A coupled field on the straight path that predicts "velocity", for times above 0.

    Paper:
        Liu, Gong, Liu: Flow Straight and Fast. ICLR 2023, arXiv 2209.03003 (section 5.1).

    Example:
        >>> field = nearest_pairs_field(Paired(torch.zeros(1, 2), torch.ones(1, 2)))
        >>> field(torch.full((1, 2), 0.5), 0.5)
        tensor([[1., 1.]])
    """
    if not isinstance(pairs, Paired):
        raise ArgumentTypeError("pairs", pairs, "stored pairs, thalweg.flows.Paired")
    require_integer("neighbors", neighbors, 1)
    require_positive("bandwidth", bandwidth)
    count = min(neighbors, len(pairs))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[1:] != pairs.data.shape[1:]:
            raise ArgumentError("x", x, f"points of shape {tuple(pairs.data.shape[1:])}, as the pairs")
        times, place = t.unique(return_inverse=True)
        data = torch.empty_like(x, dtype=torch.float64)
        for index, time in enumerate(times):
            data[place == index] = _toward(pairs, x[place == index], time, count, bandwidth)
        return (x - data.to(x)) / t.to(x).reshape(-1, *(1,) * (x.ndim - 1))

    return Field(velocity, Straight(), "velocity", coupled=True)


def _toward(pairs: Paired, x: Tensor, t: Tensor, count: int, bandwidth: float) -> Tensor:
    """The weighted mean of the data of the nearest pairs at one time."""
    points = (1 - t) * pairs.data + t * pairs.source
    near = squared_distances(x, points).topk(count, dim=1, largest=False)
    # the nearest has weight 1: far from all pairs the weights would vanish together
    weights = torch.exp((near.values[:, :1] - near.values) / (2 * bandwidth**2))
    weights = weights / weights.sum(1, keepdim=True)
    data = pairs.data.double()[near.indices]
    return (weights.reshape(*weights.shape, *(1,) * (x.ndim - 1)) * data).sum(1)
