"""Integrals of a field along lines: for a gradient those around loops vanish, and only the ends matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.flows.field import Field
from thalweg.flows.prediction import Kind
from thalweg.flows.vector_field import VectorField, per_example, state_and_times, vector_field
from thalweg.noise import Key, fresh_key, normal

_ORTHONORMAL = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Circulation:
    """Integrals around loops, (loops, batch).

    Args:
        integral: of the field along the loop; 0 for a gradient.
        length: of the field's norm along the same loop, which the integral cannot exceed.
        largest: the norm of the field where it is largest on the loop: compare it with that within the data,
            for networks extrapolate wildly on loops that leave it.
    """

    integral: Tensor
    length: Tensor
    largest: Tensor

    @property
    def relative(self) -> Tensor:
        """|integral| / length per loop, in [0, 1]: how much of the field goes around."""
        return self.integral.abs() / self.length


def circulation(
    field: Field | VectorField,
    x: Tensor,
    t: Tensor | float,
    *,
    radius: float | tuple[float, float],
    planes: int | Tensor = 1,
    nodes: int = 64,
    kind: Kind | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Circulation:
    """Integrate a field around circles or ellipses: needs no derivative, and sees asymmetry at a chosen size.

    The trapezoid rule on a closed loop converges faster than any power of the nodes for smooth fields, and is
    exact from 3 nodes on for linear ones. A small circle of radius r in the plane of u and w gives
    pi r^2 (w^T J u - u^T J w) + O(r^4).

    Args:
        field: a field, or a function of x and t.
        x: the centres, (batch, ...).
        t: (batch,) or one for all.
        radius: of the circles, above 0, in units of x; or the two semi-axes of ellipses. Choose it in units
            of the noise sigma and of the data's scale.
        planes: how many random planes per centre; or the planes themselves, (loops, 2, ...), orthonormal.
        nodes: points on a loop, at least 3.
        kind: which prediction; None for the score.
        conditions: handed to the network.
        key: names the planes; None takes a fresh one.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; planes that are not orthonormal.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> found = circulation(lambda x, t: x @ turn, torch.zeros(1, 2), 0.5, radius=1.0, key=Key(0))
        >>> bool(torch.isclose(found.integral.abs(), torch.tensor(2 * torch.pi)).all()), found.relative
        (True, tensor([[1.]]))
    """
    function = vector_field(field, kind, conditions)
    x, times = state_and_times(x, t)
    require_integer("nodes", nodes, 3)
    axes = _axes(radius)
    frames = _frames(planes, x, key)
    angles = torch.arange(nodes, dtype=torch.float64, device=x.device) * (2 * math.pi / nodes)
    integrals, lengths, largest = [], [], []
    for first, second in frames:
        integral, length, most = (x.new_zeros(len(x)) for _ in range(3))
        for angle in angles:
            cosine, sine = (turned.to(x.dtype) for turned in (angle.cos(), angle.sin()))
            at = x + axes[0] * cosine * first + axes[1] * sine * second
            step = (axes[1] * cosine * second - axes[0] * sine * first).expand_as(x) * (2 * math.pi / nodes)
            value = function(at, times)
            norm = per_example(value.square()).sqrt()
            integral = integral + per_example(value * step)
            length = length + norm * per_example(step.square()).sqrt()
            most = torch.maximum(most, norm)
        integrals.append(integral)
        lengths.append(length)
        largest.append(most)
    return Circulation(torch.stack(integrals), torch.stack(lengths), torch.stack(largest))


def line_integral(
    field: Field | VectorField,
    points: Tensor,
    t: Tensor | float,
    *,
    nodes: int = 16,
    kind: Kind | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate a field along straight lines from point to point, and its norm along the same way.

    For the exact score it is the difference of log p_t between the ends, whatever the way. By
    Gauss-Legendre quadrature on each line, exact for polynomials of degree 2 nodes - 1.

    Args:
        field: a field, or a function of x and t.
        points: (n, batch, ...), n at least 2.
        t: (batch,) or one for all.
        nodes: per line, at least 1.
        kind: which prediction; None for the score.
        conditions: handed to the network.

    Returns:
        The integral, and that of the norm: (batch,) each.

    Example:
        >>> points = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
        >>> integral, length = line_integral(lambda x, t: x, points, 0.5)
        >>> round(float(integral), 4), round(float(length), 4)
        (12.5, 12.5)
    """
    if require_floating("points", points).ndim < 3 or len(points) < 2:
        raise ArgumentError("points", points, "at least 2 points for each of a batch, shape (n, batch, ...)")
    require_integer("nodes", nodes, 1)
    function = vector_field(field, kind, conditions)
    _, times = state_and_times(points[0], t)
    places, weights = (torch.tensor(part, dtype=torch.float64) for part in gauss_legendre(nodes))
    integral, length = (points.new_zeros(points.shape[1]) for _ in range(2))
    for start, end in pairwise(points):
        way = end - start
        distance = per_example(way.square()).sqrt()
        for place, weight in zip(places.tolist(), weights.tolist()):
            value = function(start + place * way, times)
            integral = integral + weight * per_example(value * way)
            length = length + weight * distance * per_example(value.square()).sqrt()
    return integral, length


