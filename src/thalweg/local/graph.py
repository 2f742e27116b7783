"""ForwardGNN: a graph network trained layer by layer, each layer by a loss of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.local.graph_adjacency import Remembered
from thalweg.local.graph_convolution import two_parts
from thalweg.local.stack import BlockPhase, LocalStack, Normalize, require_modules


class GraphLayer(nn.Module):
    """A convolution and its activation, with the part that does not learn kept as long as it stays the same.

    Args:
        conv: called as conv(x, edges); see `two_parts` for those whose aggregate can be kept.
        activation: of a tensor.
        cached: whether to keep the aggregate.
    """

    def __init__(self, conv: nn.Module, activation: Callable[[Tensor], Tensor], cached: bool) -> None:
        super().__init__()
        self.conv = conv
        self.activation = activation
        # in a tuple: a convolution that is its own two parts must not be registered twice
        self._parts = (two_parts(conv) if cached else None,)
        self._aggregated = Remembered()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """The activated convolution, (nodes, width)."""
        return self.activation(self.conv(x, edges))

    def of(self, state: Tensor, normalized: Callable[[Tensor], Tensor], edges: Tensor) -> Tensor:
        """The layer on `normalized(state)`; the same state and edges as last time cost no aggregate."""
        (parts,) = self._parts
        if parts is None:
            return self.activation(self.conv(normalized(state), edges))
        kept = self._aggregated.of((state, edges), lambda: parts.aggregate(normalized(state), edges))
        return self.activation(parts.combine(kept))


class GraphStack(LocalStack):
    """Graph convolutions trained one by one without backpropagation between them: ForwardGNN, bottom-up.

    It is a learner whose batch is a `LabelledGraph` or a `LinkBatch`. Train greedily with `fit_layers`, or
    all layers at once through `phases`. What a layer says is added to what the layers below it said.

    Args:
        convs: modules called with (x, edges), for example `convolutions("gcn", [1433, 64, 64])` or those of
            PyTorch Geometric.
        task: `VirtualNodes` (single forward), `LabelGoodness` (forward-forward) or `LinkTask`.
        activation: after every convolution.
        normalize: of every layer's input; "length" keeps a layer from reading off the length of its input.
        cached: compute the product with the adjacency once for as long as a layer's input stays the same, for
            convolutions that allow it.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or a parameter that two layers share.

    Paper:
        Park and others: Forward Learning of Graph Neural Networks. ICLR 2024, arXiv 2403.11004.

    Example:
        >>> from thalweg.local import LabelledGraph, VirtualNodes, convolutions
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> known = torch.tensor([True, False, True])
        >>> graph = LabelledGraph(torch.eye(3), edges, torch.tensor([0, 0, 1]), known)
        >>> learner = GraphStack(convolutions("gcn", [3, 8, 8]), VirtualNodes(3, 2))
        >>> for phase in learner.phases(graph):
        ...     loss = phase.backward()
        >>> learner.predict(graph).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        convs: Sequence[nn.Module],
        task: nn.Module,
        *,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        normalize: Normalize = "length",
        cached: bool = True,
    ) -> None:
        if not callable(activation):
            raise ArgumentTypeError("activation", activation, "a function of a tensor")
        if not all(hasattr(task, name) for name in ("enter", "ask", "scores")):
            raise ArgumentTypeError("task", task, "VirtualNodes, LabelGoodness, LinkTask, or the like")
        layers = [GraphLayer(conv, activation, cached) for conv in require_modules("convs", convs)]
        super().__init__(layers, task, normalize=normalize)
        self.task: Any = task

    def split(self, batch: Any) -> tuple[Any, Any]:
        """A graph is both: what is seen and what is to be learned."""
        return batch, batch

    def enter(self, inputs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """The features and the edges, virtual nodes included."""
        features, edges = self.task.enter(inputs)
        return features, (edges,)

    def asked(self, inputs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """The features and the edges of what is predicted on."""
        features, edges = self.task.ask(inputs)
        return features, (edges,)

    def run(self, index: int, state: Tensor, context: tuple[Any, ...]) -> Tensor:
        """The output of one layer, on its normalised, detached input."""
        if state.requires_grad:
            state = state.detach()
        return self._layer(index).of(state, self._normalized, *context)

    def _normalized(self, x: Tensor) -> Tensor:
        return x if self.normalize is None else self.normalize(x)

    def _layer(self, index: int) -> GraphLayer:
        layer = self.blocks[index]
        assert isinstance(layer, GraphLayer)
        return layer

    @torch.no_grad()
    def scores(self, inputs: Any, *, blocks: int | None = None) -> list[Tensor]:
        """What each layer says by itself, for the first `blocks` of them: depth must earn its keep."""
        state, context = self.asked(inputs)
        found = []
        for index in range(self._count(blocks)):
            state = self.run(index, state, context)
            found.append(self.task.scores(state, inputs))
        return found

    def predict(self, inputs: Any, *, blocks: int | None = None) -> Tensor:
        """The sum over layers for nodes, (nodes, classes); their mean for links, (pairs,)."""
        return combined(self.scores(inputs, blocks=blocks))

    def scorer(self, phase: BlockPhase, graph: Any) -> Callable[[], Tensor]:
        """What `predict(graph, blocks=phase.index + 1)` will say, as the layer of `phase` learns.

        The layers below are asked once. `graph` may ask for other nodes or pairs than those learned from.

        Args:
            phase: of this learner.
            graph: to predict on.
        """
        index = phase.index
        before = self.scores(graph, blocks=index) if index else []
        state, context = self.asked(graph)
        learned, learned_context = self.enter(phase.target)
        if state is learned and context[0] is learned_context[0]:
            # the very tensor that the layer learns from, whose aggregate is kept
            state, context = phase.state, phase.context
        else:
            with torch.no_grad():
                for below in range(index):
                    state = self.run(below, state, context)

        @torch.no_grad()
        def predicted() -> Tensor:
            return combined([*before, self.task.scores(self.run(index, state, context), graph)])

        return predicted

    def _count(self, blocks: int | None) -> int:
        count = len(self.blocks) if blocks is None else blocks
        require_integer("blocks", count, 1)
        if count > len(self.blocks):
            raise ArgumentError("blocks", count, f"at most {len(self.blocks)}, the number of layers")
        return count


def combined(scores: Sequence[Tensor]) -> Tensor:
    """Probabilities of classes are summed over layers, those of links are averaged."""
    stacked = torch.stack(list(scores))
    return stacked.mean(0) if stacked.ndim == 2 else stacked.sum(0)
