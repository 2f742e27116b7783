"""Couplings: which point of the source goes with which point of the data, as sources of training pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    MissingExtraError,
    require_floating,
    require_integer,
)
from thalweg.noise import Key, normal, uniform

Draw = Callable[[int, Key], Tensor]


class Pair(NamedTuple):
    """Points that belong together, row by row.

    Args:
        data: at t = 0, (batch, ...).
        source: at t = 1, shaped as the data.
        conditions: what the network is told of each row, tensors of shape (batch, ...).
    """

    data: Tensor
    source: Tensor
    conditions: Mapping[str, Tensor] = {}


@runtime_checkable
class Coupling(Protocol):
    """Anything that draws pairs: one draw gives both ends, so that no loader can shuffle them apart."""

    def draw(self, count: int, key: Key) -> Pair:
        """Draw `count` pairs; the same key, the same pairs."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Independent:
    """Data and source drawn without regard to each other: where a first rectified flow starts.

    Args:
        data: a tensor (n, ...) whose rows are drawn with replacement, or a function `draw(count, key)`.
        source: likewise; None for standard normal noise. Only then does the trained flow give a score.
        conditions: what the network is told of each row of the data, tensors of n rows by name; for data that
            are a tensor.

    Example:
        >>> pair = Independent(torch.arange(6.0).reshape(3, 2)).draw(4, Key(0))
        >>> pair.data.shape, pair.source.shape
        (torch.Size([4, 2]), torch.Size([4, 2]))
    """

    data: Tensor | Draw
    source: Tensor | Draw | None = None
    conditions: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        _require_end("data", self.data)
        if self.source is not None:
            _require_end("source", self.source)
        if self.conditions is not None:
            if not isinstance(self.data, Tensor):
                raise ArgumentError("conditions", sorted(self.conditions), "None where data are drawn")
            require_conditions(self.conditions, len(self.data))

    def draw(self, count: int, key: Key) -> Pair:
        """See `Coupling`."""
        require_draw(count, key)
        first, second = key.at(call=2 * key.call), key.at(call=2 * key.call + 1)
        given: dict[str, Tensor] = {}
        if isinstance(self.data, Tensor):
            rows = _rows(len(self.data), count, first, self.data.device)
            data = self.data[rows]
            given = {name: value[rows] for name, value in (self.conditions or {}).items()}
        else:
            data = self.data(count, first)
        source = normal(data, second) if self.source is None else _drawn(self.source, count, second)
        return Pair(*require_pair(data, source), given)


class Paired(Dataset[tuple[Any, ...]]):
    """Pairs that are given: two sets of data that belong together, or what a flow has made of its source.

    Rows are drawn, indexed and saved jointly. As a `torch.utils.data.Dataset` it goes into one `DataLoader`,
    whose batches are (data, source), or (data, source, conditions).

    Args:
        data: (n, ...).
        source: shaped as the data.
        conditions: tensors of shape (n, ...), by name.

    Raises:
        ArgumentError, ArgumentTypeError: other shapes, or integers.

    Example:
        >>> pairs = Paired(torch.arange(3.0), torch.arange(3.0) + 10)
        >>> pair = pairs.draw(5, Key(0))
        >>> bool((pair.source - pair.data == 10).all())
        True
        >>> pairs[1]
        (tensor(1.), tensor(11.))
    """

    def __init__(self, data: Tensor, source: Tensor, conditions: Mapping[str, Tensor] | None = None) -> None:
        self.data, self.source = require_pair(data, source)
        self.conditions = dict(conditions or {})
        require_conditions(self.conditions, len(data))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        ends = (self.data[index], self.source[index])
        if not self.conditions:
            return ends
        return (*ends, {name: value[index] for name, value in self.conditions.items()})

    def draw(self, count: int, key: Key) -> Pair:
        """See `Coupling`; rows with replacement."""
        require_draw(count, key)
        rows = _rows(len(self), count, key, self.data.device)
        return Pair(
            self.data[rows], self.source[rows], {name: v[rows] for name, v in self.conditions.items()}
        )

    def save(self, file: str | File) -> None:
        """Write the pairs to one file, in the dtype they have."""
        torch.save({"data": self.data, "source": self.source, "conditions": self.conditions}, file)

    @staticmethod
    def load(file: str | File) -> Paired:
        """Read pairs back, mapped into memory: rows come from the disk when they are drawn."""
        found = torch.load(file, mmap=True, weights_only=True)
        if not isinstance(found, dict) or set(found) != {"data", "source", "conditions"}:
            raise ArgumentError("file", str(file), "a file that Paired.save wrote")
        return Paired(found["data"], found["source"], found["conditions"])


