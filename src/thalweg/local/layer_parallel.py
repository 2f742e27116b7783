"""Blocks of a NoProp stack on different processes, which tell each other nothing while they learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.local.noprop import NoProp
from thalweg.local.stack import LocalPhase
from thalweg.noise import Key


class LayerParallel(nn.Module):
    """Train the blocks of a `NoProp` on several processes; no gradient and no activation is sent.

    Choose it where one process per block (or group of blocks) can read the data: each rank learns every
    world-th block, the readout counted as the last one, and the only communication is `gather_()` at the end.
    Given the same batches and the same keys the result is that of one process, bit for bit, on the same kind
    of machine.

    Args:
        learner: a `NoProp` with anchor="own" and labels that do not learn, so that no parameter is shared.
        group: a process group of `torch.distributed`, or None for the default one.

    Raises:
        ArgumentTypeError, ArgumentError: another learner, shared parameters, or more ranks than phases.
        UnsupportedError: torch.distributed is not initialised.

    Each rank loads all batches, in the same order. Make one optimizer per rank from `learned()`.

    Example:
        >>> import torch.distributed as dist
        >>> from thalweg.local import DenoisingBlock, LayerParallel, one_hot_labels
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> labels = one_hot_labels(3)
        >>> blocks = [DenoisingBlock(labels, 4, width=8) for _ in range(2)]
        >>> parallel = LayerParallel(NoProp(blocks, labels, anchor="own"))
        >>> optimizer = torch.optim.AdamW(parallel.learned())
        >>> for phase in parallel.phases((torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])), key=Key(0, 0)):
        ...     optimizer.zero_grad()
        ...     loss = phase.backward()
        ...     optimizer.step()
        >>> parallel.gather_()
        >>> dist.destroy_process_group()
    """

    def __init__(self, learner: NoProp, *, group: Any | None = None) -> None:
        import torch.distributed as dist

        super().__init__()
        if not isinstance(learner, NoProp):
            raise ArgumentTypeError("learner", learner, "a NoProp")
        if learner.anchored != "own":
            mend = "With 'every' the readout is moved by all blocks."
            raise ArgumentError("learner", f"anchor={learner.anchored!r}", "anchor='own'", mend)
        if learner.embedding.learned:
            mend = "All blocks would move them."
            raise ArgumentError("learner", "labels that learn", "fixed labels: one_hot_labels", mend)
        if not (dist.is_available() and dist.is_initialized()):
            raise UnsupportedError("LayerParallel: call torch.distributed.init_process_group first")
        self.learner = learner
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        count = len(learner.blocks) + 1
        if self.world > count:
            raise ArgumentError("group", f"{self.world} ranks", f"at most {count}, one per block and readout")
        self.places = tuple(range(self.rank, count, self.world))

    def learned(self) -> tuple[nn.Parameter, ...]:
        """The parameters that this rank moves."""
        return tuple(p for place in self.places for p in self.learner.learned(place))

    def phases(self, batch: Any, *, key: Key | None = None) -> Iterator[LocalPhase]:
        """The phases of this rank's blocks.

        Args:
            batch: (inputs, labels), the same on every rank.
            key: of all that is random, `Key(seed, step)` the same on every rank; None draws from each rank's
                own default generator: right as well, but not the numbers of one process.
        """
        return self.learner.phases(batch, key=key, only=self.places)

    def predict(self, inputs: Tensor, **options: Any) -> Tensor:
        """As `NoProp.predict`; the same on every rank after `gather_()`."""
        return self.learner.predict(inputs, **options)

    def gather_(self) -> None:
        """Send every block from the rank that trained it to all others; every rank has to call it."""
        import torch.distributed as dist

        parts = [*self.learner.blocks, self.learner.readout]
        for place, part in enumerate(parts):
            source = place % self.world
            if self.group is not None:
                source = dist.get_global_rank(self.group, source)
            for tensor in (*part.parameters(), *part.buffers()):
                # through a copy: a parameter must not be written to while autograd looks
                held = tensor.detach().clone()
                dist.broadcast(held, src=source, group=self.group)
                with torch.no_grad():
                    tensor.copy_(held)