@dataclass(frozen=True, slots=True, eq=False)
class PathGap:
    """Line integrals between two points by several ways.

    Args:
        straight: along the straight line, (batch,): a difference of log-densities, if the field is a score.
        detours: along broken lines, (paths, batch).
        length: of the field's norm along the straight line and the detours, (1 + paths, batch).
    """

    straight: Tensor
    detours: Tensor
    length: Tensor

    @property
    def gap(self) -> Tensor:
        """Each detour less the straight line, (paths, batch); 0 for a gradient."""
        return self.detours - self.straight

    @property
    def relative(self) -> Tensor:
        """|gap| by the norm's integral along both ways, in [0, 1], (paths, batch)."""
        return self.gap.abs() / (self.length[1:] + self.length[0])


def path_gap(
    field: Field | VectorField,
    start: Tensor,
    end: Tensor,
    t: Tensor | float,
    *,
    paths: int = 8,
    waypoints: int = 2,
    spread: float | None = None,
    nodes: int = 16,
    kind: Kind | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> PathGap:
    """Compare line integrals between two points by different ways: do log-density ratios mean anything?

    Each detour goes through random points beside the straight line, so that the ways enclose an area; nodes
    drawn on one line would only measure the quadrature.

    Args:
        field: a field, or a function of x and t.
        start: (batch, ...).
        end: likewise.
        t: (batch,) or one for all.
        paths: how many detours, at least 1.
        waypoints: on each, at least 1.
        spread: the standard deviation of a waypoint's distance from the line, per feature, in units of x;
            None for a quarter of the distance of the ends, shared among the features.
        nodes: of the quadrature, on each line.
        kind: which prediction; None for the score.
        conditions: handed to the network.
        key: names the waypoints; None takes a fresh one.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Vuong, McCann, Santos, Lin: Are We Really Learning the Score Function? TMLR 2025, arXiv 2509.00336.

    Example:
        >>> found = path_gap(lambda x, t: -x, torch.zeros(3, 2), torch.ones(3, 2), 0.5)
        >>> bool(found.gap.abs().max() < 1e-5)
        True
    """
    start, times = state_and_times(start, t)
    if require_floating("end", end).shape != start.shape:
        raise ArgumentError("end", end, f"the shape of start, {tuple(start.shape)}")
    for name, value in (("paths", paths), ("waypoints", waypoints)):
        require_integer(name, value, 1)
    way = end - start
    if spread is None:
        distance = per_example(way.square()).sqrt().reshape(-1, *(1,) * (start.ndim - 1))
        scale: Tensor | float = distance / (4 * math.sqrt(start[0].numel()))
    else:
        require_positive("spread", spread)
        scale = spread
    like = start.detach().new_empty((paths, waypoints, *start.shape))
    beside = scale * normal(like, fresh_key(start) if key is None else key)
    shares = [(i + 1) / (waypoints + 1) for i in range(waypoints)]
    on_line = torch.stack([start + share * way for share in shares])
    options: dict[str, Any] = {"nodes": nodes, "kind": kind, "conditions": conditions}
    straight, first = line_integral(field, torch.stack([start, end]), times, **options)
    detours, lengths = [], [first]
    for offsets in beside:
        points = torch.cat([start[None], on_line + offsets, end[None]])
        integral, length = line_integral(field, points, times, **options)
        detours.append(integral)
        lengths.append(length)
    return PathGap(straight, torch.stack(detours), torch.stack(lengths))


@lru_cache(maxsize=64)
def gauss_legendre(nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Places in (0, 1) and weights with sum 1 of Gauss-Legendre quadrature."""
    order = torch.arange(1, nodes, dtype=torch.float64)
    beside = order / (4 * order**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return tuple(((values + 1) / 2).tolist()), tuple(vectors[0].square().tolist())


def _axes(radius: object) -> tuple[float, float]:
    axes = radius if isinstance(radius, tuple) else (radius, radius)
    if len(axes) != 2:
        raise ArgumentError("radius", radius, "one radius, or two semi-axes")
    for axis in axes:
        require_positive("radius", axis)
    return float(axes[0]), float(axes[1])


def _frames(planes: object, x: Tensor, key: Key | None) -> Tensor:
    """Pairs of orthonormal vectors: (loops, 2, batch or 1, ...)."""
    features = x[0].numel()
    if features < 2:
        raise ArgumentError("x", x, "states of at least 2 features, or there is no plane")
    if isinstance(planes, Tensor):
        require_floating("planes", planes)
        if planes.ndim < 3 or planes.shape[1:] != (2, *x.shape[1:]):
            raise ArgumentError(
                "planes", planes, f"pairs of vectors, shape (loops, 2, *{tuple(x.shape[1:])})"
            )
        flat = planes.flatten(2).double()
        identity = torch.eye(2, dtype=flat.dtype, device=flat.device)
        if not bool((flat @ flat.mT - identity).abs().max() < _ORTHONORMAL):
            mend = "Orthonormalise them, by torch.linalg.qr for example."
            raise ArgumentError("planes", planes, "orthonormal pairs of vectors", mend)
        return planes.to(x)[:, :, None]
    if isinstance(planes, bool) or not isinstance(planes, int):
        raise ArgumentTypeError("planes", planes, "how many planes, or a tensor of them")
    require_integer("planes", planes, 1)
    like = torch.empty(planes, len(x), features, 2, dtype=torch.float64, device=x.device)
    drawn = torch.linalg.qr(normal(like, fresh_key(x) if key is None else key))[0]
    frames: Tensor = drawn.permute(0, 3, 1, 2).reshape(planes, 2, *x.shape).to(x.dtype)
    return frames
