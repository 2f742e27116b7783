"""Sparse directions: only a part of the weights is moved, drawn from the key or chosen by magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from thalweg import noise
from thalweg.blackbox.directions import PLAIN, Bound, Pattern, Plain, bind, own_key, require_directions
from thalweg.blackbox.low_rank import LowRank
from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.noise import Key


@dataclass(frozen=True, slots=True)
class Sparse:
    """Move a fraction of the weights of each parameter; variance falls with the number of those that move.

    Choose it when few weights matter for the task at hand. E[z z^T] is the identity on the mask and zero
    elsewhere: an estimate of the gradient restricted to the mask, in which all others have a zero.

    Args:
        fraction: of the weights of each parameter, above 0 and at most 1.
        keep: "random" draws the mask from the key, one for all samples of an estimate; "smallest" and
            "largest" take the weights of least or greatest magnitude, of equal ones all. A mask by magnitude
            is found anew at every step, from the weights as they are then.
        of: the directions that are masked: "gaussian", "rademacher" or `LowRank(...)`.
        seed: names one random mask for the whole training, at least 0; None draws a new one per estimate.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Liu, Zhu, Gong, Cheng, Hsieh, You: Sparse MeZO. arXiv 2402.15751, 2024.

    Example:
        >>> weight = torch.tensor([0.1, -3.0, 2.0, 0.5])
        >>> bound = Sparse(0.5, keep="largest", of="rademacher").bind([weight], Key(0), samples=1)
        >>> bound.part(0, 0, weight).abs()
        tensor([0., 1., 1., 0.])
    """

    fraction: float = 0.1
    keep: Literal["random", "smallest", "largest"] = "random"
    of: Plain | LowRank = "gaussian"
    seed: int | None = None

    def __post_init__(self) -> None:
        require_positive("fraction", self.fraction)
        if self.fraction > 1:
            raise ArgumentError("fraction", self.fraction, "a number above 0 and at most 1")
        require_choice("keep", self.keep, ("random", "smallest", "largest"))
        require_directions("of", self.of, PLAIN)
        if isinstance(self.of, Pattern) and not isinstance(self.of, LowRank):
            raise ArgumentTypeError("of", self.of, "'gaussian', 'rademacher' or LowRank(...)")
        if self.seed is not None:
            require_integer("seed", self.seed, 0)
            if self.keep != "random":
                raise ArgumentError("seed", self.seed, "None, since a mask by magnitude is not drawn")

    @property
    def reads_values(self) -> bool:
        """Whether the mask depends on the weights."""
        return self.keep != "random"

    def bind(self, parameters: Sequence[Tensor], key: Key, samples: int) -> BoundSparse:
        """The directions of one estimate."""
        inner = bind(self.of, parameters, key, samples)
        stream = Key(key.bits() if self.seed is None else self.seed, device=key.device)
        return BoundSparse(self, inner, stream)


@dataclass(frozen=True, slots=True, eq=False)
class BoundSparse:
    """Masked directions; of a mask by magnitude only its threshold is kept."""

    pattern: Sparse
    inner: Bound
    stream: Key
    _thresholds: dict[int, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of the directions that are masked."""
        return self.inner.weights

    def part(self, sample: int, index: int, value: Tensor) -> Tensor:
        """A new tensor like `value`, zero outside the mask."""
        drawn = self.inner.part(sample, index, value)
        assert drawn is not None
        return drawn.masked_fill_(~self._mask(index, value), 0)

    def _mask(self, index: int, value: Tensor) -> Tensor:
        if self.pattern.keep == "random":
            # in float32 whatever the parameter: bfloat16 could not tell fractions below 1/256
            like = torch.empty((), dtype=torch.float32, device=value.device).expand(value.shape)
            # no direction has as many samples: the mask's stream is its own
            return noise.uniform(like, own_key(self.stream, 1 << 40, index)) < self.pattern.fraction
        size = value.abs()
        if index not in self._thresholds:
            self._thresholds[index] = self._threshold(size)
        kept = self._thresholds[index]
        return size <= kept if self.pattern.keep == "smallest" else size >= kept

    def _threshold(self, size: Tensor) -> Tensor:
        count = max(1, round(self.pattern.fraction * size.numel()))
        rank = count if self.pattern.keep == "smallest" else size.numel() - count + 1
        return size.flatten().kthvalue(rank).values if size.numel() else size.new_zeros(())