@dataclass(frozen=True, slots=True, eq=False)
class MinibatchTransport:
    """Another coupling's draws, the sources of each draw dealt out anew so that the total cost is least.

    Choose it for straighter flows from the first training on: with larger draws it tends to the optimal
    coupling; with one row it changes nothing. Conditions stay with the data, so the source is no longer
    independent of them. Needs scipy; the assignment takes cubic time in the draw.

    Args:
        coupling: what is drawn from, as a rule `Independent`.
        cost: `cost(data, source)` for all pairs, (batch, batch); None for the squared distance.

    Paper:
        Pooladian et al.: Multisample Flow Matching. ICML 2023. Tong et al.: Improving and Generalizing
        Flow-Based Generative Models with Minibatch Optimal Transport. TMLR 2024.

    Example:
        >>> data = Independent(lambda n, key: normal(torch.empty(n, 1), key))
        >>> pair = MinibatchTransport(data).draw(20, Key(0))
        >>> bool((pair.source[pair.data.argsort(0)[:, 0]].diff(dim=0) >= 0).all())
        True
    """

    coupling: Coupling
    cost: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        require_coupling("coupling", self.coupling)
        if self.cost is not None and not callable(self.cost):
            raise ArgumentTypeError("cost", self.cost, "a function cost(data, source), or None")

    def draw(self, count: int, key: Key) -> Pair:
        """See `Coupling`."""
        pair = self.coupling.draw(count, key)
        order = optimal_assignment(pair.data, pair.source, cost=self.cost)
        return Pair(pair.data, pair.source[order], pair.conditions)


def optimal_assignment(
    data: Tensor, source: Tensor, *, cost: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Which row of the source goes with each row of the data when the total cost is least.

    Args:
        data: (n, ...).
        source: shaped as the data.
        cost: `cost(data, source)` for all pairs, (n, n); None for the squared distance.

    Returns:
        Indices into the source, shape (n,), int64: `source[indices]` belongs to `data`.

    Raises:
        MissingExtraError: scipy is not installed.

    Example:
        >>> optimal_assignment(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 4.0]))
        tensor([1, 0])
    """
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("scipy", "recipes") from None
    require_pair(data, source)
    with torch.no_grad():
        costs = squared_distances(data, source) if cost is None else cost(data, source)
    if costs.shape != (len(data), len(data)) or not bool(torch.isfinite(costs).all()):
        raise ArgumentError("cost", costs, f"finite costs of shape ({len(data)}, {len(data)})")
    columns = linear_sum_assignment(costs.detach().double().cpu().numpy())[1]
    return torch.as_tensor(columns, dtype=torch.int64, device=data.device)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Between all rows of two tensors, summed over features, in float64: (n, m)."""
    rows, columns = (value.detach().double().reshape(len(value), -1) for value in (a, b))
    # by differences: the expanded square cancels where points are close
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist").square()


def require_pair(data: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Raise unless both are floating-point batches of one shape and dtype."""
    require_floating("data", data)
    require_floating("source", source)
    if data.ndim == 0 or len(data) == 0:
        raise ArgumentError("data", data, "a batch of data, shape (batch, ...)")
    if source.shape != data.shape or source.dtype != data.dtype:
        raise ArgumentError("source", source, f"shape {tuple(data.shape)} and {data.dtype}, as the data")
    return data, source


def require_conditions(conditions: Mapping[str, Tensor], count: int) -> None:
    """Raise unless each condition is a tensor of `count` rows."""
    for name, value in conditions.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
            raise ArgumentError(f"conditions[{name!r}]", value, f"a tensor of {count} rows")


def require_coupling(argument: str, value: object) -> None:
    """Raise `ArgumentTypeError` unless `value` is a coupling."""
    if isinstance(value, type) or not isinstance(value, Coupling):
        raise ArgumentTypeError(argument, value, "a coupling such as Independent(data)")


def require_draw(count: int, key: Key) -> None:
    """Raise unless a draw of `count` rows under `key` makes sense."""
    require_integer("count", count, 1)
    if not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key")


def _require_end(argument: str, value: object) -> None:
    if callable(value) and not isinstance(value, type | Tensor):
        return
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(argument, value, "a tensor (n, ...) or a function draw(count, key)")
    require_floating(argument, value)
    if value.ndim == 0 or len(value) == 0:
        raise ArgumentError(argument, value, "a tensor (n, ...) with at least one row")


def _drawn(end: Tensor | Draw, count: int, key: Key) -> Tensor:
    if isinstance(end, Tensor):
        return end[_rows(len(end), count, key, end.device)]
    return end(count, key)


def _rows(length: int, count: int, key: Key, device: torch.device) -> Tensor:
    draws = uniform(torch.empty(count, dtype=torch.float64, device=device), key)
    return (draws * length).long().clamp(max=length - 1)
