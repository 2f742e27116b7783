"""What losses of flow maps draw and check: intervals of a grid, noise, a teacher on the same path."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.couplings import require_pair
from thalweg.flows.field import Field
from thalweg.flows.path import Path, readable
from thalweg.noise import Key, fresh_key, normal, uniform


def drawn_interval(
    data: Tensor, intervals: int, index: Tensor | None, noise: Tensor | None, key: Key | None
) -> tuple[Tensor, Tensor]:
    """An interval of a grid and noise for each example, drawn unless given."""
    count = len(data)
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    if index is None:
        like = torch.empty(count, dtype=torch.float64, device=data.device)
        draws = uniform(like, fresh_key(data) if key is None else key.at(call=3 * key.call))
        index = (draws * intervals).long().clamp(max=intervals - 1)
    elif not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (count,):
        raise ArgumentError("index", index, f"an int64 tensor of shape ({count},)")
    elif readable(index) and bool(((index < 0) | (index >= intervals)).any()):
        raise ArgumentError("index", index.tolist(), f"intervals from 0 to {intervals - 1}")
    if noise is None:
        noise = normal(data, fresh_key(data) if key is None else key.at(call=3 * key.call + 1))
    else:
        try:
            require_pair(data, noise)
        except ArgumentError:
            raise ArgumentError("noise", noise, f"shape {tuple(data.shape)} and {data.dtype}") from None
    return index, noise


def require_grid(times: Tensor, data: Tensor, last: float | None = None) -> Tensor:
    """Raise unless the times fall, to where the map ends; return them in float64 beside the data."""
    if require_floating("data", data).ndim == 0 or len(data) == 0:
        raise ArgumentError("data", data, "a batch of data, shape (batch, ...)")
    require_floating("times", times)
    if times.ndim != 1 or len(times) < 2:
        raise ArgumentError("times", times, "at least 2 falling times in [0, 1], shape (n,)")
    grid = times.detach().to(torch.float64)
    if readable(grid):
        if not bool((grid.diff() < 0).all()) or not (float(grid[-1]) >= 0 and float(grid[0]) <= 1):
            raise ArgumentError("times", grid.tolist(), "falling times in [0, 1]")
        if last is not None and float(grid[-1]) != last:
            raise ArgumentError("times", float(grid[-1]), f"a last time of {last}, where this map ends")
    return grid.to(data.device)


def require_teacher(teacher: object, path: Path) -> None:
    """Raise unless a teacher is a field on the path."""
    if not isinstance(teacher, Field):
        raise ArgumentTypeError("teacher", teacher, "a thalweg.flows.Field")
    if teacher.path != path:
        raise ArgumentError("teacher", teacher.path, f"a field on {path}", "Move it: teacher.on(path).")
