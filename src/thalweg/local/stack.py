"""Blocks that learn alone: detached inputs, a loss each, readouts summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer
from thalweg.local.readout import LocalLoss, unit_length, unit_mean_square
from thalweg.step import backward

Normalize = Literal["length", "rms"] | Callable[[Tensor], Tensor] | None

_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {"length": unit_length, "rms": unit_mean_square}


@dataclass(frozen=True, slots=True, eq=False)
class LocalPhase:
    """The update of one block. `backward()` fills its `.grad`; any other rule can take `loss` instead.

    Choose `thalweg.backward(phase.loss, phase.parameters, gradient=SPSA())`, or with `scaler=`, over
    `phase.backward()` where a block has no derivative, or under an AMP scaler.

    Args:
        name: of the block.
        parameters: what the phase moves.
        loss: computes the loss, a scalar or one value per example; it depends on no other block.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> LocalPhase("alone", (weight,), lambda: weight.square().sum()).backward(), weight.grad
        (tensor(2.), tensor([2., 2.]))
    """

    name: str
    parameters: Sequence[Tensor]
    loss: Callable[[], Tensor]

    def backward(self) -> Tensor:
        """Fill `.grad` by backpropagation inside the block; returns the mean loss, detached."""
        return backward(self.loss, self.parameters)


class LocalStack(nn.Module):
    """A stack of blocks, each trained by a loss of its own on detached inputs; no gradient passes between.

    Choose it to train in the memory of one block, or to train blocks at different times or with different
    optimizers. It is a learner: `phases(batch)` gives one phase per block, and a block sees what its
    predecessor said in this very batch, before or after the predecessor's step as your loop has it: the
    forward of the phase is used again after `phase.backward()`, so a step costs one forward per block.

    Args:
        blocks: modules, each called with the (normalised, detached) output of the one before. One without
            parameters to learn only passes on.
        local: a `LocalLoss` for all blocks, or one per block; one with parameters is never shared.
        normalize: what is done to the input of every block: "length" (see `unit_length`), "rms" (see
            `unit_mean_square`), a function of a tensor, or None.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or a parameter that two blocks share.

    Subclasses say what a batch is (`split`), what the first block sees (`enter`), and how a block is called
    (`run`), and so make graphs or positive and negative examples of it.

    Example:
        >>> from thalweg.local import LocalStack, Readout
        >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
        >>> learner = LocalStack(blocks, [Readout(8, 3), Readout(8, 3)])
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> for phase in learner.phases((torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1]))):
        ...     optimizer.zero_grad()
        ...     loss = phase.backward()
        ...     optimizer.step()
        >>> learner.predict(torch.ones(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        local: nn.Module | Sequence[nn.Module],
        *,
        normalize: Normalize = None,
    ) -> None:
        super().__init__()
        found = require_modules("blocks", blocks)
        losses = _one_per_block(local, len(found))
        require_own_parameters(
            {f"blocks[{i}] and its loss": (block, loss) for i, (block, loss) in enumerate(zip(found, losses))}
        )
        if isinstance(normalize, str):
            require_choice("normalize", normalize, tuple(_NORMALIZERS))
        elif normalize is not None and not callable(normalize):
            raise ArgumentTypeError("normalize", normalize, "'length', 'rms', a function, or None")
        self.blocks = nn.ModuleList(found)
        self.local = nn.ModuleList(losses)
        self.normalize: Callable[[Tensor], Tensor] | None = (
            _NORMALIZERS[normalize] if isinstance(normalize, str) else normalize
        )

    def split(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and the targets of a batch."""
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentTypeError("batch", batch, "(inputs, targets)")
        return batch[0], batch[1]

    def enter(self, inputs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """What the first block sees, and what every block is called with beside it (edges, for example)."""
        return inputs, ()

    def run(self, index: int, state: Tensor, context: tuple[Any, ...]) -> Tensor:
        """The output of one block, whose input is normalised and detached: the only way to call a block."""
        state = state.detach()
        if self.normalize is not None:
            state = self.normalize(state)
        output = self.blocks[index](state, *context)
        if not isinstance(output, Tensor):
            raise ArgumentTypeError(f"blocks[{index}]", output, "a module that returns one tensor")
        return output

    def phases(self, batch: Any, *, only: Iterable[int] | None = None) -> Iterator[BlockPhase]:
        """One phase per block, in order, each computed when it is reached.

        Args:
            batch: (inputs, targets).
            only: indices of the blocks that learn; the others pass on what they know. Training `only=[0]` to
                the end, then `only=[1]` and so on is the greedy schedule.
        """
        inputs, target = self.split(batch)
        return self._phases(inputs, target, self._chosen(only))

    def _phases(self, inputs: Any, target: Any, chosen: Sequence[int]) -> Iterator[BlockPhase]:
        with torch.no_grad():
            state, context = self.enter(inputs)
        for index in range(max(chosen) + 1):
            parameters = self.learned(index) if index in chosen else ()
            phase = BlockPhase(f"block {index}", parameters, self, index, state, context, target)
            if parameters:
                yield phase
            if index < max(chosen):
                state = phase.output()

    def learned(self, index: int) -> tuple[nn.Parameter, ...]:
        """What one phase moves: the parameters of the block and of its loss that require grad."""
        both = (*self.blocks[index].parameters(), *self.local[index].parameters())
        return tuple(parameter for parameter in both if parameter.requires_grad)

    def scores(self, inputs: Any, *, blocks: int | None = None) -> list[Tensor]:
        """What each block says by itself, for the first `blocks` of them: depth must earn its keep."""
        count = len(self.blocks) if blocks is None else blocks
        require_integer("blocks", count, 1)
        if count > len(self.blocks):
            raise ArgumentError("blocks", count, f"at most {len(self.blocks)}, the number of blocks")
        found = []
        with torch.no_grad():
            state, context = self.enter(inputs)
            for index in range(count):
                state = self.run(index, state, context)
                found.append(self._local(index).scores(state))
        return found

    def predict(self, inputs: Any, *, blocks: int | None = None) -> Tensor:
        """The sum of what the first `blocks` blocks say (None: all), in the mode the modules are in."""
        return torch.stack(self.scores(inputs, blocks=blocks)).sum(0)

    def _local(self, index: int) -> Any:
        return self.local[index]

    def _chosen(self, only: Iterable[int] | None) -> list[int]:
        count = len(self.blocks)
        chosen = list(range(count)) if only is None else list(only)
        for index in chosen:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                raise ArgumentError("only", index, f"indices of blocks, 0 to {count - 1}")
        if not any(self.learned(index) for index in chosen):
            raise ArgumentError("only", chosen, "at least one block with a parameter that requires grad")
        return chosen


@dataclass(slots=True, eq=False)
class BlockPhase:
    """The phase of one block of a `LocalStack`; like `LocalPhase`, and it keeps what its block said.

    Args:
        name: of the block.
        parameters: what the phase moves.
        stack: whose block it is.
        index: which block.
        state: the block's input.
        context: what the block is called with beside it.
        target: what the loss is told.
    """

    name: str
    parameters: Sequence[Tensor]
    stack: LocalStack
    index: int
    state: Tensor
    context: tuple[Any, ...]
    target: Any
    kept: Tensor | None = None

    def loss(self) -> Tensor:
        """The loss, a scalar or one value per example."""
        return self._judge(self.stack.run(self.index, self.state, self.context))

    def backward(self) -> Tensor:
        """Fill `.grad` by backpropagation inside the block; returns the mean loss, detached."""
        return backward(self._keeping, self.parameters)

    def output(self) -> Tensor:
        """What the next block sees: the output of `backward`'s forward, else that of a new one."""
        if self.kept is not None:
            return self.kept
        with torch.no_grad():
            return self.stack.run(self.index, self.state, self.context)

    def _keeping(self) -> Tensor:
        output = self.stack.run(self.index, self.state, self.context)
        self.kept = output.detach()
        return self._judge(output)

    def _judge(self, output: Tensor) -> Tensor:
        loss: Tensor = self.stack.local[self.index](output, self.target)
        return loss


def require_modules(argument: str, modules: object) -> list[nn.Module]:
    """Raise unless `modules` is an iterable of at least one module; return them as a list."""
    wanted = "an iterable of modules"
    if isinstance(modules, str | Tensor) or not isinstance(modules, Iterable):
        raise ArgumentTypeError(argument, modules, wanted)
    found = list(modules)
    for index, each in enumerate(found):
        if not isinstance(each, nn.Module):
            raise ArgumentTypeError(f"{argument}[{index}]", each, "a torch.nn.Module")
    if not found:
        raise ArgumentError(argument, "none", "at least one module")
    return found


def require_own_parameters(owners: dict[str, tuple[nn.Module, ...]]) -> None:
    """Raise when a parameter belongs to two owners: two losses would pull at it, and neither is its own."""
    owner_of: dict[int, str] = {}
    for name, modules in owners.items():
        for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
            before = owner_of.setdefault(id(parameter), name)
            if before != name:
                mend = f"It belongs to {before} too: give each its own, for example copy.deepcopy(block)."
                raise ArgumentError(name, parameter, "parameters of its own", mend)


def _one_per_block(local: object, count: int) -> list[nn.Module]:
    losses = [local] * count if isinstance(local, nn.Module) and isinstance(local, LocalLoss) else local
    if isinstance(losses, nn.Module) and not isinstance(losses, nn.ModuleList):
        raise ArgumentTypeError("local", local, "a module with a method scores(output), see LocalLoss")
    found = require_modules("local", losses)
    if len(found) != count:
        raise ArgumentError("local", f"{len(found)} losses", f"one for all, or {count}, one per block")
    for index, each in enumerate(found):
        if not isinstance(each, LocalLoss):
            raise ArgumentTypeError(f"local[{index}]", each, "a module with a method scores(output)")
    return found
