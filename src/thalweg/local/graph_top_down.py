"""ForwardGNN with word from above: a layer sees, or is judged with, the layers above it, a step late."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive
from thalweg.local.graph import GraphStack, combined
from thalweg.local.graph_adjacency import Remembered
from thalweg.local.readout import unit_length
from thalweg.local.stack import BlockPhase
from thalweg.noise import Key
from thalweg.step import Backprop, Closure, Estimate, backward


class _TopDown(GraphStack):
    """What both have: states that the layers said last, kept from step to step for the graph learned from."""

    def __init__(self, convs: Sequence[nn.Module], task: nn.Module, **options: Any) -> None:
        super().__init__(convs, task, **options)
        if not hasattr(task, "top"):
            raise ArgumentTypeError("task", task, "VirtualNodes, LinkTask, or a module with their methods")
        self.restart()
        # states belong to the weights that made them
        self.register_load_state_dict_post_hook(_restart)  # type: ignore[no-untyped-call]

    def restart(self) -> None:
        """Forget what the layers said: the next step begins with a pass from the bottom up."""
        self._states = Remembered()

    def _last_states(self, x: Tensor, begin: Callable[[], list[Tensor]]) -> list[Tensor]:
        states: list[Tensor] = self._states.of((x,), begin)
        return states


def _restart(learner: _TopDown, _: object) -> None:
    learner.restart()


class TopToInput(_TopDown):
    """Each layer sees [layer below ; layer above], both detached; labels stand above the last layer.

    The states settle from step to step, so it is trained through `phases` (all layers in every step, see
    `fit_together`), and it predicts by sweeps. Choose it where the layers alone do not reach far enough; no
    aggregate can be kept.

    Args:
        convs: modules called with (x, edges); layer l sees widths[l - 1] + widths[l + 1] numbers, as
            `convolutions(..., top=classes, feedback=True)` has it. With `LinkTask` nothing stands above the
            last layer.
        task: `VirtualNodes` or `LinkTask`.
        widths: of each layer's output.
        alternating: the layers of even index first, then those of odd index on fresh states; otherwise all on
            the states of the last step.
        sweeps: of a prediction, at least 1.
        skip: how many sweeps at the beginning are not counted, below `sweeps`.
        activation: after every convolution.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Park and others: Forward Learning of Graph Neural Networks. ICLR 2024, arXiv 2403.11004.

    Example:
        >>> from thalweg.local import LabelledGraph, VirtualNodes, convolutions
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> known = torch.tensor([True, False, True])
        >>> graph = LabelledGraph(torch.eye(3), edges, torch.tensor([0, 0, 1]), known)
        >>> convs = convolutions("gcn", [3, 8, 8], top=2, feedback=True)
        >>> learner = TopToInput(convs, VirtualNodes(3, 2), widths=[8, 8])
        >>> [phase.name for phase in learner.phases(graph)], learner.predict(graph).shape
        (['block 0', 'block 1'], torch.Size([3, 2]))
    """

    def __init__(
        self,
        convs: Sequence[nn.Module],
        task: nn.Module,
        *,
        widths: Sequence[int],
        alternating: bool = True,
        sweeps: int = 10,
        skip: int = 2,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__(convs, task, activation=activation, cached=False)
        self.widths = list(widths)
        for index, width in enumerate(self.widths):
            require_integer(f"widths[{index}]", width, 1)
        if len(self.widths) != len(self.blocks):
            raise ArgumentError("widths", self.widths, f"{len(self.blocks)} widths, one for each layer")
        require_integer("sweeps", sweeps, 1)
        require_integer("skip", skip, 0)
        if skip >= sweeps:
            raise ArgumentError("skip", skip, f"less than sweeps, which is {sweeps}")
        self.alternating, self.sweeps, self.skip = alternating, sweeps, skip

    def run(self, index: int, state: Tensor, context: tuple[Any, ...]) -> Tensor:
        """The output of one layer on what it sees of both sides, which is normalised already."""
        output: Tensor = self.blocks[index](state.detach(), *context)
        if output.shape[1] != self.widths[index]:
            raise ArgumentError(
                f"widths[{index}]", self.widths[index], f"{output.shape[1]}, the layer's width"
            )
        return output

    def _phases(self, inputs: Any, target: Any, chosen: Sequence[int]) -> Iterator[BlockPhase]:
        x, context = self.enter(inputs)
        top = self.task.top(inputs)
        states = self._last_states(x, lambda: self._bottom_up(x, context, top))
        said = list(states)
        for index in self._order():
            parameters = self.learned(index) if index in chosen else ()
            seen = self._seen(x, states if self.alternating else said, top, index)
            phase = BlockPhase(f"block {index}", parameters, self, index, seen, context, target)
            if parameters:
                yield phase
            states[index] = phase.output()

    @torch.no_grad()
    def scores(self, inputs: Any, *, blocks: int | None = None) -> list[Tensor]:
        """What each layer says over the counted sweeps: summed for nodes, averaged for links."""
        count = self._count(blocks)
        x, context = self.asked(inputs)
        top = self.task.top(inputs)
        states = self._bottom_up(x, context, top)
        found: list[list[Tensor]] = [[] for _ in range(count)]
        for sweep in range(self.sweeps):
            said = list(states)
            for index in self._order():
                seen = self._seen(x, states if self.alternating else said, top, index)
                states[index] = self.run(index, seen, context)
            if sweep >= self.skip:
                for index in range(count):
                    found[index].append(self.task.scores(states[index], inputs))
        return [combined(each) for each in found]

    def scorer(self, phase: BlockPhase, graph: Any) -> Callable[[], Tensor]:
        """What `predict(graph)` says: no layer of this stack learns alone."""
        return lambda: self.predict(graph)

    def _order(self) -> list[int]:
        layers = range(len(self.blocks))
        return [*layers[::2], *layers[1::2]] if self.alternating else list(layers)

    @torch.no_grad()
    def _bottom_up(self, x: Tensor, context: tuple[Any, ...], top: Tensor | None) -> list[Tensor]:
        states: list[Tensor] = []
        for index in range(len(self.blocks)):
            below = x if index == 0 else states[-1]
            parts = [unit_length(below)]
            if index + 1 < len(self.blocks):
                parts.append(below.new_zeros(len(below), self.widths[index + 1]))
            elif top is not None:
                parts.append(torch.zeros_like(top))
            states.append(self.run(index, torch.cat(parts, 1), context))
        return states

    def _seen(self, x: Tensor, states: Sequence[Tensor], top: Tensor | None, index: int) -> Tensor:
        below = x if index == 0 else states[index - 1]
        above = states[index + 1] if index + 1 < len(states) else top
        parts = [below] if above is None else [below, above]
        return torch.cat([unit_length(part.detach()) for part in parts], 1)


class TopToLoss(_TopDown):
    """Each layer looks down only, but is judged by the mean of its output and of those above it.

    The layers above are taken as they were in the last step, normalised and detached. Choose it for word from
    above at the price of a bottom-up layer; all layers have the same width.

    Args:
        convs: modules called with (x, edges), all of one output width.
        task: `VirtualNodes` or `LinkTask`.
        clip: the largest norm of a layer's gradient, above 0; None for no limit.
        activation: after every convolution.
        normalize: of every layer's input.
        cached: as in `GraphStack`; only the first layer's input stays the same from step to step.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or layers of different widths when they first run.

    Paper:
        Park and others: Forward Learning of Graph Neural Networks. ICLR 2024, arXiv 2403.11004.

    Example:
        >>> from thalweg.local import LabelledGraph, VirtualNodes, convolutions
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> known = torch.tensor([True, False, True])
        >>> graph = LabelledGraph(torch.eye(3), edges, torch.tensor([0, 0, 1]), known)
        >>> learner = TopToLoss(convolutions("gcn", [3, 8, 8]), VirtualNodes(3, 2))
        >>> [bool(phase.backward() > 0) for phase in learner.phases(graph)]
        [True, True]
    """

    def __init__(
        self,
        convs: Sequence[nn.Module],
        task: nn.Module,
        *,
        clip: float | None = 1.0,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        normalize: Any = "length",
        cached: bool = True,
    ) -> None:
        super().__init__(convs, task, activation=activation, normalize=normalize, cached=cached)
        if clip is not None:
            require_positive("clip", clip)
        self.clip = clip

    def phases(self, batch: Any, *, only: Iterable[int] | None = None) -> Iterator[BlockPhase]:
        """One phase per layer, from the bottom up.

        Args:
            batch: a `LabelledGraph` or a `LinkBatch`.
            only: indices of the layers that learn; all speak.
        """
        return super().phases(batch, only=only)

    def _phases(self, inputs: Any, target: Any, chosen: Sequence[int]) -> Iterator[BlockPhase]:
        x, context = self.enter(inputs)
        states = self._last_states(x, lambda: self._bottom_up(x, context))
        said = list(states)
        below = x
        for index in range(len(self.blocks)):
            parameters = self.learned(index) if index in chosen else ()
            above = tuple(unit_length(state) for state in said[index + 1 :])
            phase = AveragedPhase(
                f"block {index}", parameters, self, index, below, context, target, above=above, clip=self.clip
            )
            if parameters:
                yield phase
            below = states[index] = phase.output()

    @torch.no_grad()
    def scores(self, inputs: Any, *, blocks: int | None = None) -> list[Tensor]:
        """What each layer says, averaged with those above it as in training."""
        count = self._count(blocks)
        states = self._bottom_up(*self.asked(inputs))
        above = [unit_length(state) for state in states]
        return [
            self.task.scores(averaged(states[index], above[index + 1 :]), inputs) for index in range(count)
        ]

    def scorer(self, phase: BlockPhase, graph: Any) -> Callable[[], Tensor]:
        """What `predict(graph)` says: no layer of this stack learns alone."""
        return lambda: self.predict(graph)

    @torch.no_grad()
    def _bottom_up(self, x: Tensor, context: tuple[Any, ...]) -> list[Tensor]:
        states: list[Tensor] = []
        for index in range(len(self.blocks)):
            states.append(self.run(index, states[-1] if states else x, context))
            if states[-1].shape != states[0].shape:
                got = f"{states[-1].shape[1]} in layer {index}"
                raise ArgumentError("convs", got, f"one width for all layers, {states[0].shape[1]}")
        return states


@dataclass(slots=True, eq=False)
class AveragedPhase(BlockPhase):
    """A `BlockPhase` whose output is judged together with what the layers above said last.

    Args:
        above: outputs of the layers above, normalised and detached.
        clip: the largest norm of the gradient, or None.
    """

    above: tuple[Tensor, ...] = ()
    clip: float | None = None

    def backward(self) -> Tensor:
        """Fill `.grad`, at most `clip` long; returns the mean loss, detached."""
        rule = Backprop() if self.clip is None else _Clipped(self.clip)
        # the rule draws nothing; a key of its own would be read from a tensor
        return backward(self._keeping, self.parameters, gradient=rule, key=Key(0))

    def _judge(self, output: Tensor) -> Tensor:
        loss: Tensor = self.stack.local[self.index](averaged(output, self.above), self.target)
        return loss


def averaged(output: Tensor, above: Sequence[Tensor]) -> Tensor:
    """The mean of a layer's output and of those above it."""
    total = output
    for each in above:
        total = total + each
    return total / (1 + len(above))


@dataclass(frozen=True, slots=True)
class _Clipped:
    """The exact gradient, shortened to a largest norm."""

    longest: float

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        exact = Backprop().estimate(closure, parameters, key)
        found = [gradient for gradient in exact.gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in found]))
        share = (self.longest / (norm + 1e-6)).clamp(max=1.0)
        shortened = tuple(None if each is None else each * share for each in exact.gradients)
        return Estimate(exact.loss, shortened, exact.evaluations)
