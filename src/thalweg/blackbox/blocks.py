"""Block-wise directions: one group of parameters moves at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal

from torch import Tensor, nn

from thalweg.blackbox.directions import Bound, Directions, bind, reads_values, require_directions
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_integer,
)
from thalweg.noise import Key


@dataclass(frozen=True, slots=True)
class Blocks:
    """Move one block of parameters at a time, one module for example: block coordinate descent.

    Choose it when layers differ in how far they may be moved, or to draw and update a part of a large model
    per step. E[z z^T] is the identity on the block and zero elsewhere: each block's gradient is averaged over
    the samples that moved it, and of the blocks that none moved no gradient is filled.

    Args:
        sizes: how many consecutive parameters make each block, as `Blocks.per_module(model)` counts them;
            None makes each parameter a block.
        order: "round-robin" takes block (step + sample) mod count, where `step` is that of the estimate's
            key: with `MeZO` it goes round by itself, with `thalweg.backward` pass `key=Key(seed, step=k)`.
            "random" draws blocks from the key.
        of: the directions within a block: "gaussian", "rademacher", `LowRank(...)` or `Sparse(...)`.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Example:
        >>> import torch
        >>> one, two = torch.zeros(2), torch.zeros(3)
        >>> bound = Blocks(of="rademacher").bind([one, two], Key(0, step=1), samples=1)
        >>> bound.part(0, 0, one), bound.part(0, 1, two).abs()
        (None, tensor([1., 1., 1.]))
    """

    sizes: tuple[int, ...] | None = None
    order: Literal["round-robin", "random"] = "round-robin"
    of: Directions = "gaussian"

    def __post_init__(self) -> None:
        if self.sizes is not None:
            if not isinstance(self.sizes, tuple) or not self.sizes:
                raise ArgumentTypeError("sizes", self.sizes, "a tuple of at least one count, or None")
            for place, size in enumerate(self.sizes):
                require_integer(f"sizes[{place}]", size, 1)
        require_choice("order", self.order, ("round-robin", "random"))
        require_directions("of", self.of)
        if self.of in ("sphere", "coordinate") or type(self.of).__name__ in ("Coordinates", "Blocks"):
            expected = "directions that are drawn parameter by parameter: 'gaussian', 'rademacher', "
            raise ArgumentError("of", self.of, expected + "LowRank(...) or Sparse(...)")

    @property
    def reads_values(self) -> bool:
        """Whether the directions depend on the weights."""
        return reads_values(self.of)

    @staticmethod
    def per_module(
        model: nn.Module,
        depth: int | None = None,
        *,
        order: Literal["round-robin", "random"] = "round-robin",
        of: Directions = "gaussian",
    ) -> Blocks:
        """One block for each module, for estimates over `model.parameters()`, frozen ones left out.

        Args:
            depth: how many parts of a module's name make a block, at least 1: of "encoder.3.norm" 2 takes
                "encoder.3". None takes the module that owns the parameter.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
            >>> Blocks.per_module(model).sizes
            (2, 1)
        """
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError("model", model, "a torch.nn.Module")
        if depth is not None:
            require_integer("depth", depth, 1)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not names:
            raise ArgumentError("model", type(model), "a module with at least one parameter to learn")
        owners = [name.split(".")[:-1][:depth] for name in names]
        return Blocks(tuple(len(list(group)) for _, group in groupby(owners)), order, of)

    def bind(self, parameters: Sequence[Tensor], key: Key, samples: int) -> BoundBlocks:
        """The directions of one estimate.

        Raises:
            ArgumentError: the sizes do not add up to the number of parameters.
        """
        sizes = self.sizes or (1,) * len(parameters)
        if sum(sizes) != len(parameters):
            mend = "Blocks.per_module(model) counts those of model.parameters()."
            raise ArgumentError(
                "directions", self, f"sizes that add up to {len(parameters)} parameters", mend
            )
        if self.order == "round-robin":
            blocks = [(key.step + sample) % len(sizes) for sample in range(samples)]
        else:
            # beyond every direction's sample, whose streams these keys must not share
            stream = Key(key.bits(), step=1 << 41)
            blocks = [stream.at(call=sample).bits() % len(sizes) for sample in range(samples)]
        starts = tuple(accumulate(sizes, initial=0))
        ranges = tuple((starts[block], starts[block + 1]) for block in blocks)
        return BoundBlocks(bind(self.of, parameters, key, samples), ranges)


@dataclass(frozen=True, slots=True)
class BoundBlocks:
    """Directions cut to a range of parameters each."""

    inner: Bound
    ranges: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """One over how many directions move the same block."""
        visits = Counter(self.ranges)
        return tuple(1 / visits[each] for each in self.ranges)

    def part(self, sample: int, index: int, value: Tensor) -> Tensor | None:
        """The direction's part where the block holds the parameter; else None."""
        start, end = self.ranges[sample]
        return self.inner.part(sample, index, value) if start <= index < end else None
