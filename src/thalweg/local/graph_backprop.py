"""The same graph network trained end to end: the twin by which forward learning is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.local.graph import GraphLayer
from thalweg.local.graph_tasks import LabelledGraph, LinkBatch
from thalweg.local.readout import unit_length
from thalweg.local.stack import LocalPhase, Normalize, require_modules


class BackpropGraph(nn.Module):
    """Graph convolutions trained by backpropagation through all of them; a learner with one phase.

    Nodes are classified by the last layer, whose width is the number of classes; links are told apart by the
    inner product of its outputs.

    Args:
        convs: modules called with (x, edges).
        activation: between them; none after the last.
        normalize: of every layer's input. None is the published baseline; on links compare with "length" too:
            without it most of the difference is the normalisation and not the way of learning.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> from thalweg.local import LabelledGraph, convolutions
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> known = torch.tensor([True, False, True])
        >>> graph = LabelledGraph(torch.eye(3), edges, torch.tensor([0, 0, 1]), known)
        >>> learner = BackpropGraph(convolutions("gcn", [3, 8, 2]))
        >>> [phase.name for phase in learner.phases(graph)]
        ['all layers']
    """

    def __init__(
        self,
        convs: Sequence[nn.Module],
        *,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        normalize: Normalize = None,
    ) -> None:
        super().__init__()
        if not (normalize is None or normalize == "length" or callable(normalize)):
            raise ArgumentError("normalize", normalize, "'length', a function of a tensor, or None")
        found = require_modules("convs", convs)
        activations = [activation] * (len(found) - 1) + [nn.Identity()]
        # what the first layer takes from the neighbours is constant here too
        self.layers = nn.ModuleList(
            GraphLayer(conv, each, cached=index == 0)
            for index, (conv, each) in enumerate(zip(found, activations))
        )
        self.normalize: Any = unit_length if normalize == "length" else normalize

    def outputs(self, graph: LabelledGraph | LinkBatch) -> Tensor:
        """The last layer, (nodes, width)."""
        if not isinstance(graph, LabelledGraph | LinkBatch):
            raise ArgumentTypeError("batch", graph, "a LabelledGraph or a LinkBatch")
        state = graph.features
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, GraphLayer)
            if index == 0:
                state = layer.of(state, self._normalized, graph.edges)
            else:
                state = layer(self._normalized(state), graph.edges)
        return state

    def phases(self, batch: LabelledGraph | LinkBatch) -> list[LocalPhase]:
        """One phase: all layers."""
        parameters = tuple(p for p in self.parameters() if p.requires_grad)
        return [LocalPhase("all layers", parameters, lambda: self._losses(batch))]

    @torch.no_grad()
    def predict(self, inputs: LabelledGraph | LinkBatch) -> Tensor:
        """Probabilities, (nodes, classes) or (pairs,)."""
        outputs = self.outputs(inputs)
        if isinstance(inputs, LabelledGraph):
            return outputs.softmax(1)
        return _products(outputs, inputs).sigmoid()

    def _losses(self, batch: LabelledGraph | LinkBatch) -> Tensor:
        outputs = self.outputs(batch)
        if isinstance(batch, LabelledGraph):
            return F.cross_entropy(outputs[batch.learned], batch.learned_labels(), reduction="none")
        logits = _products(outputs, batch)
        return F.binary_cross_entropy_with_logits(logits, batch.present.to(logits.dtype), reduction="none")

    def _normalized(self, x: Tensor) -> Tensor:
        normalized: Tensor = x if self.normalize is None else self.normalize(x)
        return normalized


def _products(outputs: Tensor, batch: LinkBatch) -> Tensor:
    return (outputs[batch.pairs[0]] * outputs[batch.pairs[1]]).sum(1)
