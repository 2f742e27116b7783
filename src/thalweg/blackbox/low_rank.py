"""Low-rank directions: every matrix is moved along a random matrix of few columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg import noise
from thalweg.blackbox.directions import own_key
from thalweg.errors import require_integer
from thalweg.noise import Key


@dataclass(frozen=True, slots=True)
class LowRank:
    """For an m x n matrix draw r (m + n) numbers in place of m n: U V / sqrt(r), with Gaussian U and V.

    Choose it for large matrices, where drawing costs as much as the forward passes, and where gradients are
    themselves of low rank. Over all weights E[z z^T] is the identity; for a single matrix the second moment
    is m n + 2 + 2 (m + n + 1) / r times the squared norm of the gradient, little above a Gaussian's. A tensor
    of more than two dimensions counts as a matrix of its first dimension by all others; vectors and scalars
    get a Gaussian draw.

    Args:
        rank: columns of U, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a rank out of range.

    Paper:
        Chen, Zhang, Cao, Yuan, Wen: Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
        Structures (LOZO). arXiv 2410.07698, 2024.

    Example:
        >>> bound = LowRank(rank=2).bind([torch.empty(8, 5)], Key(0), samples=1)
        >>> int(torch.linalg.matrix_rank(bound.part(0, 0, torch.empty(8, 5))))
        2
    """

    rank: int = 2

    def __post_init__(self) -> None:
        require_integer("rank", self.rank, 1)

    def bind(self, parameters: Sequence[Tensor], key: Key, samples: int) -> BoundLowRank:
        """The directions of one estimate."""
        return BoundLowRank(self.rank, key, samples)


@dataclass(frozen=True, slots=True)
class BoundLowRank:
    """Products of two keyed factors."""

    rank: int
    key: Key
    samples: int

    @property
    def weights(self) -> tuple[float, ...]:
        """The plain mean."""
        return (1 / self.samples,) * self.samples

    def part(self, sample: int, index: int, value: Tensor) -> Tensor:
        """A new tensor like `value`."""
        own = own_key(self.key, sample, index)
        if value.ndim < 2 or not value.numel():
            return noise.normal(value, own)
        rows, columns = value.shape[0], value.numel() // value.shape[0]
        # one number stands for the shape: nothing is allocated to say how much to draw
        one = value.new_empty(())
        left = noise.normal(one.expand(rows, self.rank), Key(own.bits(), call=0, device=own.device))
        right = noise.normal(one.expand(self.rank, columns), Key(own.bits(), call=1, device=own.device))
        # the user's autocast is for the model; a direction must be the same inside and outside of it
        with torch.autocast(value.device.type, enabled=False):
            return (left.div_(math.sqrt(self.rank)) @ right).view(value.shape)
